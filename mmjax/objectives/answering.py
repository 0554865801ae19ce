"""Visual question answering as classification over a closed list of answers."""

from dataclasses import dataclass
from typing import ClassVar

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float

from mmjax.objectives.features import Features
from mmjax.objectives.loss import (
    Loss,
    Sum,
    cross_entropy,
    example_keys,
    purpose_key,
    weighted,
)
from mmjax.objectives.objective import Objective


@dataclass(frozen=True)
class Answering(Objective):
    """Score every answer for each question; the accuracy is the soft score of the best one."""

    formula: ClassVar[str] = "−Σₐ sₐ log σ(zₐ) + (1 − sₐ) log(1 − σ(zₐ)), mean over questions"
    source: ClassVar[str] = "Teney et al. 2018, eq. 2"
    needs: ClassVar[tuple[str, ...]] = ("answering",)
    fields: ClassVar[tuple[str, ...]] = ("answer",)

    def __call__(self, features: Features, key: jax.Array) -> Loss:
        """Against the soft scores `answer [B,A]`."""
        batch = features.batch
        logits, targets = features.model.score_answers(features.fused), batch["answer"]
        total, weight = weighted(soft_binary_cross_entropy(logits, targets), batch["valid"])
        metrics = {"answering/accuracy": _accuracy(logits, targets, batch["valid"])}
        return Loss(total, weight, metrics, scores=(logits, batch["valid"].astype(jnp.float32)))


@dataclass(frozen=True)
class AnswerLabels(Objective):
    """Name one answer of each question that has any: drawn, by its share of the soft scores.

    LXMERT's pre-training on questions, and fine-tuning where each has a single answer (GQA). LXMERT
    asks in the pass with masked words and regions, and of its own pairs alone; here nothing is
    masked.
    """

    formula: ClassVar[str] = "−log softmaxₐ(z), a drawn with probability sₐ / Σ s, mean over them"
    source: ClassVar[str] = "Tan and Bansal 2019, LXMERT, section 3.1.3, with its published code"
    needs: ClassVar[tuple[str, ...]] = ("answering",)
    fields: ClassVar[tuple[str, ...]] = ("answer",)

    def __call__(self, features: Features, key: jax.Array) -> Loss:
        """Against an answer of the soft scores `answer [B,A]`; rows without one do not count."""
        batch = features.batch
        logits, scores = features.model.score_answers(features.fused), batch["answer"]
        keys = example_keys(purpose_key(key, "answers"), batch["index"])
        labels = jax.vmap(jax.random.categorical)(keys, jnp.log(scores))
        answered = batch["valid"] & (scores > 0).any(axis=1)
        total, weight = weighted(cross_entropy(logits, labels), answered)
        metrics = {"answer_labels/accuracy": _accuracy(logits, scores, answered)}
        return Loss(total, weight, metrics, scores=(logits, answered.astype(jnp.float32)))


def _accuracy(
    logits: Float[Array, "batch answers"],
    targets: Float[Array, "batch answers"],
    counted: Bool[Array, " batch"],
) -> Sum:
    """The soft scores of the best answers."""
    best = logits.argmax(axis=-1)
    return weighted(jnp.take_along_axis(targets, best[:, None], axis=1)[:, 0], counted)


def soft_binary_cross_entropy(
    logits: Float[Array, "batch answers"], targets: Float[Array, "batch answers"]
) -> Float[Array, " batch"]:
    """Binary cross-entropy against soft scores, summed over answers (Teney et al. 2018, eq. 2).

    METER's and UNITER's "mean × number of answers" is the same sum.
    """
    return -(
        targets * jax.nn.log_sigmoid(logits) + (1 - targets) * jax.nn.log_sigmoid(-logits)
    ).sum(axis=-1)
