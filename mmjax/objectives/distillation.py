"""Distillation of scores: a student learns what a teacher says of the same batch.

The teacher is `features.reference`, the model of `config.teacher`: it runs without dropout, and no
gradient reaches it. What it holds of the batch inside is learnt by `feature_distillation`.
"""

from dataclasses import dataclass
from typing import Any, ClassVar

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Shaped

from mmjax.errors import InputError
from mmjax.objectives.features import Features
from mmjax.objectives.loss import Loss, weighted
from mmjax.objectives.matching import Matching, match_triples
from mmjax.objectives.objective import Objective


@dataclass(frozen=True)
class Distillation(Objective):
    """An objective that learns from a teacher."""

    needs_reference: ClassVar[bool] = True

    @property
    def teacher_reads(self) -> bool:
        """Whether the teacher reads the texts, so that its token ids have to mean the same."""
        return True


@dataclass(frozen=True)
class ScoreDistillation(Distillation):
    """Scores of a softmax or sigmoid, at a temperature that brings out the improbable ones."""

    temperature: float = 1.0  # both models' scores are divided by it

    def check(self, name: str, model: Any) -> None:
        """Scores are divided by the temperature."""
        super().check(name, model)
        if self.temperature <= 0:
            raise InputError(
                f"objectives.{name}.temperature is {self.temperature}; it is a number above 0."
            )


@dataclass(frozen=True)
class SimilarityDistillation(ScoreDistillation):
    """Who resembles whom in the batch: the texts to each picture, and the pictures to each text.

    Each model's similarities have its own scale. TinyCLIP adds up both ways, CLIP-KD and this take
    their mean.
    """

    formula: ClassVar[str] = "½ T² [KL(p(t|i) ‖ q(t|i)) + KL(p(i|t) ‖ q(i|t))], p the teacher's"
    source: ClassVar[str] = "Wu et al. 2023, TinyCLIP, section 3.1; Yang et al. 2024, CLIP-KD"
    needs: ClassVar[tuple[str, ...]] = ("contrastive",)
    compares_examples: ClassVar[bool] = True

    def __call__(self, features: Features, key: jax.Array) -> Loss:
        """Nothing is left to chance."""
        student = features.similarity_logits
        teacher = teacher_of(features, *self.needs).similarity_logits
        valid = features.batch["valid"]
        losses = similarity_divergence(student, teacher, valid, self.temperature)
        there = jnp.where(valid, 0, -jnp.inf)
        return _loss("similarity_distillation", losses, valid, student + there, teacher + there)


@dataclass(frozen=True)
class MatchingDistillation(ScoreDistillation, Matching):
    """Whether a text belongs to a picture, asked of true and of false pairs as in `Matching`."""

    formula: ClassVar[str] = "T² KL(p(match) ‖ q(match)) of B true pairs and 2 B false ones"
    source: ClassVar[str] = "Hinton et al. 2015, section 2"

    def __call__(self, features: Features, key: jax.Array) -> Loss:
        """The student's similarities choose hard false pairs, and the teacher judges the same."""
        negatives, teacher = self.draw(features, key), teacher_of(features, *self.needs)
        ours, theirs = (match_triples(each, negatives).scores for each in (features, teacher))
        assert ours is not None
        assert theirs is not None
        (student_logits, weights), (teacher_logits, _) = ours, theirs
        losses = divergence(student_logits, teacher_logits, self.temperature)
        return _loss("matching_distillation", losses, weights, student_logits, teacher_logits)


@dataclass(frozen=True)
class WordDistillation(ScoreDistillation):
    """The words behind the masks: both models guess them in the same masked text."""

    formula: ClassVar[str] = "T² KL(p(w) ‖ q(w)), mean over masked tokens"
    source: ClassVar[str] = "Hinton et al. 2015, section 2; Sanh et al. 2019, DistilBERT"
    needs: ClassVar[tuple[str, ...]] = ("masked_language",)

    def __call__(self, features: Features, key: jax.Array) -> Loss:
        """Which words are hidden is `features.masking`'s."""
        # Tables may have rows beyond the vocabulary, and not both as many.
        words = features.tokenizer.vocabulary_size
        student, teacher = (
            each.model.score_words(each.words_masked.fused.text_tokens)[..., :words]
            for each in (features, teacher_of(features, *self.needs))
        )
        losses = divergence(student, teacher, self.temperature)
        chosen = features.words_masked.chosen
        return _loss("word_distillation", losses, chosen, student, teacher)


