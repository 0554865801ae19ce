"""Masked language modelling (MLM) of the text, with the picture at hand."""

from dataclasses import dataclass
from typing import ClassVar

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from mmjax.objectives.features import Features
from mmjax.objectives.loss import Loss, weighted
from mmjax.objectives.momentum_distillation import MomentumDistilled
from mmjax.objectives.objective import Objective


@dataclass(frozen=True)
class MaskedLanguage(MomentumDistilled):
    """Cross-entropy of the words behind the masks, given the rest of the text and the picture.

    With `distill` also with what the moving average reads there (Li et al. 2021, ALBEF, equation
    7).
    """

    formula: ClassVar[str] = (
        "−(1 − α) log p(w | rest of the text, picture) + α H(p′, p), mean over masked tokens"
    )
    source: ClassVar[str] = "Devlin et al. 2019, BERT, section 3.1; Li et al. 2021, ALBEF, eq. 7"
    needs: ClassVar[tuple[str, ...]] = ("masked_language",)

    def __call__(self, features: Features, key: jax.Array) -> Loss:
        """Which words are hidden is `features.masking`'s."""
        logits = _logits(features)
        losses = word_loss(logits, features.batch["text"])
        losses = self.distilled(losses, logits, features, _logits)
        return _loss("masked_language", losses, logits, features)


@dataclass(frozen=True)
class MaskedLanguageAlone(Objective):
    """The same before the text has met its picture: BERT's objective, FLAVA's of texts."""

    formula: ClassVar[str] = "−log p(w | rest of the text), mean over masked tokens"
    source: ClassVar[str] = "Devlin et al. 2019, BERT, section 3.1"
    needs: ClassVar[tuple[str, ...]] = ("masked_text_alone",)

    def __call__(self, features: Features, key: jax.Array) -> Loss:
        """Which words are hidden is `features.masking`'s, the same as for MaskedLanguage."""
        logits = features.model.score_words_alone(features.words_masked.read.tokens)
        losses = word_loss(logits, features.batch["text"])
        return _loss("masked_language_alone", losses, logits, features)


def _logits(features: Features) -> Float[Array, "batch length words"]:
    return features.model.score_words(features.words_masked.fused.text_tokens)


def _loss(
    name: str,
    losses: Float[Array, "batch length"],
    logits: Float[Array, "batch length words"],
    features: Features,
) -> Loss:
    """The mean over masked words, with the accuracy and what there is to beat."""
    text, shown = features.batch["text"], features.words_masked.text
    chosen, counted = features.words_masked.chosen, features.maskable_words
    total, weight = weighted(losses, chosen)
    blind = unigram_hits(text, shown, counted, features.tokenizer.mask_id, logits.shape[-1])
    metrics = {
        f"{name}/accuracy": weighted(logits.argmax(axis=-1) == text, chosen),
        f"{name}/unigram_accuracy": weighted(blind, chosen),
    }
    return Loss(total, weight, metrics, scores=(logits, chosen.astype(jnp.float32)))


def unigram_hits(
    text: Int[Array, "batch length"],
    shown: Int[Array, "batch length"],
    counted: Bool[Array, "batch length"],
    mask_id: int,
    words: int,
) -> Float[Array, "batch length"]:
    """How often a guess is right that sees neither the picture nor the other words.

    It repeats the word that it is shown, and guesses the most frequent of `words` words at [MASK].
    How frequent that is follows from the words of the batch that are `counted`.
    """
    counts = jnp.zeros(words).at[text].add(counted)
    frequency = counts.max() / jnp.maximum(counts.sum(), 1)
    return jnp.where(shown == mask_id, frequency, shown == text)


def word_loss(
    logits: Float[Array, "batch length words"],
    text: Int[Array, "batch length"],
    smoothing: float = 0.0,
) -> Float[Array, "batch length"]:
    """Cross-entropy of each position's word.

    With label smoothing ε the target is 1 − ε of it and ε of all words evenly (Szegedy et al. 2016,
    section 7).
    """
    logits = logits.astype(jnp.float32)
    # (not by `log_softmax`, an array as large as the logits, which are the largest of a step)
    log_total = jax.nn.logsumexp(logits, axis=-1)
    loss = log_total - jnp.take_along_axis(logits, text[..., None], axis=-1)[..., 0]
    if not smoothing:
        return loss
    return (1 - smoothing) * loss + smoothing * (log_total - logits.mean(axis=-1))
