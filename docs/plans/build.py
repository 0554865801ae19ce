"""Record the plans of the flagship recipes, and write the page that lists them.

    python docs/plans/build.py                    # all of them: many minutes each
    python docs/plans/build.py --only=siglip_b16  # those with this in their name
    python docs/plans/build.py --page             # the page alone, from what is recorded

A plan is one command, printed before it runs; it needs pip install -e '.[plan]' and no TPU.
"""

import argparse
import json
import shlex
import subprocess
import sys
from pathlib import Path
from typing import Any

HERE = Path(__file__).resolve().parent
ROOT = HERE.parents[1]
PAGE = HERE / "README.md"
RECIPES = ("siglip_b16", "clip_b16", "coattention_b16")
TOPOLOGIES = ("v5e:16x16", "v5p:4x4x4", "v6e:16x16")

HEADER = """\
# Recorded plans

What the TPU compiler says of the flagship recipes; nothing here was measured. How to read a plan:
`docs/plan.md`. Written by `python docs/plans/build.py`, which runs for every row

    python -m mmjax.plan --config=configs/pretrain/RECIPE.py --topology=TOPOLOGY --schedules

| recipe | topology | chips | HBM of a chip, GiB | cycles, M: floor - estimate | MFU | plan |
|---|---|---|---|---|---|---|
"""


def names() -> dict[str, tuple[str, str]]:
    """Recipe and topology of every plan by its name."""
    return {
        f"{recipe}_{topology.replace(':', '_')}": (recipe, topology)
        for recipe in RECIPES
        for topology in TOPOLOGIES
    }


def record(name: str) -> None:
    """Compile one recipe for one topology, and keep what comes of it."""
    recipe, topology = names()[name]
    command = [
        *(sys.executable, "-m", "mmjax.plan", f"--config=configs/pretrain/{recipe}.py"),
        *(f"--topology={topology}", "--schedules", f"--save_plan={HERE / name}"),
    ]
    print(shlex.join(command), flush=True)
    subprocess.run(command, cwd=ROOT, check=True, stdout=subprocess.DEVNULL)


def page() -> str:
    """The page, from the plans that are recorded."""
    paths = {name: HERE / f"{name}.json" for name in names()}
    rows = [row(name, json.loads(p.read_text())) for name, p in paths.items() if p.exists()]
    return HEADER + "".join(rows)


def row(name: str, plan: dict[str, Any]) -> str:
    """A plan's line of the table."""
    memory, cycles, mfu = plan["hbm_bytes"], plan["cycles"], plan["mfu"]
    hbm = f"{memory['peak'] / 2**30:.1f} of {memory['limit'] / 2**30:.1f}"
    speed, share = "does not fit", ""
    if plan["fits"]:
        speed = f"{cycles['floor'] / 1e6:,.0f} - {cycles['estimate'] / 1e6:,.0f}"
        share = f"{mfu['low']:.2f} - {mfu['high']:.2f}"
    cells = [names()[name][0], plan["topology"], plan["chips"], hbm, speed, share]
    return f"| {' | '.join(map(str, cells))} | [{name}.txt]({name}.txt) |\n"


def main() -> None:
    """Record what is asked for, then write the page."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--only", default="", help="record the plans with this in their name")
    parser.add_argument("--page", action="store_true", help="record none")
    arguments = parser.parse_args()
    for name in [] if arguments.page else names():
        if arguments.only in name:
            record(name)
    PAGE.write_text(page())


if __name__ == "__main__":
    main()