@dataclass(frozen=True)
class AnswerDistillation(ScoreDistillation):
    """How good each answer of a closed list is, each answer on its own."""

    formula: ClassVar[str] = "T² Σₐ KL(Bernoulli(pₐ) ‖ Bernoulli(qₐ)), mean over questions"
    source: ClassVar[str] = "Hinton et al. 2015, section 2, with sigmoids"
    needs: ClassVar[tuple[str, ...]] = ("answering",)

    def __call__(self, features: Features, key: jax.Array) -> Loss:
        """Nothing is left to chance. Both models have the same list, in the same order."""
        reference = teacher_of(features, *self.needs)
        lists = [model.config.answers for model in (features.model, reference.model)]
        if lists[0] != lists[1]:
            raise InputError(
                f"the teacher chooses among {len(lists[1])} answers and the model among "
                f"{len(lists[0])}, and they are not the same: set model.answers to the teacher's."
            )
        student = features.model.score_answers(features.fused)
        teacher = reference.model.score_answers(reference.fused)
        losses = binary_divergence(student, teacher, self.temperature)
        return _loss("answer_distillation", losses, features.batch["valid"], student, teacher)


def divergence(
    student: Float[Array, "*rows classes"],
    teacher: Float[Array, "*rows classes"],
    temperature: float = 1.0,
) -> Float[Array, "*rows"]:
    """T² KL(softmax(teacher / T) ‖ softmax(student / T)); no gradient reaches the teacher.

    Hinton et al. 2015, section 2: equation 1 is the softmax at a temperature, and the square keeps
    the gradient's size as the temperature rises.
    """
    log_q = jax.nn.log_softmax(student.astype(jnp.float32) / temperature)
    log_p = jax.lax.stop_gradient(jax.nn.log_softmax(teacher.astype(jnp.float32) / temperature))
    return temperature**2 * (jnp.exp(log_p) * (log_p - log_q)).sum(axis=-1)


def binary_divergence(
    student: Float[Array, "batch answers"],
    teacher: Float[Array, "batch answers"],
    temperature: float = 1.0,
) -> Float[Array, " batch"]:
    """`divergence` of each answer's yes from its no, summed over answers."""
    return divergence(_yes_and_no(student), _yes_and_no(teacher), temperature).sum(axis=-1)


def _yes_and_no(scores):
    return jnp.stack([scores, jnp.zeros_like(scores)], axis=-1)


def similarity_divergence(
    student: Float[Array, "pictures texts"],
    teacher: Float[Array, "pictures texts"],
    valid: Bool[Array, " pictures"],
    temperature: float = 1.0,
) -> Float[Array, " pictures"]:
    """The mean of `divergence` over the texts to a picture and over the pictures to its text.

    Yang et al. 2024, CLIP-KD, "contrastive relational distillation". Invalid rows take no part.
    """

    def one_way(student, teacher):
        student, teacher = (jnp.where(valid, x, -1e30) for x in (student, teacher))
        return divergence(student, teacher, temperature)

    return (one_way(student, teacher) + one_way(student.T, teacher.T)) / 2


def teacher_of(features: Features, *parts: str) -> Features:
    """The teacher's features of the same batch.

    Raises InputError where there is no teacher, or it lacks one of the parts that are learnt from.
    """
    if features.reference is None:
        raise InputError("there is no teacher to learn from: set config.teacher.checkpoint.")
    for part in parts:
        if getattr(model := features.reference.model, part, None) is None:
            raise InputError(
                f"the teacher, a {type(model).__name__}, has no {part} to learn from: name another "
                "one in config.teacher.checkpoint, or distil something else."
            )
    return features.reference


def _loss(
    name: str,
    losses: Float[Array, "*rows"],
    weights: Shaped[Array, "*rows"],
    student: Float[Array, "*rows classes"],
    teacher: Float[Array, "*rows classes"],
) -> Loss:
    """The mean over rows, and how often both models put the same class first."""
    agree = student.argmax(axis=-1) == teacher.argmax(axis=-1)
    return Loss(*weighted(losses, weights), {f"{name}/agreement": weighted(agree, weights)})
