"""Distillation of what a model holds inside: its vectors, how they lie, and where it looks.

None of it has parameters of its own, so that any model may learn from any other.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, ClassVar

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float

from mmjax.attention import MASKED
from mmjax.attention_maps import SelfAttention
from mmjax.errors import InputError, near_misses
from mmjax.models.heads import unit
from mmjax.objectives.distillation import Distillation, teacher_of
from mmjax.objectives.features import Features
from mmjax.objectives.loss import Loss, weighted

# What an example is to a model: in the contrastive space, and out of its encoders and its fusion.
VECTORS: dict[str, Callable[[Features], Float[Array, "batch width"]]] = {
    "image_embedding": lambda features: features.image_embedding,
    "text_embedding": lambda features: features.text_embedding,
    "image": lambda features: features.image.pooled,
    "text": lambda features: features.text.pooled,
    "fusion": lambda features: features.fused.pooled,
}
ATTENTIONS = ("image", "text", "fusion")


@dataclass(frozen=True)
class VectorDistillation(Distillation):
    """The vectors that stand for an example; losses of several add up."""

    of: tuple[str, ...] = ("image_embedding", "text_embedding")  # keys of VECTORS

    @property
    def teacher_reads(self) -> bool:
        """Not where pictures alone are compared."""
        return any(not name.startswith("image") for name in self.of)

    def check(self, name: str, model: Any) -> None:
        """Embeddings are those of a contrastive head."""
        super().check(name, model)
        check_names(f"objectives.{name}.of", self.of, VECTORS)
        if self._parts and getattr(model, "contrastive", None) is None:
            raise InputError(
                f"objectives.{name}.of is {self.of}, but the model has no contrastive head: set "
                "model.embedding_width, or compare 'image', 'text' or 'fusion'."
            )

    @property
    def _parts(self) -> tuple[str, ...]:
        return ("contrastive",) if any(name.endswith("embedding") for name in self.of) else ()

    def _vectors(self, features: Features) -> list[tuple[str, Array, Array]]:
        """Name, the student's and the teacher's."""
        teacher = teacher_of(features, *self._parts)
        return [(name, VECTORS[name](features), VECTORS[name](teacher)) for name in self.of]


@dataclass(frozen=True)
class EmbeddingDistillation(VectorDistillation):
    """Where the teacher puts an example, the student shall put it, in a space of the same width."""

    formula: ClassVar[str] = "‖x / ‖x‖ − x′ / ‖x′‖‖² = 2 − 2 cos(x, x′), x′ the teacher's"
    source: ClassVar[str] = "Yang et al. 2024, CLIP-KD, feature distillation"

    def __call__(self, features: Features, key: jax.Array) -> Loss:
        """Nothing is left to chance."""
        losses = []
        for name, student, teacher in self._vectors(features):
            if student.shape != teacher.shape:
                raise InputError(
                    f"{name} has the width {student.shape[-1]} here and {teacher.shape[-1]} in the "
                    "teacher: make them equal, or take objectives.relation_distillation, which "
                    "compares vectors of any width."
                )
            losses.append(squared_distance(student, teacher))
        return Loss(*weighted(jnp.stack(losses).sum(axis=0), features.batch["valid"]))


@dataclass(frozen=True)
class RelationDistillation(VectorDistillation):
    """How the examples of a batch lie to one another, whatever the widths of the two spaces.

    Rows of unit length differ by 2 at most: the loss is below 4 / B, so its weight has to be large.
    """

    formula: ClassVar[str] = "1/B² ‖G − G′‖²_F, G = X Xᵀ with rows of unit length, G′ the teacher's"
    source: ClassVar[str] = "Tung and Mori 2019, Similarity-Preserving Distillation, section 3"
    compares_examples: ClassVar[bool] = True

    def __call__(self, features: Features, key: jax.Array) -> Loss:
        """Nothing is left to chance."""
        valid = features.batch["valid"]
        losses = [
            relation_distance(student, teacher, valid)
            for _, student, teacher in self._vectors(features)
        ]
        return Loss(*weighted(jnp.stack(losses).sum(axis=0), valid))


@dataclass(frozen=True)
class AttentionDistillation(Distillation):
    """Where tokens look: the self-attention of the last layers, at any depth and width.

    Of a fusion that is the attention of each of its streams to itself. Where both models have the
    same number of heads, head is compared with head, and else the mean over heads with the mean.
    """

    of: tuple[str, ...] = ("image", "text", "fusion")

    formula: ClassVar[str] = "mean over heads a and tokens t of KL(A′ₐₜ ‖ Aₐₜ), A′ the teacher's"
    source: ClassVar[str] = "Wang et al. 2020, MiniLM, section 3.1"

    @property
    def teacher_reads(self) -> bool:
        """Not where pictures alone are compared."""
        return self.of != ("image",)

    def check(self, name: str, model: Any) -> None:
        """The parts are known; whether they fit the teacher's is seen when they run."""
        super().check(name, model)
        check_names(f"objectives.{name}.of", self.of, ATTENTIONS)

    def __call__(self, features: Features, key: jax.Array) -> Loss:
        """Nothing is left to chance."""
        teacher, valid = teacher_of(features), features.batch["valid"]
        losses = []
        for part in self.of:
            pairs = _comparable(part, features.attention(part), teacher.attention(part), len(valid))
            losses.append(jnp.stack([attention_divergence(*pair) for pair in pairs]).mean(axis=0))
        return Loss(*weighted(jnp.stack(losses).sum(axis=0), valid))


