"""Visual question answering as generation: every answer that people gave, word by word."""

from dataclasses import dataclass
from typing import ClassVar

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float

from mmjax.objectives.captioning import begun
from mmjax.objectives.features import Features
from mmjax.objectives.loss import Loss, weighted
from mmjax.objectives.masked_language import word_loss
from mmjax.objectives.momentum_distillation import MomentumDistilled


@dataclass(frozen=True)
class AnswerGeneration(MomentumDistilled):
    """Cross-entropy of all answers to a question, each weighted by the share of people who gave it.

    An answer's loss is the sum over its words, not the mean: that is -log p of the answer. BLIP's
    smooths by 0.1 and begins with [DEC].
    """

    smoothing: float = 0.0  # of the labels
    start_id: int = -1  # the token that takes the place of an answer's first; -1: none does

    formula: ClassVar[str] = (
        "−Σₐ weightₐ Σₜ log p(wₐₜ | wₐ₍<t₎, question, picture), mean over questions"
    )
    source: ClassVar[str] = "Li et al. 2021, ALBEF, section 5 (VQA), with its published code"
    needs: ClassVar[tuple[str, ...]] = ("text_decoder",)
    fields: ClassVar[tuple[str, ...]] = ("answer_text", "answer_text_mask", "answer_weight")

    def __call__(self, features: Features, key: jax.Array) -> Loss:
        """Against the answers `answer_text [B,K,L]` of weights `answer_weight [B,K]`."""
        batch = features.batch
        targets, mask = batch["answer_text"][..., 1:], batch["answer_text_mask"][..., 1:]
        logits = self._logits(features)
        words = logits.reshape(-1, *logits.shape[2:]), targets.reshape(-1, targets.shape[2])
        losses = word_loss(*words, self.smoothing).reshape(targets.shape)
        losses = self.distilled(losses, logits, features, self._logits)
        weights = batch["answer_weight"] * batch["valid"][:, None]
        total = answer_loss(losses, mask, weights).sum()
        counted = weights[..., None] * mask
        metrics = {
            "answer_generation/accuracy": weighted(logits.argmax(axis=-1) == targets, counted)
        }
        weight = batch["valid"].sum().astype(jnp.float32)
        return Loss(total, weight, metrics, scores=(logits, counted))

    def _logits(self, features: Features) -> Float[Array, "batch answers length words"]:
        """Scores of every next word of every answer."""
        model, text = features.model, features.batch["answer_text"]
        context = model.answer_context(features.image, features.fused, features.text)
        batch, answers, length = text.shape
        rows = (batch * answers, length)
        logits = model.decode(
            jax.tree.map(lambda x: jnp.repeat(x, answers, axis=0), context),
            begun(text.reshape(rows), self.start_id)[:, :-1],
            features.batch["answer_text_mask"].reshape(rows)[:, :-1],
            key=features.dropout_key("answer_generation"),
        )
        return logits.reshape(batch, answers, length - 1, -1)


def answer_loss(
    word_losses: Float[Array, "batch answers length"],
    mask: Bool[Array, "batch answers length"],
    weights: Float[Array, "batch answers"],
) -> Float[Array, " batch"]:
    """Sums over the words of each answer, and over answers by their weights; of each question."""
    answers = jnp.where(mask, word_losses, 0).sum(axis=-1)
    return (weights * answers).sum(axis=-1)
