"""Which fusion? Four models that differ in nothing else, trained and scored alike.

    python benchmarks/four_fusions.py                   # everything that is not there yet
    python benchmarks/four_fusions.py --seeds=0         # one seed of each
    python benchmarks/four_fusions.py --draw            # the table and the plot of what there is

Each run pre-trains a model on the quickstart's scenes and objectives, fine-tunes it on questions,
and scores retrieval, matching and questions on unseen scenes, and retrieval on scenes with unseen
combinations of colour and shape. Stopped and started again, it goes on where it was: a run resumes
from its checkpoint, and what has been scored is not scored again. The scores are kept in
docs/results/four_fusions.json, and drawn from there into docs/four_fusions.md.
"""

import argparse
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np

ROOT = Path(__file__).resolve().parents[1]
RESULTS = ROOT / "docs" / "results" / "four_fusions.json"
PAGE = ROOT / "docs" / "four_fusions.md"
PLOT = ROOT / "docs" / "images" / "four_fusions.svg"

KINDS = ("none", "merged", "co_attention", "cross_attention")
SEEDS = (0, 1, 2)
# Score in the report (or the mean of two), what to call it, and what one who knows nothing gets.
SCORES = {
    "retrieval": ("Retrieval R@1", 0.2),
    "reranked": ("… re-ranked by ITM", 0.2),
    "itm": ("ITM ROC-AUC × 100", 50.0),
    "vqa": ("VQA accuracy", None),
    "composition": ("Composition: R@1", 0.2),
    "composition_reranked": ("… re-ranked by ITM", 0.2),
}
TOLERANCE = 0.05  # of the parameters' number, between the models


