"""Pods that can be planned for without one.

A topology is named GENERATION:SHAPE, as 'v5e:16x16'; its shape counts chips. libtpu answers with
devices, which are not always chips: a tpu7x chip is two of them.
"""

import importlib.metadata
import importlib.util
import os
import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import jax
from jax.experimental import topologies

from mmjax.chips import CHIPS, Chip
from mmjax.errors import InputError, near_misses


@dataclass(frozen=True)
class Topology:
    """A slice of a pod: its chips, and the devices that jax sees there."""

    name: str
    chip: Chip
    devices: Sequence[Any]  # of jax, without hardware behind them
    compiler: str = ""  # its version, which its numbers are those of

    @property
    def chips(self) -> int:
        """How many chips the devices are."""
        return len({tuple(device.coords) for device in self.devices})


def find_topology(name: str) -> Topology:
    """The topology of that name.

    Raises InputError where the generation is unknown, libtpu has no such shape, or is not here.
    """
    generation, _, shape = name.partition(":")
    if generation not in CHIPS:
        raise InputError(f"--topology={name}: no such TPU.{near_misses(generation, CHIPS)}")
    if not re.fullmatch(r"\d+(x\d+){1,2}", shape):
        raise InputError(
            f"--topology={name}: write {generation}:SHAPE, the chips a side, as v5e:16x16 or "
            "v5p:4x4x4."
        )
    if importlib.util.find_spec("libtpu") is None:
        raise InputError(
            "the plan asks the TPU compiler, and the package libtpu is not installed: "
            "pip install 'mmjax[plan]'. No TPU is needed."
        )
    chip = CHIPS[generation]
    _keep_to_the_compiler(chip)
    options: dict[str, Any] = {"chip_config_name": chip.config} if chip.config else {}
    if set(shape.split("x")) == {"1"}:  # a host has 2 × 2 chips, unless it is told otherwise
        options["chips_per_host_bounds"] = (1, 1, 1)
    try:
        description = topologies.get_topology_desc(platform="tpu", topology_name=name, **options)
    except jax.errors.JaxRuntimeError as error:
        raise InputError(f"--topology={name}: {error}") from error
    versions = f"jax {jax.__version__}, libtpu {importlib.metadata.version('libtpu')}"
    return Topology(name, chip, description.devices, versions)


def _keep_to_the_compiler(chip: Chip) -> None:
    """Tell libtpu, before it is loaded, to look for no TPU, to log nothing and to lock nothing."""
    os.environ |= {
        "TPU_SKIP_MDS_QUERY": "1",
        "TPU_ACCELERATOR_TYPE": chip.accelerator_type,
        "TPU_WORKER_HOSTNAMES": "localhost",
        "TPU_LOG_DIR": "disabled",
        "TPU_STDERR_LOG_LEVEL": "3",
        "TPU_MIN_LOG_LEVEL": "3",
        "TF_CPP_MIN_LOG_LEVEL": "3",
        "ALLOW_MULTIPLE_LIBTPU_LOAD": "1",
    }
