"""Learning curves: a log of train.py, read and drawn as SVG."""

import io
import json
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from mmjax.errors import InputError

# A curve is step -> value; those of one panel are told apart by their split ("train", …).
Splits = dict[str, dict[int, float]]

# Inks that stand for a colour of the page, so that the curves follow light and dark.
MUTED, LINE, TRAINING, VALIDATION = "#010101", "#020202", "#030303", "#040404"
INKS = {MUTED: "muted", LINE: "line", TRAINING: "accent", VALIDATION: "second"}


def read_curves(log: Path) -> dict[str, Splits]:
    """Every loss, and the scores of validation, from a `metrics.jsonl`.

    Returns:
      By measure (`loss` is the total, then `contrastive/loss`, …, then scores) and split the value
      at each step. Where a resumed run has logged a step again, the later line wins.

    Raises:
      InputError: the log is absent, or a finished line is no JSON object with a step.
    """
    if not log.is_file():
        raise InputError(f"{log}: there is no log here; name the --workdir of a train.py run")
    curves: dict[str, Splits] = {}
    # What follows the last line end is a line that a stopped run has not finished.
    for number, line in enumerate(log.read_text("utf-8").split("\n")[:-1], start=1):
        try:
            entry = json.loads(line)
            step = int(entry.pop("step"))
            losses_and_scores = {k: float(v) for k, v in entry.items() if _is_drawn(k)}
        except (ValueError, AttributeError, KeyError, TypeError) as error:
            raise InputError(
                f"{log}, line {number}: expected a JSON object with a step and numbers, found "
                f"{line[:60]!r}; delete that line"
            ) from error
        for key, value in losses_and_scores.items():
            split, _, measure = key.partition("/")
            curves.setdefault(measure, {}).setdefault(split, {})[step] = value
    losses = [curve for measure, curve in curves.items() if measure.endswith("loss")]
    if len(losses) == 2 and losses[0] == losses[1]:
        del curves["loss"]  # a single objective is the total
    order = sorted(curves, key=lambda name: (name != "loss", not name.endswith("loss"), name))
    return {measure: curves[measure] for measure in order}


def _is_drawn(key: str) -> bool:
    split, _, measure = key.partition("/")
    is_score = measure.endswith(("/R@1", "/accuracy", "/roc_auc"))
    return measure.split("/")[-1] == "loss" or (is_score and split != "train")


def draw_curves(splits: Splits, *, label: str, salt: str) -> str:
    """One panel as an `<svg>` element for a page that defines the colours `INKS` names.

    Training is drawn faint and, smoothed, strong; every other split as it is. The y axis is
    logarithmic where values span more than a factor of 30.

    Args:
      splits: what to draw.
      label: what the panel shows, for those who cannot see it, as escaped HTML.
      salt: a text no other panel of the page has; it keeps the names inside the SVG apart.
    """
    import matplotlib  # half a second, and only a page with curves needs it
    from matplotlib.figure import Figure

    style: dict[Any, Any] = {
        "svg.fonttype": "none",
        "svg.hashsalt": salt,
        "font.size": 9,
        "axes.edgecolor": LINE,
        "axes.labelcolor": MUTED,
        "axes.spines.top": False,
        "axes.spines.right": False,
        "xtick.color": LINE,
        "ytick.color": LINE,
        "xtick.labelcolor": MUTED,
        "ytick.labelcolor": MUTED,
        "grid.color": LINE,
    }
    with matplotlib.rc_context(style):
        figure = Figure(figsize=(3.6, 2.2), layout="constrained")
        axes = figure.add_subplot()
        for split, points in splits.items():
            steps = np.array(sorted(points))
            values = np.array([points[step] for step in steps])
            if split == "train":
                window = max(1, len(values) // 25)
                mean = np.convolve(values, np.ones(window) / window, "valid")
                middle = steps[(window - 1) // 2 :][: len(mean)]
                axes.plot(steps, values, color=TRAINING, linewidth=0.8, alpha=0.3)
                axes.plot(middle, mean, color=TRAINING, linewidth=1.8, label="train, smoothed")
            else:
                axes.plot(steps, values, "o-", color=VALIDATION, markersize=3.5, label=split)
        if _spans_decades(splits):
            axes.set_yscale("log")
            axes.yaxis.set_major_formatter("{x:g}")
        axes.set_xlabel("step")
        axes.grid(axis="y", linewidth=0.6)
        if len(splits) > 1:
            axes.legend(frameon=False, fontsize=8, labelcolor=MUTED)
        buffer = io.StringIO()
        figure.savefig(buffer, format="svg", transparent=True, metadata={"Date": None})
    return _embeddable(buffer.getvalue(), label)


def _spans_decades(splits: Mapping[str, Mapping[int, float]]) -> bool:
    values = np.concatenate([list(points.values()) for points in splits.values()])
    values = values[np.isfinite(values)]
    return bool(values.size) and values.min() > 0 and values.max() > 30 * values.min()


def _embeddable(svg: str, label: str) -> str:
    """An SVG document as an element of a page: without what only a file of its own needs."""
    svg = svg[svg.index("<svg") :]
    svg = re.sub(r"<metadata>.*?</metadata>", "", svg, flags=re.DOTALL)
    svg = re.sub(r' xmlns(:xlink)?="[^"]*"| (width|height)="[\d.]+pt"', "", svg)
    svg = re.sub(r'<g id="[^"]*"', "<g", svg)
    for ink, colour in INKS.items():
        svg = svg.replace(ink, f"var(--{colour})")
    return svg.replace("<svg", f'<svg role="img" aria-label="{label}"', 1)
