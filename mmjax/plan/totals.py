"""What a program costs on one device: cycles by part of the model, collectives, kernels.

The compiler notes on an op how many cycles it believes it takes: a crude number, by which it
chooses between layouts and fusions, and which leaves out all waiting. Whatever stands in a loop
counts as often as the loop turns.
"""

from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from typing import TypeVar

from mmjax.plan.hlo import Module, Op, Part, arrays_of, attribute_of, part_of

Key = TypeVar("Key")


@dataclass
class Totals:
    """What a computation costs on one device, everything it calls included."""

    cycles: Counter[Part] = field(default_factory=Counter)
    collective_bytes: Counter[str] = field(default_factory=Counter)
    collective_runs: Counter[str] = field(default_factory=Counter)
    kernels: Counter[str] = field(default_factory=Counter)  # runs of what has no cycles, by name
    kernel_cycles: Counter[str] = field(default_factory=Counter)  # of those that have, in `cycles`
    unread_loops: set[str] = field(default_factory=set)  # counted as if they turned once

    def add(self, other: "Totals", times: int = 1) -> None:
        """Add what is run so many times."""
        _add(self.cycles, other.cycles, times)
        _add(self.collective_bytes, other.collective_bytes, times)
        _add(self.collective_runs, other.collective_runs, times)
        _add(self.kernels, other.kernels, times)
        _add(self.kernel_cycles, other.kernel_cycles, times)
        self.unread_loops |= other.unread_loops


# Cycles of an op, None where nothing is known.
Reading = Callable[[Op], int | None]


def estimates(op: Op) -> int | None:
    """The reading that the compiler wrote down itself."""
    return op.estimate


def add_up(module: Module, reading: Reading = estimates) -> Totals:
    """What a step costs on one device, loops multiplied out; of branches the dearest counts."""
    return _Walk(module, reading).computation(module.entry)


@dataclass
class _Walk:
    module: Module
    reading: Reading

    def computation(self, name: str, scope: Part = ()) -> Totals:
        """The sum over a computation whose caller stands in `scope`."""
        totals, ops = Totals(), self.module.computations.get(name, ())
        for op in ops:
            self._add(op, _within(scope, part_of(op)), totals)
        for op in self._collectives(ops):
            _count_collective(op, totals)
        return totals

    def _add(self, op: Op, part: Part, totals: Totals) -> None:
        if op.opcode == "while":
            turns = self.module.trip_count(op)
            body = self.computation(attribute_of(op, "body"), part)
            totals.add(body, turns or 1)
            totals.unread_loops |= {op.name} if turns is None else set()
        elif op.opcode == "conditional":
            branches = [self.computation(name, part) for name in op.called()]
            totals.add(max(branches, key=lambda branch: branch.cycles.total()))
        elif op.opcode in ("call", "async-start"):
            for name in op.called():
                totals.add(self.computation(name, part))
        if (cycles := self.reading(op)) is not None:
            totals.cycles[part] += cycles
            if op.is_custom_kernel:
                totals.kernel_cycles["/".join(part)] += cycles
        elif op.is_custom_kernel:
            totals.kernels["/".join((*part, op.name))] += 1

    def _collectives(self, ops: Iterable[Op]) -> list[Op]:
        """Those that start here, each once.

        One that runs beside other work is spread over several fusions, under one channel.
        """
        plain = [op for op in ops if op.collective]
        channels = {attribute_of(op, "channel_id") for op in plain}
        for op in ops:
            for fused in self._fused(op):
                channel = attribute_of(fused, "channel_id")
                if fused.collective and channel not in channels:
                    channels.add(channel)
                    plain.append(fused)
        return plain

    def _fused(self, op: Op) -> Iterator[Op]:
        for name in op.called() if op.opcode == "fusion" else ():
            for inner in self.module.computations.get(name, ()):
                yield inner
                yield from self._fused(inner)


def _count_collective(op: Op, totals: Totals) -> None:
    arrays = arrays_of(op.shape)
    if op.opcode in ("all-gather-start", "collective-permute-start"):
        # Operands, as many results, and perhaps flags, which are scalars.
        arrays = [array for array in arrays if array.sides]
        arrays = arrays[len(arrays) // 2 :]
    totals.collective_bytes[op.collective or ""] += sum(array.bytes for array in arrays)
    totals.collective_runs[op.collective or ""] += 1


def _within(outer: Part, part: Part) -> Part:
    """A part in a loop of `outer`; what the compiler made there belongs to the loop."""
    return part if part[: len(outer)] == outer else outer + part


def _add(mine: Counter[Key], theirs: Counter[Key], times: int) -> None:
    for key, value in theirs.items():
        mine[key] += value * times
