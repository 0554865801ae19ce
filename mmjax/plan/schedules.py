"""The schedule floor: a second reading of cycles, from the instructions of every kernel.

libtpu can be told to write down the final schedule of each kernel: bundles of instructions, of
which the chip issues one a cycle. An op then counts as the larger of the bundles that its kernel
issues and the bytes it moves to and from HBM over the chip's bytes a cycle. That is a floor:
stalls, on the matrix unit or on copies, are in neither.
"""

import os
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path

from mmjax.chips import Chip
from mmjax.plan.hlo import Module, Op
from mmjax.plan.totals import Reading
from mmjax.plan.traffic import traffic

_BUNDLE = re.compile(r"\s*(?:0x[0-9a-f]+|0)\s+(LB|LH|LE|PB|PF|CT)?\s*:")
_FILE = re.compile(r"\d+-(.+?)-\d+-final_bundles\.txt")


def record_schedules(folder: Path) -> None:
    """Tell libtpu to write its schedules there: before the first topology is asked for.

    libtpu reads this once, when it is loaded, so that it takes a process of its own.
    """
    os.environ["LIBTPU_INIT_ARGS"] = " ".join(
        [
            os.environ.get("LIBTPU_INIT_ARGS", ""),
            f"--xla_jf_dump_to={folder}",
            "--xla_jf_dump_llo_text=true",
            "--xla_jf_dump_llo_pass_label_regex=final_bundles|deduplication-map",
        ]
    ).strip()


def read_schedules(folder: Path) -> dict[str, int]:
    """Bundles that each op's kernel issues, by the op's name in the program.

    Of equal kernels libtpu compiles one, and says in a map whose else it is.
    """
    bundles = {
        found[1]: count_bundles(path.read_text().splitlines())
        for path in sorted(folder.glob("*-final_bundles.txt"))
        if (found := _FILE.fullmatch(path.name))
    }
    for path in folder.glob("*deduplication-map.txt"):
        for group in path.read_text().split("key:")[1:]:
            names = [line.strip() for line in group.splitlines() if line.startswith("  ")]
            known = [bundles[name] for name in names if name in bundles]
            for name in names if known else ():
                bundles.setdefault(name, known[0])
    return bundles


def count_bundles(lines: Iterable[str]) -> int:
    """Bundles that a kernel issues: each as often as the loops around it turn.

    A loop begins in a bundle marked LB and ends in the branch back to that bundle's region. Loops
    whose length is no constant count once, and what is skipped by a predicate as if it were not.
    """
    loops = [_Loop()]  # the kernel itself, then the loops that are open
    for line in lines:
        if not (bundle := _BUNDLE.match(line)):
            continue
        if bundle[1] == "LB":
            loops.append(_Loop(set(re.findall(r"Start region (\d+)", line))))
        loops[-1].bundles += 1
        if test := re.search(r", (\d+) /\* loop exit test \*/", line):
            loops[-1].turns = int(test[1])
        for region in re.findall(r"sbr\.rel (?:\(.*?\) )?target = \$region(\d+)", line):
            if region in loops[-1].regions:
                closed = loops.pop()
                loops[-1].bundles += closed.bundles * closed.turns
    return sum(loop.bundles for loop in loops)


@dataclass
class _Loop:
    regions: set[str] = field(default_factory=set)
    bundles: int = 0
    turns: int = 1


def floor_of(module: Module, schedules: Mapping[str, int], chip: Chip) -> Reading:
    """The reading of a program by its schedules; ops without a kernel keep their estimate."""
    bytes_per_cycle = chip.hbm_bandwidth / chip.devices / chip.clock

    def reading(op: Op) -> int | None:
        if op.name not in schedules:
            return op.estimate
        return max(schedules[op.name], round(traffic(module, op) / bytes_per_cycle))

    return reading


def with_kernels(floor: Reading) -> Reading:
    """The compiler's estimates, and for custom kernels, which have none, their schedules."""

    def reading(op: Op) -> int | None:
        return floor(op) if op.is_custom_kernel else op.estimate

    return reading
