"""The documents say what the recorded runs found, and the runs reached what they must."""

import importlib.util
import json
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]


def build():
    return script("docs/build.py")


def script(path):
    spec = importlib.util.spec_from_file_location(Path(path).stem, ROOT / path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def recorded(name):
    return json.loads((ROOT / "docs" / "results" / f"{name}.json").read_text())


def test_generated_tables_are_up_to_date():
    module = build()
    for document in module.DOCUMENTS:
        assert module.rebuilt(document.read_text()) == document.read_text(), (
            f"{document.name} is stale: run python docs/build.py"
        )


def test_the_quickstart_reached_what_it_must():
    report = recorded("quickstart")
    metrics, units = report["metrics"], report["units"]
    assert metrics.keys() == units.keys()
    assert metrics["retrieval/gallery_size"] == 500
    chance = 100 / 500
    assert metrics["retrieval/image_to_text/R@1"] >= 50 * chance
    assert metrics["retrieval/text_to_image/R@1"] >= 50 * chance
    assert metrics["itm/roc_auc"] >= 0.9
    assert metrics["vqa/accuracy"] >= metrics["vqa/question_only_accuracy"] + 20
    for name in ("image_to_text", "text_to_image"):
        for k in (1, 5, 10):
            assert units[f"retrieval/{name}/R@{k}"] == "percent"
            assert f"retrieval/reranked/{name}/R@{k}" in metrics
        assert units[f"retrieval/median_rank/{name}"] == "count"
    assert units["itm/roc_auc"] == "fraction"


def test_the_study_shows_its_results():
    study = script("benchmarks/four_fusions.py")
    if not study.RESULTS.exists():
        pytest.skip("the study was not run yet: python benchmarks/four_fusions.py")
    results = json.loads(study.RESULTS.read_text())
    page = study.PAGE.read_text()
    assert study.summary(results) in page, "run python benchmarks/four_fusions.py --draw"
    assert study.PLOT.exists()


@pytest.mark.parametrize("direction", ["image_to_text", "text_to_image"])
def test_real_photographs_are_above_chance(direction):
    metrics = recorded("flickr8k")["metrics"]
    assert metrics["retrieval/gallery_size"] == 200
    # Half a percent is first by chance; this is three standard deviations above it.
    queries = 200 if direction == "image_to_text" else 1000
    spread = 100 * (0.005 * 0.995 / queries) ** 0.5
    assert metrics[f"retrieval/{direction}/R@1"] > 0.5 + 3 * spread
    assert metrics["itm/roc_auc"] > 0.55
