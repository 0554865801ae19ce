"""How a run starts: resume the workdir, else initialise from a checkpoint, else from scratch."""

import dataclasses
import json
from collections.abc import Iterator, Mapping
from typing import Any

import jax
import numpy as np
from absl import logging
from etils import epath
from jax.sharding import Mesh
from ml_collections import ConfigDict

from mmjax import config as configuration
from mmjax.data.pipeline import Source
from mmjax.data.tokenizer import TextTokenizer
from mmjax.errors import InputError
from mmjax.models import model_class, resize_position_embedding
from mmjax.objectives import OBJECTIVES
from mmjax.training.checkpoints import Checkpointer, load_assets
from mmjax.training.initialisation import merge_parameters, starts
from mmjax.training.state import (
    StateConfig,
    TrainState,
    abstract_state,
    init_state,
    state_from_params,
)
from mmjax.training.teacher import teacher_tokenizer


def load_tokenizer(
    config: ConfigDict, source: Source, workdir: epath.Path, resume: bool
) -> TextTokenizer:
    """That of the resumed run, else as given, else `init_from`'s, else a teacher's, else new."""
    if resume:
        return TextTokenizer.from_json(load_assets(workdir)["tokenizer"])
    return _new_tokenizer(config, source).with_end_token(config.data.end_token)


def _new_tokenizer(config: ConfigDict, source: Source) -> TextTokenizer:
    if config.data.vocabulary:
        return TextTokenizer.from_vocabulary(config.data.vocabulary)
    for start in starts(config.init_from):
        if start.tokenizer:
            return TextTokenizer.from_json(start.tokenizer)
        if start.vocabulary:
            return TextTokenizer.from_vocabulary(start.vocabulary)
        if start.reads_text:  # other ids would be other words
            raise InputError(
                f"init_from: {start.folder} holds a text encoder without a vocabulary of ours: set "
                "data.vocabulary to the vocab.txt that it was trained with."
            )
    if tokenizer := teacher_tokenizer(config.teacher.checkpoint):
        return tokenizer
    tokenizer = TextTokenizer.train(source.texts(), config.data.vocabulary_size)
    logging.info("Trained a vocabulary of %d words on the data.", tokenizer.vocabulary_size)
    return tokenizer


def resolve(config: ConfigDict, tokenizer: TextTokenizer, source: Source) -> ConfigDict:
    """The config with everything filled in that follows from the data; what is saved and built."""
    config = config.copy_and_resolve_references()
    with config.unlocked():
        for part in _parts(config.model):
            if "image_size" in part:
                part.image_size = part.image_size or config.data.image_size
            if "vocabulary_size" in part:
                part.vocabulary_size = part.vocabulary_size or tokenizer.vocabulary_size
                _check_vocabulary(part.vocabulary_size, tokenizer)
        answers = [n for n, o in OBJECTIVES.items() if "answering" in o.needs]
        wanted = any(config.objectives[name].weight > 0 for name in answers)
        if wanted and "answers" in config.model and not config.model.answers:
            if not hasattr(source, "answer_list"):
                raise InputError(
                    f"objectives.{answers[0]} needs a closed list of answers: use a data source "
                    "with questions (data.task='questions') or set model.answers."
                )
            config.model.answers = tuple(source.answer_list())
    return config


def _parts(section: ConfigDict) -> Iterator[ConfigDict]:
    """The section and all that are in it."""
    yield section
    for value in section.values():
        if isinstance(value, ConfigDict):
            yield from _parts(value)


def _check_vocabulary(size: int, tokenizer: TextTokenizer) -> None:
    if size < tokenizer.vocabulary_size:
        raise InputError(
            f"model.text.vocabulary_size is {size}, but the tokenizer has "
            f"{tokenizer.vocabulary_size} words. Set it to 0 to follow the tokenizer."
        )


def start_state(
    config: ConfigDict, contents: StateConfig, mesh: Mesh, checkpointer: Checkpointer
) -> TrainState:
    """The state to train on, by the start rules. Says on the log which rule it was."""
    if (step := checkpointer.latest_step()) is not None:
        logging.info("Resuming at step %d.", step)
        return checkpointer.restore(abstract_state(contents, mesh))
    state = init_state(contents, mesh, seed=config.seed)
    found = starts(config.init_from)
    if not found:
        logging.info("Starting from scratch.")
        return state
    params, taken = state.params, set[str]()
    for start in found:
        loaded = start.parameters(model_class(contents.model), params)
        if start.answers != getattr(contents.model, "answers", ()):
            _drop_answers(loaded)
        params, report = merge_parameters(params, loaded, resize=_resize)
        taken |= {*report.loaded}
        # What nothing was found for is known, and told, behind the last of several parts.
        left = [path for path in report.left_initial if path not in taken and start is found[-1]]
        report = dataclasses.replace(report, left_initial=tuple(left))
        logging.info("Initialising from %s: %s", start.folder, report)
    return state_from_params(contents, params, mesh)


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


def _drop_answers(loaded: dict[str, Any]) -> None:
    """Take out the last layer of a head of answers: the same column would mean another one."""
    if "classifier" in loaded.get("answering", {}):
        del loaded["answering"]["classifier"]
    else:  # the head is that layer alone (VisualBERT, Oscar), if there is one
        loaded.pop("answering", None)


def _resize(path: str, array: np.ndarray, shape: tuple[int, ...]) -> np.ndarray | None:
    """Position embeddings of pictures follow the resolution; nothing else changes its shape."""
    is_image = path.startswith("image") and path.endswith("/position_embedding")
    if is_image and array.shape[1:] == shape[1:]:
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
