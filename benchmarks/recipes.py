"""Recipes without their data: what the benchmarks of whole training steps share."""

import importlib
from collections.abc import Mapping
from typing import Any

import numpy as np
from ml_collections import ConfigDict

from mmjax.data.tokenizer import SPECIAL_TOKENS
from mmjax.training.program import Program


def recipe(name: str, arg: str | None = None) -> ConfigDict:
    """What `configs/NAME.py` says, unlocked."""
    config = importlib.import_module("configs." + name.replace("/", ".")).get_config(arg)
    config.unlock()
    return config


def noise(program: Program, batch: Mapping[str, Any], seed: int = 0) -> dict[str, np.ndarray]:
    """A batch of noise in the shapes and types of an abstract one; every pair is a picture's own.

    Texts are between half and all of the longest length.
    """
    rng = np.random.default_rng(seed)
    rows, length = batch["text"].shape
    mask = np.arange(length) < rng.integers(length // 2, length + 1, (rows, 1))
    # The special tokens stand first in the vocabulary; the others may be hidden.
    words = rng.integers(
        len(SPECIAL_TOKENS), program.task.tokenizer.vocabulary_size, batch["text"].shape
    )
    made = {
        "image": rng.integers(0, 256, batch["image"].shape, np.uint8),
        "text": np.where(mask, words, 0),
        "text_mask": mask,
        "image_id": np.arange(rows),
        "index": np.arange(rows),
        "valid": np.ones(rows, bool),
        "substituted": np.zeros(rows, bool),
    }
    return {name: made[name].astype(leaf.dtype) for name, leaf in batch.items()}
