"""Which change makes a step fit, found by compiling it."""

import itertools
import json
import subprocess
import sys
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from absl import logging
from ml_collections import ConfigDict

REMAT = ("none", "products", "dots", "attention", "heads", "full")  # from most kept to least

Overrides = tuple[str, ...]  # of the config, as flags


@dataclass(frozen=True)
class Trial:
    """A changed recipe, and its plan as JSON; None where it is no run on these devices."""

    overrides: Overrides
    plan: Mapping[str, Any] | None

    @property
    def fits(self) -> bool:
        """Whether the changed step was compiled and fits."""
        return self.plan is not None and self.plan["fits"]


def search(config: ConfigDict, devices: int, arguments: Sequence[str]) -> list[Trial]:
    """Compile what may help, a kind of change after the other, each until it fits.

    Remat first, because it changes no result and no traffic; parameters over `fsdp`; a smaller
    batch, which is another run; where none of them is enough, remat and fsdp together.

    `arguments` are those of the command line that found the recipe not to fit. Each trial is that
    command again with overrides behind it, in a process of its own.
    """
    trials: list[Trial] = []
    remat, fsdp = list(stronger_remat(config)), list(larger_fsdp(config, devices))
    for kind in (remat, fsdp, list(smaller_batches(config, devices))):
        trials += _until_one_fits(kind, arguments)
    if remat and fsdp and not any(trial.fits for trial in trials):
        trials += _until_one_fits([remat[-1] + overrides for overrides in fsdp], arguments)
    return trials


def stronger_remat(config: ConfigDict) -> Iterator[Overrides]:
    """All parts of the model that keep more than a policy, under that policy."""
    for policy in REMAT[1:]:
        weaker = REMAT[: REMAT.index(policy)]
        keys = [key for key, value in _remat_keys("config.model", config.model) if value in weaker]
        if keys:
            yield tuple(f"--{key}={policy}" for key in keys)


def larger_fsdp(config: ConfigDict, devices: int) -> Iterator[Overrides]:
    """Parameters, gradients and moments over four times as many devices, and so on up to all."""
    most = devices // max(config.mesh.tensor, 1)
    sizes = itertools.takewhile(
        lambda size: size < most, (config.mesh.fsdp * 4**i for i in itertools.count(1))
    )
    for size in [*sizes, most]:
        if size > config.mesh.fsdp and most % size == 0:
            yield ("--config.mesh.data=-1", f"--config.mesh.fsdp={size}")


def smaller_batches(config: ConfigDict, devices: int) -> Iterator[Overrides]:
    """A half, a quarter and an eighth of the batch, as far as it can be shared out."""
    ways = devices // max(config.mesh.tensor, 1) * config.optimizer.accumulate
    for divisor in (2, 4, 8):
        if config.batch_size % (divisor * ways) == 0:
            yield (f"--config.batch_size={config.batch_size // divisor}",)


def _remat_keys(prefix: str, section: ConfigDict) -> Iterator[tuple[str, str]]:
    for key, value in section.items():
        if isinstance(value, ConfigDict):
            yield from _remat_keys(f"{prefix}.{key}", value)
        elif key == "remat":
            yield f"{prefix}.{key}", value


def _until_one_fits(kind: Sequence[Overrides], arguments: Sequence[str]) -> list[Trial]:
    trials: list[Trial] = []
    for overrides in kind:
        logging.info("Compiling with %s.", " ".join(overrides))
        trials.append(Trial(overrides, _plan(arguments, overrides)))
        if trials[-1].fits:
            break
    return trials


def _plan(arguments: Sequence[str], overrides: Overrides) -> Mapping[str, Any] | None:
    only_json = ("--json", "--nosearch", "--noschedules", "--save_hlo=", "--save_plan=")
    command = [sys.executable, "-m", "mmjax.plan", *arguments, *overrides, *only_json]
    result = subprocess.run(command, capture_output=True, text=True, check=False)
    if result.returncode:
        logging.warning("No plan: %s", result.stderr.strip().splitlines()[-1:])
        return None
    return json.loads(result.stdout)
