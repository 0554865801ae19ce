"""Record the plans of the flagship recipes, and write the page that lists them.

    python docs/plans/build.py                    # all of them: many minutes each
    python docs/plans/build.py --only=siglip_b16  # those with this in their name
    python docs/plans/build.py --missing          # those that are not there
    python docs/plans/build.py --page             # the page alone, from what is recorded

A plan is one command, printed before it runs; it needs pip install -e '.[plan]' and no TPU.
"""

import argparse
import json
import shlex
import subprocess
import sys
from pathlib import Path
from typing import Any, NamedTuple

HERE = Path(__file__).resolve().parent
ROOT = HERE.parents[1]
PAGE = HERE / "README.md"


class Planned(NamedTuple):
    """A plan to record: a recipe on a topology, with overrides of its config."""

    name: str
    recipe: str
    topology: str
    overrides: tuple[str, ...] = ()

    @property
    def schedules(self) -> bool:
        """Whether it has the floor too; of one generation, as it takes as long again."""
        return self.topology.startswith("v5e")

    @property
    def flags(self) -> list[str]:
        """Of `python -m mmjax.plan`."""
        recipe = f"--config=configs/pretrain/{self.recipe}.py"
        overrides = (f"--config.{override}" for override in self.overrides)
        schedules = ["--schedules"] if self.schedules else []
        return [recipe, f"--topology={self.topology}", *overrides, *schedules]

    @property
    def path(self) -> Path:
        """Where its JSON lies."""
        return HERE / f"{self.name}.json"


PODS = [
    Planned(f"{recipe}_{topology.replace(':', '_')}", recipe, topology)
    for recipe in ("siglip_b16", "coattention_b16")
    for topology in ("v5e:16x16", "v5p:4x4x4", "v6e:16x16")
]

_PAIRS = "batch_size=512"
_FUSED = ("model.image.attention=fused", "model.text.attention=fused")
ALL_FUSED = (*_FUSED, "model.fusion.attention=fused")
# With our own attention kernels and without.
KERNELS = [
    Planned("siglip_b16_512", "siglip_b16", "v5e:2x2", (_PAIRS,)),
    Planned("siglip_b16_512_fused", "siglip_b16", "v5e:2x2", (_PAIRS, *_FUSED)),
    next(plan for plan in PODS if plan.name == "coattention_b16_v5e_16x16"),
    Planned("coattention_b16_v5e_16x16_fused", "coattention_b16", "v5e:16x16", ALL_FUSED),
]


def _of_both(*settings: str) -> tuple[str, ...]:
    return tuple(f"model.{tower}.{setting}" for tower in ("image", "text") for setting in settings)


_THREE_LAYERS = (_PAIRS, *_of_both("depth=3"))
# What each choice is worth: every line has those of the lines before it.
STEPS = {
    "scanned, all computed again, attention of all rows at once": _of_both(
        "remat=full", "unroll=False", "attention=einsum"
    ),
    "attention in slices that stay on the chip": _of_both("remat=full", "unroll=False"),
    "results of products stored": _of_both("unroll=False"),
    "layers unrolled: the recipe": (),
    "our own attention kernels": _FUSED,
}
CHOICES = [
    Planned(f"choice_{i}", "siglip_b16", "v5e:2x2", (*_THREE_LAYERS, *overrides))
    for i, overrides in enumerate(STEPS.values())
]
ALL = list(dict.fromkeys([*KERNELS, *CHOICES, *PODS]))

HEADER = """\
# Recorded plans

What the TPU compiler says of the flagship recipes; nothing here was measured. How to read a plan:
`docs/plan.md`. Written by `python docs/plans/build.py`, which runs for every row

    python -m mmjax.plan --config=configs/pretrain/RECIPE.py --topology=TOPOLOGY

and on a v5e `--schedules`, which adds the floor.

| recipe | topology | chips | pairs | HBM of a chip, GiB | M cycles: floor - estimate | MFU | plan |
|---|---|---|---|---|---|---|---|
"""