def squared_distance(
    student: Float[Array, "batch width"], teacher: Float[Array, "batch width"]
) -> Float[Array, " batch"]:
    """Between unit vectors: 2 − 2 cos. No gradient reaches the teacher."""
    return jnp.square(unit(student) - jax.lax.stop_gradient(unit(teacher))).sum(axis=-1)


def relation_distance(
    student: Float[Array, "batch width"],
    teacher: Float[Array, "batch teacher_width"],
    valid: Bool[Array, " batch"],
) -> Float[Array, " batch"]:
    """Each row's share of (1/B²) ‖G − G′‖² times B; B valid rows, and the others take no part.

    G is the Gram matrix of a batch's vectors, its rows brought to unit length (Tung and Mori 2019,
    section 3). No gradient reaches the teacher.
    """

    def relations(x):
        x = jnp.where(valid[:, None], x.astype(jnp.float32), 0)
        return unit(jnp.matmul(x, x.T, precision=jax.lax.Precision.HIGHEST))

    difference = relations(student) - jax.lax.stop_gradient(relations(teacher))
    return jnp.square(difference).sum(axis=-1) / jnp.maximum(valid.sum(), 1)


def attention_divergence(student: SelfAttention, teacher: SelfAttention) -> Float[Array, " batch"]:
    """KL(teacher's attention ‖ student's), its mean over heads and tokens (MiniLM, section 3.1).

    Both are taken over what both may look at: padding takes no part, neither as what is looked at
    nor as who looks. No gradient reaches the teacher.
    """
    visible = student.visible & teacher.visible
    log_q, log_p = (
        jax.nn.log_softmax(jnp.where(visible[:, None], attention.scores, MASKED))
        for attention in (student, teacher)
    )
    if log_q.shape != log_p.shape:
        log_q, log_p = (
            jax.nn.logsumexp(x, axis=1, keepdims=True) - jnp.log(x.shape[1]) for x in (log_q, log_p)
        )
    log_p = jax.lax.stop_gradient(log_p)
    of_tokens = (jnp.exp(log_p) * (log_p - log_q)).sum(axis=-1).mean(axis=1)
    # A token that may not even look at itself is none.
    real = jnp.broadcast_to(jnp.diagonal(visible, axis1=1, axis2=2), of_tokens.shape)
    return jnp.where(real, of_tokens, 0).sum(axis=1) / jnp.maximum(real.sum(axis=1), 1)


def check_names(key: str, names: tuple[str, ...], known: Any) -> None:
    """Raise InputError where a list of parts is empty or names an unknown one."""
    if not names:
        raise InputError(f"{key} is empty: name some of {', '.join(known)}.")
    for name in names:
        if name not in known:
            raise InputError(f"{key} names {name!r}.{near_misses(name, known)}")


def _comparable(
    part: str, student: list[SelfAttention], teacher: list[SelfAttention], rows: int
) -> list[tuple[SelfAttention, SelfAttention]]:
    """Pairs of maps. Raises InputError where the two models look in different ways."""
    shapes = [[(len(x.scores), x.scores.shape[-1]) for x in maps] for maps in (student, teacher)]
    if not shapes[0] or shapes[0] != shapes[1] or shapes[0][0][0] != rows:
        ours, theirs = (
            " and ".join(f"{count} × {tokens} tokens" for count, tokens in maps) or "nothing"
            for maps in shapes
        )
        raise InputError(
            f"attention maps of {part!r} cannot be compared: for {rows} examples the model attends "
            f"over {ours} in its last layer, and the teacher over {theirs}. Take parts with the "
            "same patches, class token and kind of fusion, or leave it out of "
            "objectives.attention_distillation.of."
        )
    return list(zip(student, teacher, strict=True))
