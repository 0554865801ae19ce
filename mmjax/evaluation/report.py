"""`report.json`: what an evaluation found, written, read, merged and printed.

A report is a folder: `report.json` with `metrics`, their `units`, `examples`, and what was scored
(`checkpoint`, `step`, `config`; a merged report has a list of these instead, `sources`), and
`pictures/` with the pictures that the examples name.

    python -m mmjax.evaluation.report --output=DIR --reports=DIR,DIR --logs=NAME=WORKDIR

merges reports into one and draws `report.html` from it.
"""

import argparse
import dataclasses
import json
import math
import os
import re
import shutil
import sys
import typing
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import UInt8
from PIL import Image

from mmjax.errors import InputError
from mmjax.evaluation.metrics import Unit

Report = dict[str, Any]


@dataclasses.dataclass(frozen=True)
class Result:
    """What one evaluation found.

    Args:
      metrics: flat names with slashes to finite numbers.
      units: the same names, each to its unit.
      examples: by section (`retrieval`, `matching`, `vqa`, `attention`) what the page shows.

    Raises:
      InputError: a metric without a unit, a unit without a metric, an unknown unit, or a metric
        that is no finite number.
    """

    metrics: dict[str, float]
    units: dict[str, Unit]
    examples: dict[str, list[dict[str, Any]]] = dataclasses.field(default_factory=dict)

    def __post_init__(self) -> None:
        unpaired = sorted(self.metrics.keys() ^ self.units.keys())
        if unpaired:
            raise InputError(f"metrics and units must have the same names; not so {unpaired}")
        for name, unit in self.units.items():
            if unit not in typing.get_args(Unit):
                raise InputError(
                    f"the unit of {name} is {unit!r}; it must be one of {typing.get_args(Unit)}"
                )
        for name, value in self.metrics.items():
            if isinstance(value, bool) or not isinstance(value, int | float | np.number):
                raise InputError(f"the metric {name} must be a number, found {value!r}")
            if not math.isfinite(value):
                raise InputError(f"the metric {name} is {value}; has the model diverged?")

    def merge(self, other: "Result") -> "Result":
        """Both results as one; examples of the same section follow each other.

        Raises:
          InputError: both have a metric of the same name, with another value or unit.
        """
        for name in self.metrics.keys() & other.metrics.keys():
            one, two = ((r.metrics[name], r.units[name]) for r in (self, other))
            if one != two:
                raise InputError(
                    f"two results disagree on {name}: {format_value(*one)} and "
                    f"{format_value(*two)}; merge results of different evaluations only"
                )
        sections = [*self.examples, *(name for name in other.examples if name not in self.examples)]
        return Result(
            self.metrics | other.metrics,
            self.units | other.units,
            {s: self.examples.get(s, []) + other.examples.get(s, []) for s in sections},
        )


def save_picture(folder: Path, picture: UInt8[np.ndarray, "height width 3"], name: str) -> str:
    """Writes `folder/pictures/NAME.png` and returns that path relative to the report's folder."""
    if picture.dtype != np.uint8 or picture.ndim != 3 or picture.shape[-1] != 3:
        raise ValueError(f"a picture is uint8 [H,W,3], found {picture.dtype} {picture.shape}")
    if not re.fullmatch(r"[\w-]+", name):
        raise ValueError(f"a picture's name has letters, digits, - and _ only, found {name!r}")
    path = Path(folder) / "pictures" / f"{name}.png"
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(picture).save(path)
    return path.relative_to(folder).as_posix()


def write_report(
    folder: Path, result: Result, *, checkpoint: str, step: int, config: dict[str, Any]
) -> Path:
    """Writes `folder/report.json` at once or not at all, and returns its path.

    Args:
      folder: the report's folder, where `save_picture` has put the pictures of the examples.
      result: what was found.
      checkpoint: the folder of the checkpoint that was scored.
      step: the training step of that checkpoint.
      config: the resolved config of the evaluation, of what JSON can say.
    """
    source = {"checkpoint": checkpoint, "step": int(step), "config": config}
    return _write(Path(folder), result, source)


def read_report(folder: Path) -> Report:
    """Reads and checks `folder/report.json`.

    Raises:
      InputError: there is no report, it is no whole JSON, a key is missing or of another type, or
        an example names a picture that is not in the folder.
    """
    path = Path(folder) / "report.json"
    if not path.is_file():
        raise InputError(
            f"{path}: there is no report here; write one with "
            f"`python eval.py --checkpoint=… --config=… --output={folder}`"
        )
    try:
        report = json.loads(path.read_text("utf-8"))
    except ValueError as error:
        raise InputError(f"{path}: not valid JSON ({error}); run eval.py again") from error
    if not isinstance(report, dict):
        raise InputError(f"{path}: expected a JSON object, found a {type(report).__name__}")
    try:
        _check_keys(report, {"metrics": dict, "units": dict, "examples": dict})
        for source in sources(report):
            _check_keys(source, {"checkpoint": str, "step": int, "config": dict})
        _result(report)
    except InputError as error:
        raise InputError(f"{path}: {error}") from error
    _map_pictures(report["examples"], lambda picture: str(picture_path(folder, picture)))
    return report


def sources(report: Report) -> list[dict[str, Any]]:
    """What was scored: checkpoint, step and config, one per evaluation that the report merges."""
    own = {key: report[key] for key in ("checkpoint", "step", "config") if key in report}
    return report.get("sources", [own])


def picture_path(folder: Path, picture: str) -> Path:
    """The file that an example's `picture` names.

    Raises:
      InputError: it is not there, or lies outside the report's folder.
    """
    path = Path(folder) / picture
    if not path.is_file() or not path.resolve().is_relative_to(Path(folder).resolve()):
        raise InputError(
            f"{Path(folder) / 'report.json'}: an example names the picture {picture!r}, which is "
            "not in the report's folder; keep the folder together, or run eval.py again"
        )
    return path