KERNELS_HEADER = """
## Our own attention kernels

`model.*.attention=fused` is off by default, because nobody has timed the kernels on a TPU yet.

| recipe | topology | pairs | attention | HBM, GiB | estimate, M | floor, M | MFU | plan |
|---|---|---|---|---|---|---|---|---|
"""

CHOICES_HEADER = """
## What each choice is worth

The same with three layers in each tower, so that it compiles in minutes; every line has the
choices of the lines before it.

| choice | needed of a chip's HBM, GiB | estimate, M cycles | floor, M cycles |
|---|---|---|---|
"""


def record(plan: Planned) -> None:
    """Compile one recipe for one topology, and keep what comes of it."""
    command = [sys.executable, "-m", "mmjax.plan", *plan.flags, f"--save_plan={HERE / plan.name}"]
    print(shlex.join(command), flush=True)
    subprocess.run(command, cwd=ROOT, check=True, stdout=subprocess.DEVNULL)


def page() -> str:
    """The page, from the plans that are recorded."""
    pods = [pod_row(plan, _read(plan)) for plan in PODS if plan.path.exists()]
    kernels = [kernels_row(plan, _read(plan)) for plan in KERNELS if plan.path.exists()]
    choices = [
        f"| {name} | {_sizes(_read(plan))} |\n"
        for name, plan in zip(STEPS, CHOICES, strict=True)
        if plan.path.exists()
    ]
    text = HEADER + "".join(pods)
    text += KERNELS_HEADER + "".join(kernels) if kernels else ""
    return text + (CHOICES_HEADER + "".join(choices) if choices else "")


def pod_row(planned: Planned, plan: dict[str, Any]) -> str:
    """A plan's line of the first table."""
    memory, cycles = plan["hbm_bytes"], plan["cycles"]
    hbm = f"{memory['peak'] / 2**30:.1f} of {memory['limit'] / 2**30:.1f}"
    speed = "does not fit"
    if plan["fits"]:
        floor = f"{cycles['floor'] / 1e6:,.0f} - " if planned.schedules else ""
        speed = f"{floor}{cycles['estimate'] / 1e6:,.0f}"
    cells = [planned.recipe, plan["topology"], plan["chips"], f"{plan['batch_size']:,}", hbm, speed]
    return f"| {' | '.join(map(str, [*cells, _mfu(plan)]))} | {_link(planned)} |\n"


def kernels_row(planned: Planned, plan: dict[str, Any]) -> str:
    """A plan's line of the second table."""
    attention = "fused" if set(_FUSED) <= set(planned.overrides) else "auto"
    what = [planned.recipe, plan["topology"], f"{plan['batch_size']:,}", attention]
    return f"| {' | '.join(what)} | {_sizes(plan)} | {_mfu(plan)} | {_link(planned)} |\n"


def _mfu(plan: dict[str, Any]) -> str:
    """By the readings that there are."""
    return " - ".join(f"{plan['mfu'][end]:.2f}" for end in ("low", "high") if plan["mfu"][end])


def _sizes(plan: dict[str, Any]) -> str:
    cycles = (f"{plan['cycles'][name] / 1e6:,.1f}" for name in ("estimate", "floor"))
    return " | ".join([f"{plan['hbm_bytes']['peak'] / 2**30:.2f}", *cycles])


def _link(planned: Planned) -> str:
    return f"[{planned.name}.txt]({planned.name}.txt)"


def _read(planned: Planned) -> dict[str, Any]:
    return json.loads(planned.path.read_text())


def main() -> None:
    """Record what is asked for, then write the page."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--only", default="", help="record the plans with this in their name")
    parser.add_argument("--missing", action="store_true", help="leave out what is recorded")
    parser.add_argument("--page", action="store_true", help="record none")
    arguments = parser.parse_args()
    for plan in [] if arguments.page else ALL:
        if arguments.only in plan.name and not (arguments.missing and plan.path.exists()):
            record(plan)
    PAGE.write_text(page())


if __name__ == "__main__":
    main()
