"""A recipe's tiny size, trained on one batch over and over."""

import dataclasses
import importlib
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import AxisType, Mesh
from ml_collections import ConfigDict

from mmjax.data import load_source
from mmjax.sharding import to_device
from mmjax.training.checkpoints import Checkpointer
from mmjax.training.program import Program
from mmjax.training.start import load_tokenizer, resolve, start_state
from train import open_batches

STEPS = 200
ROOT = Path(__file__).resolve().parents[2]


def recipes() -> list[str]:
    """'pretrain/clip_b16', … of every file in configs/pretrain and configs/finetune."""
    paths = [*ROOT.glob("configs/pretrain/*.py"), *ROOT.glob("configs/finetune/*.py")]
    return sorted(path.relative_to(ROOT / "configs").with_suffix("").as_posix() for path in paths)


def tiny(recipe: str) -> ConfigDict:
    return importlib.import_module(f"configs.{recipe.replace('/', '.')}").get_config("tiny")


def one_device() -> Mesh:
    return jax.make_mesh(
        (1, 1, 1), ("data", "fsdp", "tensor"), (AxisType.Auto,) * 3, devices=jax.devices()[:1]
    )


def fit(config: ConfigDict, workdir: Path) -> tuple[dict[str, float], dict[str, Any]]:
    """The metrics of the last of STEPS steps, and the batch that all of them were made on."""
    mesh, source = one_device(), load_source(config.data.to_dict())
    with jax.set_mesh(mesh), Checkpointer(workdir, **config.checkpoint) as checkpointer:
        tokenizer = load_tokenizer(config, source, workdir, False)
        config = resolve(config, tokenizer, source)
        program = Program.build(config, tokenizer, mesh)
        state = start_state(config, program.contents, mesh, checkpointer)
        batches = open_batches(program, source, 0)
        batch = next(batches)
        batches.close()
        on_device = to_device(batch, mesh)
        step, _ = program.compile_step(state, on_device)
        for _ in range(STEPS):
            state, metrics = step(state, on_device)
            # The step's number draws masks and negatives: they are part of what is fixed.
            state = dataclasses.replace(state, step=jnp.zeros_like(state.step))
        last = jax.device_get(metrics)
    return {name: float(value) for name, value in last.items()}, batch