def merge_reports(folders: Sequence[Path], output: Path) -> Report:
    """Merges the reports of several evaluations, and their pictures, into `output`.

    Raises:
      InputError: two reports disagree on a metric, `folders` is empty, or `output` is one of them.
    """
    output = Path(output)
    if not folders:
        raise InputError(f"{output}: there is no report to merge; name at least one folder")
    if output.resolve() in [Path(folder).resolve() for folder in folders]:
        raise InputError(f"{output}: the merged report would overwrite one of those it merges")
    merged, all_sources = Result({}, {}), []
    for number, folder in enumerate(map(Path, folders)):
        report = read_report(folder)

        def copy(picture: str, folder: Path = folder, number: int = number) -> str:
            # Evaluations name their pictures alike: the number keeps them apart.
            name = Path("pictures") / f"{number}-{Path(picture).name}"
            (output / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(picture_path(folder, picture), output / name)
            return name.as_posix()

        report["examples"] = _map_pictures(report["examples"], copy)
        try:
            merged = merged.merge(_result(report))
        except InputError as error:
            raise InputError(f"{folder / 'report.json'}: {error}") from error
        all_sources += sources(report)
    _write(output, merged, {"sources": all_sources})
    return read_report(output)


def format_value(value: float, unit: str) -> str:
    """A metric as people read it: `25.4 %`, `0.983`, `1,000`."""
    if unit == "percent":
        return f"{value:.1f} %"
    return f"{value:.3f}" if unit == "fraction" else f"{value:,.10g}"


def format_table(metrics: Mapping[str, float], units: Mapping[str, str]) -> str:
    """The metrics as lines for the terminal, names to the left, numbers aligned to the right."""
    values = {name: format_value(value, units[name]) for name, value in metrics.items()}
    # The percent sign stands apart, so that the digits of all units end in one column.
    digits = {name: value.removesuffix(" %") for name, value in values.items()}
    left = max(map(len, values), default=0)
    right = max(map(len, digits.values()), default=0)
    return "\n".join(
        f"{name:<{left}}  {digits[name]:>{right}}{values[name].removeprefix(digits[name])}"
        for name in values
    )


def write_atomically(path: Path, text: str) -> Path:
    """Writes a text file so that a reader finds the old one or the new one, never half of it."""
    path.parent.mkdir(parents=True, exist_ok=True)
    unfinished = path.with_name(path.name + ".tmp")
    unfinished.write_text(text, "utf-8")
    os.replace(unfinished, path)
    return path


def _write(folder: Path, result: Result, source: dict[str, Any]) -> Path:
    report = {
        "metrics": {name: float(value) for name, value in result.metrics.items()},
        "units": result.units,
        **source,
        "examples": result.examples,
    }
    text = json.dumps(report, indent=1, ensure_ascii=False, allow_nan=False)
    return write_atomically(folder / "report.json", text + "\n")


def _check_keys(values: dict[str, Any], kinds: dict[str, type]) -> None:
    for key, kind in kinds.items():
        if not isinstance(values.get(key), kind):
            found = repr(values[key])[:60] if key in values else "no such key"
            raise InputError(f"{key!r} must be a {kind.__name__}, found {found}; run eval.py again")


def _result(report: Report) -> Result:
    return Result(report["metrics"], report["units"], report["examples"])


def _map_pictures(examples: Any, function: Callable[[str], str]) -> Any:
    """The examples with `function` applied to every value of a key `picture`, however deep."""
    if isinstance(examples, list):
        return [_map_pictures(item, function) for item in examples]
    if isinstance(examples, dict):
        return {
            key: function(value) if key == "picture" else _map_pictures(value, function)
            for key, value in examples.items()
        }
    return examples


def main(arguments: Sequence[str] | None = None) -> int:
    """The command line; returns the exit status."""
    from mmjax.evaluation.page import write_page  # which itself stands on this module

    parser = argparse.ArgumentParser(
        prog="python -m mmjax.evaluation.report",
        description="Merges the reports of several evaluations into OUTPUT/report.json and draws "
        "OUTPUT/report.html: one file, pictures and curves inside, that opens in any browser.",
        epilog="example: python -m mmjax.evaluation.report --output=runs/quickstart "
        "--reports=runs/quickstart/retrieval,runs/quickstart/vqa "
        "--logs=pre-training=runs/quickstart/pretrain,fine-tuning=runs/quickstart/finetune",
    )
    parser.add_argument("--output", type=Path, required=True, help="folder to write to")
    parser.add_argument(
        "--reports",
        required=True,
        metavar="DIR,DIR",
        help="folders that eval.py wrote (--output), each with its report.json",
    )
    parser.add_argument(
        "--logs",
        default="",
        metavar="NAME=WORKDIR,…",
        help="working directories of train.py, whose metrics.jsonl gives the curves, "
        "each after the name it shall have on the page",
    )
    options = parser.parse_args(arguments)
    try:
        logs = {}
        for item in filter(None, options.logs.split(",")):
            name, equals, workdir = item.partition("=")
            if not (name and equals and workdir):
                raise InputError(f"--logs: expected NAME=WORKDIR, found {item!r}")
            logs[name] = Path(workdir) / "metrics.jsonl"
        folders = [Path(folder) for folder in options.reports.split(",") if folder]
        report = merge_reports(folders, options.output)
        written = write_page(report, options.output, logs, options.output / "report.html")
    except InputError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    print(format_table(report["metrics"], report["units"]))
    print(f"\n{written}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
