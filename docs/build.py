"""Write the generated parts of the documents from the recorded reports in docs/results/.

    python docs/build.py                                  # rewrite the marked parts
    python docs/build.py --record=quickstart=runs/quickstart   # record a report first
    python docs/build.py --parity=FOLDER                  # keep what the parity tests measured
    python docs/build.py --check                          # exit 1 where a document is stale

A generated part stands between `<!-- NAME -->` and `<!-- /NAME -->`.
"""

import argparse
import dataclasses
import importlib
import inspect
import json
import math
import re
import sys
import typing
from pathlib import Path
from typing import Any

import jax

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # for the recipes

from mmjax.evaluation.report import format_value, read_report, sources
from mmjax.objectives import OBJECTIVES, Masking
from mmjax.objectives.adversarial import Adversarial
from mmjax.weights.families import FAMILIES
from mmjax.weights.family import Source

DOCS = Path(__file__).resolve().parent
RESULTS = DOCS / "results"
DOCUMENTS = (
    DOCS.parent / "README.md",
    *(DOCS / name for name in ("results.md", "models.md", "objectives.md")),
)
PARITY = DOCS / "parity.json"

# Families that an empty config.json describes.
SIZED = (
    *("vit", "swin", "resnet", "bert", "gpt2", "clip", "siglip", "align"),
    *("lxmert", "bridgetower", "visual_bert", "vilt", "flava"),
)

# What the README shows of a report: metric, what to call it, and the metric beside it.
HEADLINES = {
    "quickstart": [
        ("retrieval/image_to_text/R@1", "Retrieval, image → text, R@1 of 500", "chance"),
        ("retrieval/text_to_image/R@1", "Retrieval, text → image, R@1 of 500", "chance"),
        ("retrieval/reranked/image_to_text/R@1", "… re-ranked by ITM, image → text", "chance"),
        ("retrieval/reranked/text_to_image/R@1", "… re-ranked by ITM, text → image", "chance"),
        ("itm/roc_auc", "Image-text matching, ROC-AUC", "0.5"),
        ("vqa/accuracy", "Visual question answering, accuracy", "vqa/question_only_accuracy"),
    ]
}


def record(name: str, folder: Path) -> None:
    """Keep a report's numbers (not its examples) in docs/results/NAME.json."""
    report = read_report(folder)
    kept = {
        "metrics": report["metrics"],
        "units": report["units"],
        "sources": [
            {"checkpoint": source["checkpoint"], "step": source["step"]}
            for source in sources(report)
        ],
    }
    RESULTS.mkdir(exist_ok=True)
    (RESULTS / f"{name}.json").write_text(json.dumps(kept, indent=1, sort_keys=True) + "\n")


def headline_table(name: str) -> str:
    """The few numbers that matter, with what a model that knows nothing would get."""
    report = _recorded(name)
    lines = ["| on held-out scenes | score | baseline |", "|---|---|---|"]
    for metric, title, baseline in HEADLINES[name]:
        if baseline == "chance":
            chance = 100 / report["metrics"]["retrieval/gallery_size"]
            beside = f"{chance:.1f} % (chance)"
        elif baseline in report["metrics"]:
            beside = f"{_value(report, baseline)} (trained on the questions alone)"
        else:
            beside = f"{baseline} (chance)"
        lines.append(f"| {title} | {_value(report, metric)} | {beside} |")
    return "\n".join(lines)


def full_table(name: str) -> str:
    """Every metric of a report."""
    report = _recorded(name)
    rows = [f"| `{metric}` | {_value(report, metric)} |" for metric in sorted(report["metrics"])]
    return "\n".join(["| metric | value |", "|---|---|", *rows])


def record_parity(folder: Path) -> None:
    """Keep what the tests measured of every case (MMJAX_PARITY_RECORDS=FOLDER make parity)."""
    records = {path.stem: json.loads(path.read_text()) for path in sorted(folder.glob("*.json"))}
    PARITY.write_text(json.dumps(records, indent=1, sort_keys=True) + "\n")


def parity_table(_: str) -> str:
    """The worst differences of every case, and what it was compared with."""
    lines = ["| case | compared with | outputs | gradients |", "|---|---|---|---|"]
    for case, record in json.loads(PARITY.read_text()).items():
        cells = [f"{record[key]:.0e}" if key in record else "" for key in ("outputs", "gradients")]
        lines.append(f"| {case} | {record['against']} | {' | '.join(cells)} |")
    return "\n".join(lines)


def sizes_table(_: str) -> str:
    """Parameters at the configuration of an empty config.json, without heads."""
    lines = ["| family | parameters |", "|---|---|"]
    for name in SIZED:
        family = FAMILIES[name]
        assert family.read is not None
        config = family.read(Source({}, [], "config.json"))
        count = sum(math.prod(leaf.shape) for leaf in jax.tree.leaves(family.abstract(config)))
        lines.append(f"| {name} | {count / 1e6:.0f} M |")
    return "\n".join(lines)


def fields_tables(_: str) -> str:
    """The fields of every config dataclass: name, default, and the comment beside it."""
    return "\n\n".join(_fields_table(cls) for cls in config_classes())


