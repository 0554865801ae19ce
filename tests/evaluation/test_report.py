import json
import re
import subprocess
import sys

import numpy as np
import pytest

from mmjax.errors import InputError
from mmjax.evaluation import curves, page, report
from mmjax.evaluation.report import Result

WORDS = 'a <script>alert(1)</script> & "circle"'
SCORED = {"checkpoint": "runs/a", "step": 430, "config": {"seed": 0, "note": "<b>"}}


def save(folder, name, value=128):
    return report.save_picture(folder, np.full((8, 12, 3), value, np.uint8), name)


def write_retrieval(folder):
    pictures = [save(folder, f"scene-{i}", 40 * i) for i in range(6)]
    found = [{"picture": p, "score": 0.5, "is_match": i == 1} for i, p in enumerate(pictures[:5])]
    missed = [{"picture": p, "score": 0.5, "is_match": False} for p in pictures[:5]]
    examples = {
        "retrieval": [
            {"caption": WORDS, "rank": 2, "picture": pictures[1], "retrieved": found},
            {"caption": "missed", "rank": 1234, "picture": pictures[5], "retrieved": missed},
        ],
        "matching": [
            {"picture": pictures[0], "caption": WORDS, "is_match": True, "probability": 0.25}
        ],
        "attention": [
            {
                "picture": pictures[0],
                "caption": "the <b> circle",
                "tokens": ["[CLS]", "the", "circle", "##s", "."],
                "maps": [[[0.1, 0.2], [0.3, 0.4]]] * 5,
            }
        ],
    }
    metrics = {"retrieval/text_to_image/R@1": 20.0, "retrieval/gallery_size": 500}
    units = {"retrieval/text_to_image/R@1": "percent", "retrieval/gallery_size": "count"}
    metrics["itm/roc_auc"], units["itm/roc_auc"] = np.float32(0.75), "fraction"
    report.write_report(folder, Result(metrics, units, examples), **SCORED)
    return folder


def write_vqa(folder):
    example = {
        "picture": save(folder, "scene-0", 200),
        "question": f"what {WORDS}?",
        "question_type": "query",
        "answers": {"red": 1.0, "<i>": 0.3},
        "predicted": [{"answer": a, "confidence": c} for a, c in (("blue", 0.7), ("red", 0.2))],
        "correct": False,
        "question_only": [{"answer": "green", "confidence": 0.4}],
    }
    names = ("vqa/accuracy", "vqa/question_only_accuracy")
    result = Result(dict(zip(names, (58.0, 31.0), strict=True)), dict.fromkeys(names, "percent"))
    result.examples["vqa"] = [example]
    report.write_report(folder, result, **SCORED | {"step": 1260})
    return folder


def write_log(workdir, text=None):
    workdir.mkdir()
    if text is None:
        lines = [
            {"step": s, "train/loss": 9.0 - s, "train/masked_language/loss": 200 * 0.1**s}
            for s in range(4)
        ]
        lines[2] |= {"eval/loss": 7.5, "eval/retrieval/text_to_image/R@1": 12.0}
        text = "".join(json.dumps(line) + "\n" for line in lines)
    (workdir / "metrics.jsonl").write_text(text)
    return workdir / "metrics.jsonl"


def test_result_checks_its_units_and_values():
    with pytest.raises(InputError, match=r"same names.*\['b'\]"):
        Result({"a": 1.0}, {"a": "count", "b": "count"})
    with pytest.raises(InputError, match="unit of a is 'per cent'"):
        Result({"a": 1.0}, {"a": "per cent"})
    with pytest.raises(InputError, match="metric a is nan"):
        Result({"a": float("nan")}, {"a": "count"})
    with pytest.raises(InputError, match="must be a number, found '1'"):
        Result({"a": "1"}, {"a": "count"})


def test_results_merge_unless_they_disagree():
    a = Result({"a": 1.0, "c": 3.0}, {"a": "count", "c": "count"}, {"x": [{"n": 1}]})
    b = Result({"b": 2.0, "c": 3.0}, {"b": "percent", "c": "count"}, {"x": [{"n": 2}], "y": []})
    assert a.merge(b) == Result(
        {"a": 1.0, "c": 3.0, "b": 2.0},
        {"a": "count", "c": "count", "b": "percent"},
        {"x": [{"n": 1}, {"n": 2}], "y": []},
    )
    with pytest.raises(InputError, match="disagree on c: 3 and 4"):
        a.merge(Result({"c": 4.0}, {"c": "count"}))
    with pytest.raises(InputError, match=r"disagree on c: 3 and 3\.0 %"):
        a.merge(Result({"c": 3.0}, {"c": "percent"}))


def test_round_trip(tmp_path):
    read = report.read_report(write_retrieval(tmp_path))
    assert read["metrics"] == {
        "retrieval/text_to_image/R@1": 20.0,
        "retrieval/gallery_size": 500.0,
        "itm/roc_auc": 0.75,
    }
    assert read["units"]["itm/roc_auc"] == "fraction"
    assert read["examples"]["retrieval"][0]["caption"] == WORDS
    assert {key: read[key] for key in SCORED} == SCORED
    assert report.sources(read) == [SCORED]
    assert sorted(p.name for p in tmp_path.iterdir()) == ["pictures", "report.json"]


