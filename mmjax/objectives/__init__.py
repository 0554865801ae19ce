"""Objectives: features -> loss. Each a sum over the global batch with its weight.

What a loss means never depends on how many devices or processes computed it.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any

import jax
from jaxtyping import Array, Key

from mmjax.data.tokenizer import TextTokenizer
from mmjax.errors import InputError
from mmjax.models import ModelConfig, VisionLanguageModel
from mmjax.objectives.answering import answering
from mmjax.objectives.contrastive import contrastive
from mmjax.objectives.loss import Features, Loss, purpose_key
from mmjax.objectives.masked_language import masked_language
from mmjax.objectives.matching import matching

__all__ = ["Features", "Loss", "Objective", "build_objectives", "compute_losses", "total_loss"]


@dataclass(frozen=True)
class Objective:
    """One term of the training loss."""

    name: str
    weight: float
    function: Callable[..., Loss]
    whole_batch: bool  # compares the examples of a batch, so that splitting it changes the loss


def build_objectives(
    config: Mapping[str, Mapping[str, Any]], model: ModelConfig, tokenizer: TextTokenizer
) -> tuple[Objective, ...]:
    """The terms of `config.objectives` with a positive weight.

    Raises InputError where a term needs a head that the model lacks.
    """
    objectives = []
    for name, options in config.items():
        if options["weight"] <= 0:
            continue
        if name == "contrastive":
            _need(model.embedding_width, name, "model.embedding_width")
            function, whole_batch = contrastive, True
        elif name == "matching":
            _need(model.matching, name, "model.matching")
            if options["negatives"] not in ("hard", "random"):
                raise InputError(
                    f"objectives.matching.negatives is {options['negatives']!r}; "
                    "it is 'hard' or 'random'."
                )
            if options["negatives"] == "hard":
                _need(model.embedding_width, "matching (hard negatives)", "model.embedding_width")
            function = partial(matching, negatives=options["negatives"])
            whole_batch = True
        elif name == "masked_language":
            _need(model.masked_language, name, "model.masked_language")
            function = partial(
                masked_language,
                rate=options["rate"],
                mask_id=tokenizer.mask_id,
                special_ids=tuple(tokenizer.special_ids),
            )
            whole_batch = False
        else:
            _need(model.answers, name, "model.answers (the data's answer list)")
            function, whole_batch = answering, False
        objectives.append(Objective(name, options["weight"], function, whole_batch))
    if not objectives:
        raise InputError("every weight in config.objectives is 0: there is nothing to train.")
    return tuple(objectives)


def compute_losses(
    objectives: tuple[Objective, ...],
    model: VisionLanguageModel,
    batch: Mapping[str, Array],
    key: Key[Array, ""],
    train: bool = True,
) -> dict[str, Loss]:
    """Every objective's loss on one batch, encodings shared. `train=False`: no dropout."""
    features = Features(model, batch, key if train else None)
    return {
        objective.name: objective.function(features, purpose_key(key, objective.name))
        for objective in objectives
    }


def _need(head: Any, objective: str, key: str) -> None:
    if not head:
        raise InputError(f"objective {objective} needs a head that the model lacks: set {key}.")


def total_loss(
    objectives: tuple[Objective, ...], losses: Mapping[str, Loss], weights: Mapping[str, jax.Array]
) -> jax.Array:
    """The weighted sum of the objectives' means, each sum divided by its global weight."""
    return sum(
        (
            objective.weight * losses[objective.name].total / weights[objective.name]
            for objective in objectives
        ),
        start=jax.numpy.zeros(()),
    )