def main() -> None:
    """Run what is missing, then draw."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--output", type=Path, default=ROOT / "runs" / "four_fusions")
    parser.add_argument("--kinds", nargs="+", choices=KINDS, default=KINDS)
    parser.add_argument("--seeds", nargs="+", type=int, default=SEEDS)
    parser.add_argument("--draw", action="store_true", help="run nothing")
    arguments = parser.parse_args()
    results = json.loads(RESULTS.read_text()) if RESULTS.exists() else {}
    if not arguments.draw:
        for seed in arguments.seeds:
            for kind in arguments.kinds:
                if f"{kind}/{seed}" not in results:
                    scores = run(kind, seed, arguments.output / f"{kind}-{seed}")
                    results = json.loads(RESULTS.read_text()) if RESULTS.exists() else {}
                    results[f"{kind}/{seed}"] = scores
                    RESULTS.write_text(json.dumps(results, indent=1, sort_keys=True) + "\n")
    draw(results)


def run(kind: str, seed: int, folder: Path) -> dict[str, float]:
    """The scores of one model."""
    pretrained, answering = folder / "pretrain", folder / "vqa"
    _train("study/four_fusions", kind, pretrained, f"--config.seed={seed}")
    _train(
        "study/four_fusions_vqa",
        kind,
        answering,
        f"--config.seed={seed}",
        f"--config.init_from={pretrained}",
    )
    seen = _score("captions", pretrained, folder / "scores" / "captions")
    unseen = _score("composition", pretrained, folder / "scores" / "composition")
    answers = _score("questions", answering, folder / "scores" / "questions")
    return {
        "retrieval": _both_ways(seen, "retrieval"),
        "reranked": _both_ways(seen, "retrieval/reranked"),
        "itm": 100 * seen["itm/roc_auc"],
        "vqa": answers["vqa/accuracy"],
        "composition": _both_ways(unseen, "retrieval"),
        "composition_reranked": _both_ways(unseen, "retrieval/reranked"),
        "parameters": _parameters(pretrained),
    }


def _train(recipe: str, kind: str, workdir: Path, *overrides: str) -> None:
    _call("train.py", f"--config=configs/{recipe}.py:{kind}", f"--workdir={workdir}", *overrides)


def _score(what: str, checkpoint: Path, output: Path) -> dict[str, float]:
    report = output / "report.json"
    if not report.exists():
        config = f"--config=configs/evaluate/quickstart.py:{what}"
        _call("eval.py", config, f"--checkpoint={checkpoint}", f"--output={output}")
    return json.loads(report.read_text())["metrics"]


def _call(program: str, *arguments: str) -> None:
    subprocess.run([sys.executable, str(ROOT / program), *arguments], cwd=ROOT, check=True)


def _both_ways(metrics: dict[str, float], prefix: str) -> float:
    """The mean of R@1 from pictures to texts and from texts to pictures."""
    return (metrics[f"{prefix}/image_to_text/R@1"] + metrics[f"{prefix}/text_to_image/R@1"]) / 2


def _parameters(workdir: Path) -> int:
    """All that `parameters.txt` lists."""
    rows = (workdir / "parameters.txt").read_text().splitlines()[1:]
    shapes = [row.split()[1] for row in rows]
    return sum(
        int(np.prod([int(n) for n in shape.split("×")])) if shape != "scalar" else 1
        for shape in shapes
    )


def draw(results: dict[str, dict[str, float]]) -> None:
    """The table and the plot of the document."""
    if not results:
        sys.exit(f"{RESULTS} is not there yet: run without --draw.")
    table = summary(results)
    begin, end = "<!-- four_fusions -->\n", "<!-- /four_fusions -->"
    before, _, rest = PAGE.read_text().partition(begin)
    PAGE.write_text(before + begin + table + end + rest.partition(end)[2])
    plot(results)
    print(table)


def summary(results: dict[str, dict[str, float]]) -> str:
    """A row a fusion: mean ± standard deviation over seeds."""
    titles = [title for title, _ in SCORES.values()]
    lines = [
        "| fusion | parameters | " + " | ".join(titles) + " | seeds |",
        "|---|---|" + "---|" * (len(titles) + 1),
    ]
    counts = {}
    for kind in KINDS:
        runs = _runs(results, kind)
        if not runs:
            continue
        counts[kind] = runs[0]["parameters"]
        cells = [_spread([run[score] for run in runs]) for score in SCORES]
        row = [f"`{kind}`", f"{counts[kind]:,.0f}", *cells, str(len(runs))]
        lines.append("| " + " | ".join(row) + " |")
    chances = ["–" if chance is None else f"{chance:g}" for _, chance in SCORES.values()]
    lines.append("| chance | | " + " | ".join(chances) + " | |")
    middle = (min(counts.values()) + max(counts.values())) / 2
    if any(abs(count - middle) > TOLERANCE * middle for count in counts.values()):
        sys.exit(f"the models differ by more than {TOLERANCE:.0%} in size: {counts}")
    return "\n".join(lines) + "\n"


def _runs(results: dict[str, dict[str, float]], kind: str) -> list[dict[str, float]]:
    return [scores for name, scores in sorted(results.items()) if name.split("/")[0] == kind]


def _spread(values: list[float]) -> str:
    if len(values) == 1:
        return f"{values[0]:.1f}"
    return f"{np.mean(values):.1f} ± {np.std(values, ddof=1):.1f}"


def plot(results: dict[str, dict[str, Any]]) -> None:
    """A panel a score, a dot a run, a bar the mean."""
    import matplotlib
    from matplotlib.figure import Figure

    with matplotlib.rc_context({"svg.hashsalt": "four_fusions", "font.size": 9}):
        figure = Figure(figsize=(10, 4.6), layout="constrained")
        panels = figure.subplots(2, 3)
        for axes, (score, (title, chance)) in zip(panels.flat, SCORES.items(), strict=True):
            for row, kind in enumerate(reversed(KINDS)):
                values = [run[score] for run in _runs(results, kind)]
                axes.plot(values, [row] * len(values), "o", color="#3b6ea8", alpha=0.7)
                if values:
                    axes.plot([np.mean(values)] * 2, [row - 0.3, row + 0.3], color="#1c3553")
            if chance is not None and chance > 1:
                axes.axvline(chance, color="#999999", linestyle=":", linewidth=1)
            axes.set_yticks(range(len(KINDS)), [kind.replace("_", "-") for kind in reversed(KINDS)])
            axes.set_ylim(-0.6, len(KINDS) - 0.4)
            axes.set_title(title, fontsize=9, loc="left")
            axes.grid(axis="x", linewidth=0.4)
            axes.spines[["top", "right"]].set_visible(False)
        PLOT.parent.mkdir(exist_ok=True)
        figure.savefig(PLOT, format="svg", metadata={"Date": None})


if __name__ == "__main__":
    main()
