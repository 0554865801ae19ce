"""A recipe's tiny size, trained on one batch over and over."""

import dataclasses
import importlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
from ml_collections import ConfigDict

from mmjax.sharding import to_device
from tests.runs import begin, one_device
from train import open_batches

STEPS = 200
LOOK_EVERY = 20
Losses = dict[str, float]
ROOT = Path(__file__).resolve().parents[2]


def recipes() -> list[str]:
    """'pretrain/clip_b16', … of every file in configs/pretrain and configs/finetune."""
    paths = [*ROOT.glob("configs/pretrain/*.py"), *ROOT.glob("configs/finetune/*.py")]
    return sorted(path.relative_to(ROOT / "configs").with_suffix("").as_posix() for path in paths)


def tiny(recipe: str) -> ConfigDict:
    return importlib.import_module(f"configs.{recipe.replace('/', '.')}").get_config("tiny")


def fit(
    config: ConfigDict, workdir: Path, learned: Callable[[Losses, dict[str, Any]], bool]
) -> tuple[Losses, dict[str, Any]]:
    """The last step's metrics and the batch of all steps: STEPS, or fewer if that is `learned`."""
    with jax.set_mesh(mesh := one_device()):
        program, state, source = begin(config, workdir, mesh)
        batches = open_batches(program, source, 0)
        batch = next(batches)
        batches.close()
        on_device = to_device(batch, mesh)
        step, _ = program.compile_step(state, on_device)
        for number in range(1, STEPS + 1):
            state, metrics = step(state, on_device)
            # The step's number draws masks and negatives: they are part of what is fixed.
            state = dataclasses.replace(state, step=jnp.zeros_like(state.step))
            if number % LOOK_EVERY == 0:
                losses = {name: float(value) for name, value in jax.device_get(metrics).items()}
                if learned(losses, batch):
                    break
    return losses, batch
