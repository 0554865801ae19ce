"""Objectives: features -> loss. Each a sum over the global batch with its weight.

What a loss means never depends on how many devices or processes computed it.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any

import jax.numpy as jnp
from jaxtyping import Array, Float, Key

from mmjax.data.tokenizer import TextTokenizer
from mmjax.errors import InputError, near_misses
from mmjax.models import ModelConfig, VisionLanguageModel
from mmjax.objectives.answering import answering_objective
from mmjax.objectives.contrastive import contrastive_objective
from mmjax.objectives.loss import Features, Loss, purpose_key
from mmjax.objectives.masked_language import masked_language_objective
from mmjax.objectives.matching import NEGATIVES, matching_objective

__all__ = ["Features", "Loss", "Objective", "build_objectives", "compute_losses", "total_loss"]

# By name: the function, the field of ModelConfig that gives its head, and whether it compares the
# examples of a batch with each other, so that splitting the batch would change the loss.
KINDS: dict[str, tuple[Callable[..., Loss], str, bool]] = {
    "contrastive": (contrastive_objective, "embedding_width", True),
    "matching": (matching_objective, "matching", True),
    "masked_language": (masked_language_objective, "masked_language", False),
    "answering": (answering_objective, "answers", False),
}


@dataclass(frozen=True)
class Objective:
    """One term of the training loss."""

    name: str
    weight: float
    function: Callable[..., Loss]
    whole_batch: bool


def build_objectives(
    config: Mapping[str, Mapping[str, Any]], model: ModelConfig, tokenizer: TextTokenizer
) -> tuple[Objective, ...]:
    """The terms of `config.objectives` with a positive weight.

    Raises InputError where a term needs a head that the model lacks.
    """
    objectives = []
    for name, options in config.items():
        arguments = dict(options)
        weight = arguments.pop("weight")
        if weight <= 0:
            continue
        function, head, whole_batch = KINDS[name]
        needed = [head]
        if name == "matching":
            if (negatives := arguments["negatives"]) not in NEGATIVES:
                raise InputError(
                    f"objectives.matching.negatives is {negatives!r}."
                    + near_misses(negatives, NEGATIVES)
                )
            # Hard negatives are drawn by the contrastive similarities.
            needed += ["embedding_width"] if negatives == "hard" else []
        if name == "masked_language":
            arguments |= {"mask_id": tokenizer.mask_id, "special_ids": tokenizer.special_ids}
        for field in needed:
            if not getattr(model, field):
                raise InputError(
                    f"objectives.{name} needs a head that the model lacks: set model.{field}."
                )
        objectives.append(Objective(name, weight, partial(function, **arguments), whole_batch))
    if not objectives:
        raise InputError("every weight in config.objectives is 0: there is nothing to train.")
    return tuple(objectives)


def compute_losses(
    objectives: tuple[Objective, ...],
    model: VisionLanguageModel,
    batch: Mapping[str, Array],
    key: Key[Array, ""],
    dropout_key: Key[Array, ""] | None = None,
) -> dict[str, Loss]:
    """Every objective's loss on one batch, encodings shared.

    `key` draws masks and negatives, by example; `dropout_key` dropout (None: evaluation).
    """
    features = Features(model, batch, dropout_key)
    return {
        objective.name: objective.function(features, purpose_key(key, objective.name))
        for objective in objectives
    }


def total_loss(
    objectives: tuple[Objective, ...],
    losses: Mapping[str, Loss],
    weights: Mapping[str, Float[Array, ""]],
) -> Float[Array, ""]:
    """The weighted sum of the objectives' means: each sum over its weight in the whole batch."""
    terms = [
        objective.weight * losses[objective.name].total / weights[objective.name]
        for objective in objectives
    ]
    return jnp.stack(terms).sum()
