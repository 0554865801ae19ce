"""The training step of a recipe, compiled for a topology that nobody has at hand.

Nothing here is a stand-in but the data: the mesh, the state, the step are those of `train.py`.
"""

import re
from dataclasses import dataclass
from math import prod
from typing import Any

import jax
from ml_collections import ConfigDict

from mmjax import config as configuration
from mmjax import platform
from mmjax.plan.assembly import assemble
from mmjax.plan.topology import Topology
from mmjax.sharding import check_batch_size, make_mesh
from mmjax.training.state import TrainState, abstract_state


@dataclass(frozen=True)
class Memory:
    """HBM of one chip in bytes. None is what the compiler does not say of a step it refused."""

    arguments: int | None  # state and batch
    temporary: int | None  # what lives within a step
    output: int | None
    alias: int | None  # output that takes the place of arguments
    peak: int  # what the step needs
    limit: int  # what a program may have


@dataclass(frozen=True)
class CompiledStep:
    """What the compiler made of a step; `text` is '' where it needs more HBM than there is."""

    topology: Topology
    config: ConfigDict  # resolved
    mesh: dict[str, int]  # devices along each axis
    parameters: dict[str, int]  # by part of the model
    state_bytes: dict[str, int]  # of one chip, by what it is for
    flops: float  # model FLOPs of all devices
    memory: Memory
    text: str  # the optimised HLO


def compile_step(config: ConfigDict, topology: Topology) -> CompiledStep:
    """Compile the training step of a recipe for a topology. It takes minutes.

    Raises InputError where the recipe is no run, or none on so many devices.
    """
    configuration.check(config)
    mesh = make_mesh(**config.mesh, over=topology.devices)
    check_batch_size(config.batch_size, mesh, accumulate=config.optimizer.accumulate)
    with platform.assume("tpu"):
        program, batch = assemble(config, mesh)
    with jax.set_mesh(mesh), platform.assume("tpu"):
        state = abstract_state(program.contents, mesh)
        lowered = program.lower_step(state, batch)
        flops = program.step_flops(state, batch)
        memory, text = _compile(lowered, topology)
    return CompiledStep(
        topology=topology,
        config=program.config,
        mesh=dict(mesh.shape),
        parameters={
            name: sum(leaf.size for leaf in jax.tree.leaves(part))
            for name, part in state.params.items()
        },
        state_bytes=_state_bytes(state, topology.chip.devices),
        flops=flops,
        memory=memory,
        text=text,
    )


def _state_bytes(state: TrainState, devices: int) -> dict[str, int]:
    """What a chip of so many devices holds of the state."""
    parts = {
        "parameters": state.params,
        "optimizer": state.opt_state,
        "moving average": state.ema,
        "memory of objectives": state.memory,
    }
    return {
        name: devices
        * sum(
            leaf.dtype.itemsize * prod(leaf.sharding.shard_shape(leaf.shape))
            for leaf in jax.tree.leaves(tree)
        )
        for name, tree in parts.items()
        if jax.tree.leaves(tree)
    }


def _compile(lowered: jax.stages.Lowered, topology: Topology) -> tuple[Memory, str]:
    devices, limit = topology.chip.devices, int(topology.chip.hbm_bytes)
    try:
        compiled = lowered.compile()
    except jax.errors.JaxRuntimeError as error:
        if "RESOURCE_EXHAUSTED" not in str(error):
            raise
        return Memory(None, None, None, None, devices * _needed(str(error)), limit), ""
    found: Any = compiled.memory_analysis()
    arguments, temporary, output, alias = (
        devices * getattr(found, f"{kind}_size_in_bytes")
        for kind in ("argument", "temp", "output", "alias")
    )
    # (less than the sum, as not all that is temporary is alive at once)
    peak = devices * found.peak_memory_in_bytes
    return Memory(arguments, temporary, output, alias, peak, limit), compiled.as_text() or ""


def _needed(message: str) -> int:
    """The HBM that a device would need, from the compiler's refusal: 'Used 20.5G of 15.75G hbm'."""
    found = re.search(r"Used ([\d.]+)([KMGT]?) of|\(([\d.]+)([KMGT]?)\) exceeds", message)
    if found is None:
        raise ValueError(f"the compiler refuses the step in words that are not known: {message}")
    number, unit = [group for group in found.groups() if group is not None]
    return int(float(number) * 1024 ** " KMGT".index(unit or " "))
