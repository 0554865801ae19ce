"""The model that a student learns from (`config.teacher`): loaded, checked, laid over the mesh."""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jax
import numpy as np
from absl import logging
from flax import nnx
from jax.sharding import Mesh
from ml_collections import ConfigDict
from tokenizers import Tokenizer

from mmjax import weights
from mmjax.data.tokenizer import TextTokenizer
from mmjax.errors import InputError
from mmjax.models import ViTConfig
from mmjax.models.vit import pair
from mmjax.objectives import Objective
from mmjax.rules import by_path
from mmjax.sharding import tree_shardings
from mmjax.training.initialisation import starts
from mmjax.training.state import Parameters
from mmjax.weights.hub import resolve


@dataclass(frozen=True)
class Teacher:
    """A model that is read from and never trained."""

    config: Any
    graph: nnx.GraphDef
    params: Parameters


def load_teacher(
    config: ConfigDict,
    objectives: Mapping[str, Objective],
    tokenizer: TextTokenizer,
    mesh: Mesh,
) -> Teacher | None:
    """The model in `config.teacher.checkpoint`, or None where no objective learns from one.

    It may be one of our checkpoints (a moving average in it goes before the parameters), a Hugging
    Face folder or a name on its Hub.

    Raises:
        InputError: a teacher is needed and not named, or the other way round; it cannot be loaded;
            or it cannot read the batches: other words, another size of pictures.
    """
    learners = [name for name, objective in objectives.items() if objective.needs_reference]
    checkpoint = config.teacher.checkpoint
    if learners and not checkpoint:
        raise InputError(
            f"objectives.{learners[0]} learns from a teacher: set config.teacher.checkpoint to a "
            "workdir, a checkpoint or a folder of public weights."
        )
    if checkpoint and not learners:
        raise InputError(
            f"config.teacher.checkpoint is {checkpoint}, but nothing is learnt from it: give an "
            "objective that distils a weight, or leave the teacher out."
        )
    if not checkpoint:
        return None
    model = weights.load(checkpoint)
    graph, state = nnx.split(model)
    params = nnx.to_pure_dict(state)
    _check_picture_size(model.config, config.data.image_size)
    if any(getattr(objectives[name], "teacher_reads", True) for name in learners):
        _check_text_length(model.config, config.data.text_length)
        _check_words(checkpoint, params, tokenizer)
    logging.info("Learning from %s, a %s.", checkpoint, type(model).__name__)
    return Teacher(model.config, graph, _laid_out(params, mesh))


def teacher_tokenizer(checkpoint: str) -> TextTokenizer | None:
    """The teacher's own, if its student can read by it: one of ours, or of BERT's kind."""
    if not checkpoint:
        return None
    (start,) = starts(str(resolve(checkpoint, weights=False)))
    if start.tokenizer:
        return TextTokenizer.from_json(start.tokenizer)
    return TextTokenizer.from_vocabulary(start.vocabulary) if start.vocabulary else None


def _check_picture_size(config: Any, size: int) -> None:
    image = getattr(config, "image", None)
    if isinstance(image, ViTConfig) and pair(image.image_size) != (size, size):
        height, width = pair(image.image_size)
        raise InputError(
            f"the teacher takes pictures of {height}×{width} pixels, and data.image_size is "
            f"{size}: both see the same pictures. Set data.image_size to the teacher's."
        )


def _check_text_length(config: Any, length: int) -> None:
    text = getattr(config, "text", None)
    longest = getattr(text, "max_length", length) - getattr(text, "first_position", 0)
    if length > longest:
        raise InputError(
            f"the teacher reads texts of at most {longest} tokens, and data.text_length is "
            f"{length}: lower it."
        )


def _check_words(checkpoint: str, params: Parameters, tokenizer: TextTokenizer) -> None:
    """The same ids must be the same words; a larger vocabulary may go on behind them."""
    ours = tokenizer.tokens(range(tokenizer.vocabulary_size))
    theirs = _words_of(checkpoint)
    if not theirs:
        _check_word_count(checkpoint, params, len(ours))
    elif theirs[: len(ours)] != ours:
        number = next(
            (i for i, (a, b) in enumerate(zip(ours, theirs, strict=False)) if a != b), len(theirs)
        )
        there = repr(theirs[number]) if number < len(theirs) else "none"
        raise InputError(
            f"the teacher {checkpoint} has another vocabulary: the word with the id {number} is "
            f"{ours[number]!r} here and {there} there. Leave data.vocabulary and init_from out, so "
            "that the teacher's is taken where it can be, or distil pictures alone."
        )


def _words_of(checkpoint: str) -> list[str]:
    """The words by id, of our tokenizer or of the one beside public weights; [] where none is."""
    if tokenizer := teacher_tokenizer(checkpoint):
        return tokenizer.tokens(range(tokenizer.vocabulary_size))
    if (path := resolve(checkpoint) / "tokenizer.json").exists():
        words = {i: word for word, i in _vocabulary_in(path).items()}
        return [words.get(i, "") for i in range(max(words) + 1)]
    return []


def _vocabulary_in(path: Path) -> dict[str, int]:
    try:
        return Tokenizer.from_file(str(path)).get_vocab()
    except Exception as error:  # the library raises nothing narrower
        raise InputError(f"{path} cannot be read: {error}.") from error


def _check_word_count(checkpoint: str, params: Parameters, words: int) -> None:
    """All that can be said where no vocabulary lies beside the weights."""
    tables = {
        leaf.shape[0]
        for path, leaf in by_path(params).items()
        if path.endswith("token_embedding/embedding")
    }
    if tables != {words}:
        raise InputError(
            f"the teacher {checkpoint} has no vocabulary beside it, and its tables of words have "
            f"{sorted(tables)} rows where data.vocabulary has {words} words: put its vocab.txt "
            "there and name it in data.vocabulary."
        )
    logging.warning(
        "%s has no vocabulary beside it: its ids are taken to mean what they do here.", checkpoint
    )


def _laid_out(params: Parameters, mesh: Mesh) -> Parameters:
    """The same parameters, each on the devices that the rules of the mesh put it on."""

    def place(leaf, sharding):
        values = np.asarray(leaf)
        return jax.make_array_from_callback(values.shape, sharding, lambda index: values[index])

    return jax.tree.map(place, params, tree_shardings(params, mesh))