def _fields_table(cls: type) -> str:
    comments = {}
    for owner in reversed(cls.__mro__[:-1]):
        for line in inspect.getsource(owner).splitlines():
            if found := re.match(r"    (\w+): ([^=#]+?)(?: = .+?)?(?:  # (.*))?$", line):
                kept = comments.get(found[1], ("", ""))[1]
                comments[found[1]] = (found[2], found[3] or kept)
    lines = [f"**{cls.__name__}**\n", "| field | type | default | |", "|---|---|---|---|"]
    for field in dataclasses.fields(cls):
        default = f"`{field.default!r}`"
        if field.default is dataclasses.MISSING:
            has_default = field.default_factory is not dataclasses.MISSING
            default = "its own defaults" if has_default else "required"
        kind, comment = comments[field.name]
        kind = kind.replace("|", "or")
        lines.append(f"| `{field.name}` | {kind} | {default} | {comment} |")
    return "\n".join(lines)


def objectives_table(_: str) -> str:
    """Every objective: formula, source, the test that holds it, and the recipes that use it."""
    lines = [
        "| objective | formula | source | reference test | recipes |",
        "|---|---|---|---|---|",
    ]
    used = recipes_by_objective()
    for name, objective in {**OBJECTIVES, "adversarial": Adversarial}.items():
        module = objective.__module__.rpartition(".")[2]
        test = f"tests/objectives/test_{module}.py"
        assert (DOCS.parent / test).exists(), f"{name} has no {test}"
        formula, source = (x.replace("|", "\\|") for x in (objective.formula, objective.source))
        cells = [f"`{name}`", formula, source, f"[{module}](../{test})", ", ".join(used[name])]
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def options_tables(_: str) -> str:
    """The options of every objective, and of the masks that they share."""
    return "\n\n".join(
        _fields_table(cls)
        for cls in (*OBJECTIVES.values(), Masking, Adversarial)
        if len(dataclasses.fields(cls)) > 1
    )


def recipes_by_objective() -> dict[str, list[str]]:
    """The files of configs/pretrain and configs/finetune that give each objective a weight."""
    used: dict[str, list[str]] = {name: [] for name in (*OBJECTIVES, "adversarial")}
    for path in sorted(DOCS.parent.glob("configs/*/*.py")):
        if path.parent.name not in ("pretrain", "finetune"):
            continue
        recipe = importlib.import_module(f"configs.{path.parent.name}.{path.stem}").get_config()
        names = [name for name, options in recipe.objectives.items() if options.weight > 0]
        names += ["adversarial"] if recipe.adversarial.steps else []
        for name in names:
            used[name].append(f"[{path.stem}](../configs/{path.parent.name}/{path.name})")
    return used


def config_classes() -> list[type]:
    """The config dataclasses of all families and those nested in them."""
    found: dict[type, None] = {}
    waiting = [family.config for family in FAMILIES.values()]
    while waiting:
        cls = waiting.pop(0)
        if dataclasses.is_dataclass(cls) and cls not in found:
            found[cls] = None
            hints = typing.get_type_hints(cls).values()
            waiting += [part for hint in hints for part in typing.get_args(hint) or (hint,)]
    return list(found)


def rebuilt(text: str) -> str:
    """A document with its generated parts made anew."""
    parts = {f"headline:{name}": headline_table for name in HEADLINES}
    parts |= {f"table:{path.stem}": full_table for path in RESULTS.glob("*.json")}
    parts |= {"parity:all": parity_table, "sizes:all": sizes_table, "fields:all": fields_tables}
    parts |= {"objectives:all": objectives_table, "options:all": options_tables}
    for marker, make in parts.items():
        pattern = rf"(<!-- {marker} -->\n).*?(<!-- /{marker} -->)"
        if not re.search(pattern, text, flags=re.DOTALL):
            continue
        body = make(marker.split(":")[1])
        text = re.sub(pattern, lambda m, body=body: f"{m[1]}{body}\n{m[2]}", text, flags=re.DOTALL)
    return text


def _recorded(name: str) -> dict[str, Any]:
    return json.loads((RESULTS / f"{name}.json").read_text())


def _value(report: dict[str, Any], metric: str) -> str:
    return format_value(report["metrics"][metric], report["units"][metric])


def main() -> int:
    """Parse the arguments and write, or check, the documents."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--record", metavar="NAME=FOLDER", help="record this report first")
    parser.add_argument("--check", action="store_true", help="write nothing")
    parser.add_argument("--parity", metavar="FOLDER", help="keep what the parity tests measured")
    arguments = parser.parse_args()
    if arguments.parity:
        record_parity(Path(arguments.parity))
    if arguments.record:
        name, _, folder = arguments.record.partition("=")
        record(name, Path(folder))
    stale = [path for path in DOCUMENTS if rebuilt(path.read_text()) != path.read_text()]
    for path in stale:
        if not arguments.check:
            path.write_text(rebuilt(path.read_text()))
        print(f"{path.relative_to(DOCS.parent)}: {'stale' if arguments.check else 'rewritten'}")
    return 1 if stale and arguments.check else 0


if __name__ == "__main__":
    sys.exit(main())
