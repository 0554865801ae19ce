"""From a model to disk: Hugging Face folders, and checkpoints of our own."""

import dataclasses
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np
from flax import nnx

from mmjax import schema
from mmjax.errors import InputError
from mmjax.json_files import write_json
from mmjax.models.model import Model
from mmjax.training.checkpoints import Checkpointer
from mmjax.weights import generation
from mmjax.weights.families import FAMILIES
from mmjax.weights.family import Family
from mmjax.weights.files import write_safetensors
from mmjax.weights.loading import PIXELS
from mmjax.weights.names import to_theirs


def save_huggingface(model: Model, folder: str | Path) -> None:
    """Write `config.json` and `model.safetensors` as `transformers` names them.

    A family without a class there is written under the names of its original code, with our config
    in `config.json`; `mmjax.load` reads both.

    Raises InputError where no family has such a model, or the folder cannot be written.
    """
    folder, family = Path(folder), _published(model)
    if family.write is not None:
        description = family.write(model.config) | _pixels(model.config)
    else:
        description = {"model_type": family.name, "mmjax": schema.describe(model.config)}
    arrays = to_theirs(family.table(model.config), nnx.to_pure_dict(nnx.state(model)))
    write_safetensors(folder / "model.safetensors", arrays | _update_counts(arrays))
    files = {"config.json": description}
    if hasattr(model.config, "generation"):
        files[generation.FILE] = generation.write_generation(model.config.generation)
    for name, content in files.items():
        write_json(folder / name, content)


def _update_counts(arrays: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
    """Torch counts the updates of running statistics beside them; here there were none."""
    names = [name for name in arrays if name.endswith(".running_mean")]
    return {
        name.removesuffix("running_mean") + "num_batches_tracked": np.zeros((), np.int64)
        for name in names
    }


def _published(model: Model) -> Family:
    """The family to write: that of a class of `transformers`, wherever the model came from."""
    family = family_of(model)
    if family.write is None:
        return next((f for f in _fitting(model) if f.write is not None), family)
    return family


def _pixels(config: Any) -> dict[str, Any]:
    """Mean and deviation of pixels, which `transformers` keeps beside the model."""
    parts = [config, *(getattr(config, part.name) for part in dataclasses.fields(config))]
    for part in parts:
        if hasattr(part, "mean") and hasattr(part, "std"):
            return {PIXELS: [list(part.mean), list(part.std)]}
    return {}


def save_checkpoint(model: Model, folder: str | Path) -> None:
    """Write one of our own checkpoints, for `mmjax.load`, and for the shared parts, `init_from`.

    Raises InputError where no family has such a model, or the folder has a checkpoint.
    """
    family = family_of(model)
    checkpointer = Checkpointer(folder, every=0, keep=1)
    try:
        if checkpointer.steps:
            raise InputError(f"{folder} holds a checkpoint already; name another folder.")
        state = {"step": jnp.asarray(0), "params": nnx.to_pure_dict(nnx.state(model))}
        assets = {"family": family.name, "config": schema.describe(model.config)}
        checkpointer.save(0, state, assets, force=True)
    finally:
        checkpointer.close()


def family_of(model: Model) -> Family:
    """The family under whose names a model is written: that it was loaded as, or one that fits."""
    if model.family:
        return FAMILIES[model.family]
    if fitting := _fitting(model):
        return fitting[0]
    raise InputError(
        f"no published format holds this {type(model).__name__}: its configuration is that of no "
        f"family ({', '.join(FAMILIES)}). Our own checkpoints keep it."
    )


def _fitting(model: Model) -> list[Family]:
    """The families that have such a model."""
    config = model.config
    return [f for f in FAMILIES.values() if type(config) is f.config and f.is_member(config)]