def test_save_picture_refuses_what_is_no_picture(tmp_path):
    with pytest.raises(ValueError, match="float32"):
        report.save_picture(tmp_path, np.zeros((4, 4, 3), np.float32), "a")
    with pytest.raises(ValueError, match="letters"):
        save(tmp_path, "../a")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda text: text[: len(text) // 2], "not valid JSON"),
        (lambda text: "", "not valid JSON"),
        (lambda text: "[]", "expected a JSON object, found a list"),
        (lambda text: text.replace('"step"', '"steps"'), "'step' must be a int, found no such key"),
        (lambda text: text.replace('"fraction"', '"f"'), "unit of itm/roc_auc is 'f'"),
        (lambda text: text.replace("0.75", "NaN"), "metric itm/roc_auc is nan"),
        (lambda text: text.replace("pictures/scene-5", "pictures/gone"), "'pictures/gone.png'"),
        (lambda text: text.replace("pictures/scene-5.png", "../secret"), "not in the report's"),
    ],
)
def test_bad_reports_are_refused_by_name(tmp_path, change, message):
    path = write_retrieval(tmp_path / "report") / "report.json"
    (tmp_path / "secret").write_text("")
    path.write_text(change(path.read_text()))
    with pytest.raises(InputError, match=message) as error:
        report.read_report(path.parent)
    assert str(path) in str(error.value)


def test_absent_report_says_how_to_make_one(tmp_path):
    with pytest.raises(InputError, match=r"there is no report here.*eval\.py.*--output=.*nowhere"):
        report.read_report(tmp_path / "nowhere")


def test_merged_report_has_everything_and_stands_alone(tmp_path):
    folders = [write_retrieval(tmp_path / "retrieval"), write_vqa(tmp_path / "vqa")]
    pixels = (folders[1] / "pictures" / "scene-0.png").read_bytes()
    merged = report.merge_reports(folders, tmp_path / "all")
    assert len(merged["metrics"]) == 5
    assert merged["units"].keys() == merged["metrics"].keys()
    assert merged["examples"].keys() == {"retrieval", "matching", "attention", "vqa"}
    assert [source["step"] for source in merged["sources"]] == [430, 1260]
    # Both reports have a scene-0: neither may take the other's place.
    assert (tmp_path / "all" / merged["examples"]["vqa"][0]["picture"]).read_bytes() == pixels
    assert len(list((tmp_path / "all" / "pictures").iterdir())) == 7
    again = report.merge_reports([tmp_path / "all"], tmp_path / "again")
    assert again["metrics"] == merged["metrics"]
    assert again["sources"] == merged["sources"]


def test_merge_refuses_conflicts_and_overwriting(tmp_path):
    one, two = write_vqa(tmp_path / "one"), write_vqa(tmp_path / "two")
    text = (two / "report.json").read_text()
    (two / "report.json").write_text(text.replace("58.0", "57.0"))
    with pytest.raises(InputError, match=r"two/report\.json.*vqa/accuracy: 58\.0 % and 57\.0 %"):
        report.merge_reports([one, two], tmp_path / "all")
    assert not (tmp_path / "all" / "report.json").exists()
    with pytest.raises(InputError, match="would overwrite"):
        report.merge_reports([one], one)
    with pytest.raises(InputError, match="no report to merge"):
        report.merge_reports([], one)


def test_table_is_aligned():
    metrics = {"vqa/accuracy": 58.25, "itm/roc_auc": 0.9811, "n": 12345, "rank": 1.5}
    units = {"vqa/accuracy": "percent", "itm/roc_auc": "fraction", "n": "count", "rank": "count"}
    assert report.format_table(metrics, units).split("\n") == [
        "vqa/accuracy    58.2 %",
        "itm/roc_auc    0.981",
        "n             12,345",
        "rank             1.5",
    ]
    assert report.format_table({}, {}) == ""


@pytest.fixture(scope="module")
def drawn(tmp_path_factory):
    """The page of a report with every section."""
    tmp_path = tmp_path_factory.mktemp("page")
    folders = [write_retrieval(tmp_path / "retrieval"), write_vqa(tmp_path / "vqa")]
    merged = report.merge_reports(folders, tmp_path / "all")
    logs = {"pre-training <1>": write_log(tmp_path / "train")}
    return page.write_page(merged, tmp_path / "all", logs, tmp_path / "page.html").read_text()


