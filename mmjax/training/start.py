"""How a run starts: resume the workdir, else initialise from a checkpoint, else from scratch."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax
import numpy as np
import optax
from absl import logging
from jax.sharding import Mesh
from ml_collections import ConfigDict

from mmjax import config as configuration
from mmjax.data.pipeline import Source
from mmjax.data.tokenizer import TextTokenizer
from mmjax.errors import InputError
from mmjax.models import ModelConfig, resize_position_embedding
from mmjax.training.checkpoints import Checkpointer, load_assets, load_parameters
from mmjax.training.initialisation import merge_parameters
from mmjax.training.state import TrainState, abstract_state, init_state, state_from_params


def load_tokenizer(
    config: ConfigDict, source: Source, workdir: Path, resume: bool
) -> TextTokenizer:
    """The resumed checkpoint's tokenizer, else a given vocabulary, else `init_from`'s, else new."""
    if resume:
        return TextTokenizer.from_json(load_assets(workdir)["tokenizer"])
    if config.data.vocabulary:
        return TextTokenizer.from_vocabulary(config.data.vocabulary)
    assets = load_assets(config.init_from) if config.init_from else {}
    if "tokenizer" in assets:
        return TextTokenizer.from_json(assets["tokenizer"])
    if "text" in assets.get("config", {}):  # converted weights: other ids would be other words
        raise InputError(
            f"init_from: {config.init_from} holds a text encoder without a vocabulary of ours: set "
            "data.vocabulary to the vocab.txt that it was trained with."
        )
    tokenizer = TextTokenizer.train(source.texts(), config.data.vocabulary_size)
    logging.info("Trained a vocabulary of %d words on the data.", tokenizer.vocabulary_size)
    return tokenizer


def resolve(config: ConfigDict, tokenizer: TextTokenizer, source: Source) -> ConfigDict:
    """The config with everything filled in that follows from the data; what is saved and built."""
    config = config.copy_and_resolve_references()
    with config.unlocked():
        config.model.image.image_size = config.model.image.image_size or config.data.image_size
        config.model.text.vocabulary_size = (
            config.model.text.vocabulary_size or tokenizer.vocabulary_size
        )
        if config.objectives.answering.weight > 0 and not config.model.answers:
            if not hasattr(source, "answer_list"):
                raise InputError(
                    "objectives.answering needs a closed list of answers: use a data source with "
                    "questions (data.task='questions') or set model.answers."
                )
            config.model.answers = tuple(source.answer_list())
    if config.model.text.vocabulary_size < tokenizer.vocabulary_size:
        raise InputError(
            f"model.text.vocabulary_size is {config.model.text.vocabulary_size}, but the tokenizer "
            f"has {tokenizer.vocabulary_size} words. Set it to 0 to follow the tokenizer."
        )
    return config


def start_state(
    config: ConfigDict,
    model: ModelConfig,
    optimizer: optax.GradientTransformation,
    mesh: Mesh,
    checkpointer: Checkpointer,
) -> TrainState:
    """The state to train on, by the start rules. Says on the log which rule it was."""
    ema = config.optimizer.ema_decay > 0
    if (step := checkpointer.latest_step()) is not None:
        logging.info("Resuming at step %d.", step)
        return checkpointer.restore(abstract_state(model, optimizer, mesh, ema=ema))
    state = init_state(model, optimizer, mesh, seed=config.seed, ema=ema)
    if not config.init_from:
        logging.info("Starting from scratch.")
        return state
    loaded = load_parameters(config.init_from)
    trained = load_assets(config.init_from)["config"]
    trained = trained.get("model", trained)  # converted weights have a family's config alone
    if tuple(trained.get("answers", ())) != model.answers:
        # The same column would mean another answer.
        loaded.get("answering", {}).pop("classifier", None)
    params, report = merge_parameters(state.params, loaded, resize=_resize)
    logging.info("Initialising from %s: %s", config.init_from, report)
    return state_from_params(params, optimizer, mesh, ema=ema)


def log_changes(saved: Mapping[str, Any], config: ConfigDict) -> None:
    """Say which keys of a resumed run differ from those it was started with."""
    before, now = _flat(saved), _flat(json.loads(configuration.to_json(config)))
    for key in sorted(before.keys() | now.keys()):
        if before.get(key) != now.get(key):
            logging.warning(
                "Resuming with another %s: %r, it was %r.", key, now.get(key), before.get(key)
            )


def parameter_counts(params: Mapping[str, Any]) -> str:
    """'1,436,393 parameters (image 412,800, …)'."""
    parts = {name: sum(x.size for x in jax.tree.leaves(part)) for name, part in params.items()}
    listed = ", ".join(f"{name} {count:,}" for name, count in parts.items())
    return f"{sum(parts.values()):,} parameters ({listed})"


def _resize(path: str, array: np.ndarray, shape: tuple[int, ...]) -> np.ndarray | None:
    """Position embeddings of pictures follow the resolution; nothing else changes its shape."""
    if path == "image/position_embedding" and array.shape[1:] == shape[1:]:
        return resize_position_embedding(array, shape[0])
    return None


def _flat(tree: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    flat: dict[str, Any] = {}
    for key, value in tree.items():
        if isinstance(value, Mapping):
            flat |= _flat(value, f"{prefix}{key}.")
        else:
            flat[prefix + key] = value
    return flat
