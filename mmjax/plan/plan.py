"""A plan: a compiled step, two readings of its cycles, and what follows from them."""

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

from mmjax.plan.activations import activation_bytes
from mmjax.plan.compiler import CompiledStep
from mmjax.plan.hlo import Module
from mmjax.plan.schedules import floor_of, with_kernels
from mmjax.plan.totals import Totals, add_up


@dataclass(frozen=True)
class Plan:
    """A step as compiled, and the readings of its cycles; None where there is none.

    Cycles are those of one device; all run the same program at once. Neither reading is a time:
    the estimate is what the compiler chooses by, the floor knows no stall, and both leave out
    waiting for other chips.
    """

    step: CompiledStep
    estimate: Totals | None
    floor: Totals | None = None
    activations: int = 0  # HBM bytes of a chip, part of what is temporary

    @property
    def fits(self) -> bool:
        """Whether the step's HBM is there."""
        return bool(self.step.text) and self.step.memory.peak <= self.step.memory.limit

    @property
    def readings(self) -> dict[str, Totals]:
        """Those that there are, by name."""
        both = {"estimate": self.estimate, "floor": self.floor}
        return {name: totals for name, totals in both.items() if totals is not None}

    @property
    def uncounted_kernels(self) -> dict[str, int]:
        """Custom kernels that no reading counts, with their runs a step."""
        known = self.floor or self.estimate
        return {} if known is None else dict(known.kernels)

    @property
    def collective_bytes(self) -> dict[str, int]:
        """What a chip gets by each kind of collective in a step."""
        known, devices = self.estimate, self.step.topology.chip.devices
        moved = {} if known is None else known.collective_bytes
        return {kind: devices * size for kind, size in moved.items()}

    def seconds(self, totals: Totals) -> float:
        """Of a step of so many cycles."""
        return totals.cycles.total() / self.step.topology.chip.clock

    def mfu(self, totals: Totals) -> float:
        """Model FLOPs over what the chips could do in so many cycles."""
        topology = self.step.topology
        peak = topology.chips * topology.chip.peak_flops
        return self.step.flops / (peak * self.seconds(totals))

    def as_json(self) -> dict[str, Any]:
        """The plan as plain values: HBM and collectives in bytes of a chip, cycles of a step."""
        cycles = {name: round(totals.cycles.total()) for name, totals in self.readings.items()}
        mfu = {name: self.mfu(totals) for name, totals in self.readings.items()}
        return {
            "topology": self.step.topology.name,
            "chips": self.step.topology.chips,
            "batch_size": self.step.config.batch_size,
            "parameters": sum(self.step.parameters.values()),
            "flops_per_step": self.step.flops,
            "hbm_bytes": asdict(self.step.memory),
            "cycles": {name: cycles.get(name) for name in ("estimate", "floor")},
            "mfu": {"low": mfu.get("estimate"), "high": mfu.get("floor")},
            "collective_bytes": self.collective_bytes,
            "counted_kernels": dict(self.floor.kernel_cycles) if self.floor else {},
            "uncounted_kernels": self.uncounted_kernels,
            "unread_loops": sorted(self.estimate.unread_loops) if self.estimate else [],
            "fits": self.fits,
        }


def read(step: CompiledStep, schedules: Mapping[str, int]) -> Plan:
    """The plan of a compiled step; without schedules there is no floor."""
    if not step.text:
        return Plan(step, None)
    module = Module.parse(step.text)
    activations = step.topology.chip.devices * activation_bytes(module)
    if not schedules:
        return Plan(step, add_up(module), activations=activations)
    floor = floor_of(module, schedules, step.topology.chip)
    estimate = add_up(module, with_kernels(floor))
    return Plan(step, estimate, add_up(module, floor), activations)