def test_page_has_every_section(drawn):
    for anchor in ("retrieval", "answers", "matching", "attention", "curves", "metrics"):
        assert drawn.count(f'<section id="{anchor}">') == 1
        assert drawn.count(f'href="#{anchor}"') == 1
    assert "chance 0.2 %, so 100 × chance" in drawn
    assert "from the question alone 31.0 %" in drawn
    assert "+27.0 points" in drawn
    assert "rank 1,234" in drawn
    assert "✗ wrong" in drawn
    assert "from the question alone: green (40 %)" in drawn
    assert "runs/a</code> at step 1,260" in drawn
    # Only words that say something get a map: no [CLS], no article, no full stop.
    assert re.findall(r"attention of “(.*?)”", drawn) == ["circle", "##s"]
    assert drawn.count("<svg") == 3
    assert "masked language loss" in drawn
    assert "eval 7.5 at step 2" in drawn


def test_page_is_self_contained(drawn):
    # Inside a drawing, url(#…) names a part of that drawing.
    assert not re.search("https?://|@import|url\\((?!#)|<link", drawn)
    images = re.findall(r'src="(.*?)"', drawn)
    assert len(images) == 5 + 6 + 1 + 1 + 3  # found, missed, vqa, matching, attention
    assert all(image.startswith("data:image/jpeg;base64,") for image in images)
    assert all('alt="' in tag for tag in re.findall("<img.*?>", drawn))


def test_page_escapes_what_others_wrote(drawn):
    assert drawn.count("<script>") == 1  # the page's own
    assert drawn.count("&lt;script&gt;alert(1)&lt;/script&gt; &amp; &quot;circle&quot;") == 3
    assert "the &lt;b&gt; circle" in drawn
    assert "red, &lt;i&gt;" in drawn
    assert "pre-training &lt;1&gt;" in drawn
    assert "&quot;note&quot;: &quot;&lt;b&gt;&quot;" in drawn


def test_page_leaves_out_what_there_is_not(tmp_path):
    read = report.read_report(write_vqa(tmp_path))
    text = page.write_page(read, tmp_path, {}, tmp_path / "report.html").read_text()
    assert re.findall(r'<section id="(\w+)">', text) == ["answers", "metrics"]
    assert text.count('class="card"') == 1
    assert "<svg" not in text


def test_page_names_a_broken_picture(tmp_path):
    read = report.read_report(write_vqa(tmp_path))
    path = tmp_path / "pictures" / "scene-0.png"
    path.write_bytes(path.read_bytes()[:40])
    with pytest.raises(InputError, match=r"scene-0\.png: this picture cannot be decoded"):
        page.write_page(read, tmp_path, {}, tmp_path / "report.html")


def test_overlay_is_bright_where_attention_is_strong():
    grey = page.Image.new("RGB", (64, 64), (128, 128, 128))
    pixels = np.asarray(page._overlay(grey, np.array([[0.0, 0.0], [0.0, 0.4]]))).sum(-1)
    assert pixels[56, 56] > 2 * pixels[8, 8]
    flat = np.asarray(page._overlay(grey, np.zeros((2, 2))))  # nothing attended to: no NaN
    assert (flat == flat[0, 0]).all()


def test_log_of_a_resumed_run(tmp_path):
    text = '{"step": 1, "train/loss": 5}\n{"step": 2, "train/loss": 4, "train/learning_rate": 1}\n'
    text += '{"step": 2, "train/loss": 3, "train/a/loss": NaN}\n{"step": 3, "train/lo'
    read = curves.read_curves(write_log(tmp_path / "resumed", text))
    assert read["loss"] == {"train": {1: 5.0, 2: 3.0}}
    assert read.keys() == {"loss", "a/loss"}
    assert "<svg" in curves.draw_curves(read["a/loss"], label="", salt="")


def test_bad_logs_are_refused_by_name(tmp_path):
    with pytest.raises(InputError, match=r"metrics\.jsonl: there is no log here"):
        curves.read_curves(tmp_path / "metrics.jsonl")
    bad_lines = ("{", "[]", '{"train/loss": 1}', '{"step": 1, "train/loss": {}}')
    for number, line in enumerate(bad_lines):
        log = write_log(tmp_path / str(number), f'{{"step": 0}}\n{line}\n')
        with pytest.raises(InputError, match=r"metrics\.jsonl, line 2: expected"):
            curves.read_curves(log)


def test_command_line(tmp_path, capsys):
    folders = f"{write_retrieval(tmp_path / 'retrieval')},{write_vqa(tmp_path / 'vqa')}"
    log = write_log(tmp_path / "train")
    output = tmp_path / "all"
    arguments = [f"--output={output}", f"--reports={folders}", f"--logs=training={log.parent}"]
    assert report.main(arguments) == 0
    assert "itm/roc_auc" in capsys.readouterr().out
    assert "training" in (output / "report.html").read_text()
    assert report.main([*arguments[:2], "--logs=training"]) == 2
    assert "expected NAME=WORKDIR, found 'training'" in capsys.readouterr().err
    assert report.main([arguments[0], f"--reports={tmp_path / 'nowhere'}"]) == 2
    assert "there is no report here" in capsys.readouterr().err


def test_help_explains_itself_and_draws_nothing():
    command = [sys.executable, "-m", "mmjax.evaluation.report", "--help"]
    text = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    assert all(word in text for word in ("--output", "--reports", "--logs", "report.html"))
