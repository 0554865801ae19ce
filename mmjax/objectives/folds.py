"""What a `Walk` makes of the scores of a row with all candidates of the global batch.

Each fold is the streaming form of a formula over the whole row: softmaxes keep their largest logit
and the sum of exponentials relative to it (Milakov and Gimelshein 2018, "Online normalizer
calculation for softmax").
"""

from dataclasses import dataclass, field
from typing import Any, ClassVar, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int, Key

from mmjax.objectives.loss import example_keys, purpose_key
from mmjax.objectives.walk import Fold, Pairs, Side

LOW = -1e30  # a logit of nothing: exp() of it is zero, and no difference to it is infinite


class Softmax(NamedTuple):
    """The normaliser of a softmax, as far as it has been seen."""

    largest: Float[Array, " rows"]
    total: Float[Array, " rows"]  # of exp(logit − largest)

    @classmethod
    def start(cls, rows: Side) -> "Softmax":
        """Of nothing."""
        return cls(jnp.full(rows.valid.shape, LOW), jnp.zeros(rows.valid.shape))

    def add(
        self, logits: Float[Array, "rows candidates"], there: Bool[Array, " candidates"]
    ) -> "Softmax":
        """With further candidates; those that are not `there` take no part."""
        logits = jnp.where(there, logits, LOW)
        largest = jnp.maximum(self.largest, logits.max(axis=1))
        # (at LOW itself everything is 1: nothing may be there yet)
        new = jnp.where(there, jnp.exp(logits - largest[:, None]), 0).sum(axis=1)
        return Softmax(largest, self.total * jnp.exp(self.largest - largest) + new)

    @property
    def log_sum(self) -> Float[Array, " rows"]:
        """Log Σ exp(logit)."""
        return self.largest + jnp.log(jnp.maximum(self.total, 1e-30))

    def shares(
        self, logits: Float[Array, "rows candidates"], there: Bool[Array, " candidates"]
    ) -> Float[Array, "rows candidates"]:
        """The softmax at some candidates, once all have been seen."""
        return jnp.where(there, jnp.exp(logits - self.log_sum[:, None]), 0)


class Mean(NamedTuple):
    """Of chosen logits."""

    total: Float[Array, " rows"]
    number: Float[Array, " rows"]

    def add(
        self, logits: Float[Array, "rows candidates"], chosen: Bool[Array, "#rows candidates"]
    ) -> "Mean":
        """With further candidates."""
        total = self.total + jnp.where(chosen, logits, 0).sum(axis=1)
        return Mean(total, self.number + chosen.sum(axis=1))

    @property
    def value(self) -> Float[Array, " rows"]:
        """Zero where there was nothing."""
        return self.total / jnp.maximum(self.number, 1)

    def shares(self, chosen: Bool[Array, "#rows candidates"]) -> Float[Array, "#rows candidates"]:
        """Their gradient by logits."""
        return chosen / jnp.maximum(self.number, 1)[:, None]


def _no_mean(rows: Side) -> Mean:
    return Mean(jnp.zeros(rows.valid.shape), jnp.zeros(rows.valid.shape))


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class InfoNce(Fold):
    """`mmjax.objectives.contrastive.info_nce` of every row, [rows]."""

    smoothing: float = field(default=0.0, metadata={"static": True})

    def start(self, rows: Side) -> Any:
        """Of nothing."""
        return Softmax.start(rows), _no_mean(rows), _no_mean(rows)

    def add(self, state: Any, pairs: Pairs) -> Any:
        """The normaliser, and the means over positives and over all."""
        softmax, positive, every = state
        there = pairs.candidates.valid
        return (
            softmax.add(pairs.logits, there),
            positive.add(pairs.logits, pairs.positive),
            every.add(pairs.logits, there[None]),
        )

    def result(self, state: Any) -> Float[Array, " rows"]:
        """Cross-entropy with the smoothed target."""
        softmax, positive, every = state
        target = (1 - self.smoothing) * positive.value + self.smoothing * every.value
        return softmax.log_sum - target

    def slope(self, state: Any, pairs: Pairs) -> Float[Array, "rows candidates"]:
        """Softmax less target."""
        softmax, positive, every = state
        there = pairs.candidates.valid
        target = (1 - self.smoothing) * positive.shares(pairs.positive)
        target = target + self.smoothing * every.shares(there[None])
        return softmax.shares(pairs.logits, there) - target


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Sigmoid(Fold):
    """`mmjax.objectives.contrastive.sigmoid_loss` of every row, [rows]."""

    def start(self, rows: Side) -> Any:
        """Of nothing."""
        return jnp.zeros(rows.valid.shape)

    def add(self, state: Any, pairs: Pairs) -> Any:
        """A sum over pairs."""
        terms = jax.nn.log_sigmoid(self._signs(pairs) * pairs.logits)
        return state - jnp.where(pairs.candidates.valid, terms, 0).sum(axis=1)

    def result(self, state: Any) -> Float[Array, " rows"]:
        """The sum."""
        return state

    def slope(self, state: Any, pairs: Pairs) -> Float[Array, "rows candidates"]:
        """−z σ(−z · logit)."""
        signs = self._signs(pairs)
        slope = -signs * jax.nn.sigmoid(-signs * pairs.logits)
        return jnp.where(pairs.candidates.valid, slope, 0)

    def _signs(self, pairs):
        return jnp.where(pairs.positive, 1.0, -1.0)


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Taught(Fold):
    """Cross-entropy of every row with the softmax of its teacher, [rows] (ALBEF's soft targets)."""

    def start(self, rows: Side) -> Any:
        """Of nothing."""
        zeros = jnp.zeros(rows.valid.shape)
        return Softmax.start(rows), Softmax.start(rows), zeros

    def add(self, state: Any, pairs: Pairs) -> Any:
        """Both normalisers, and the mean logit by the teacher's softmax so far."""
        softmax, teacher, mean = state
        there = pairs.candidates.valid
        after = teacher.add(pairs.teacher, there)
        kept = teacher.total * jnp.exp(teacher.largest - after.largest)
        new = jnp.where(there, jnp.exp(pairs.teacher - after.largest[:, None]) * pairs.logits, 0)
        mean = (kept * mean + new.sum(axis=1)) / jnp.maximum(after.total, 1e-30)
        return softmax.add(pairs.logits, there), after, mean

    def result(self, state: Any) -> Float[Array, " rows"]:
        """−Σ teacher · log softmax."""
        softmax, _, mean = state
        return softmax.log_sum - mean

    def slope(self, state: Any, pairs: Pairs) -> Float[Array, "rows candidates"]:
        """Softmax less that of the teacher, which is not taught."""
        softmax, teacher, _ = state
        there = pairs.candidates.valid
        return softmax.shares(pairs.logits, there) - teacher.shares(pairs.teacher, there)


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Hit(Fold):
    """Whether the best candidate of a row is one of its positives, bool [rows]."""

    learns: ClassVar[bool] = False

    def start(self, rows: Side) -> Any:
        """No best candidate."""
        return jnp.full(rows.valid.shape, -jnp.inf), jnp.zeros(rows.valid.shape, bool)

    def add(self, state: Any, pairs: Pairs) -> Any:
        """The better of the best."""
        scores = jnp.where(pairs.candidates.valid, pairs.logits, -jnp.inf)
        return _better(state, scores, pairs.positive)

    def result(self, state: Any) -> Bool[Array, " rows"]:
        """Of the best of all."""
        return state[1]


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Draw(Fold):
    """A candidate of another picture for every row: its row [rows], and whether there was any.

    It is drawn from softmax(logits) over the valid candidates of this batch that show another
    picture (Li et al. 2021, ALBEF, section 3.2), as the largest sum of a logit and Gumbel noise,
    which needs no normaliser. With probability `evenly` it is drawn evenly from them instead.
    """

    key: Any  # Key[Array, ""] (in a tree of anything that JAX makes of it)
    evenly: float = field(default=0.0, metadata={"static": True})

    learns: ClassVar[bool] = False

    def start(self, rows: Side) -> Any:
        """No best candidate by either way of drawing."""
        best = jnp.full(rows.valid.shape, -jnp.inf), jnp.zeros(rows.valid.shape, jnp.int32)
        even = jax.vmap(jax.random.uniform)(
            example_keys(purpose_key(self.key, "even"), rows.example)
        )
        return best, even < self.evenly

    def add(self, state: Any, pairs: Pairs) -> Any:
        """The better of the best."""
        best, even = state
        rows, others = pairs.rows, pairs.candidates
        allowed = (others.valid & (others.row >= 0)) & rows.valid[:, None]
        allowed &= rows.image_id[:, None] != others.image_id
        scores = jnp.where(even[:, None], 0, pairs.logits)
        scores = scores + pair_gumbel(self.key, rows.example, others.example)
        scores = jnp.where(allowed, scores, -jnp.inf)
        return _better(best, scores, jnp.broadcast_to(others.row, scores.shape)), even

    def result(self, state: Any) -> tuple[Int[Array, " rows"], Bool[Array, " rows"]]:
        """The best of all."""
        (best, chosen), _ = state
        return chosen, best > -jnp.inf


def pair_gumbel(
    key: Key[Array, ""], rows: Int[Array, " queries"], columns: Int[Array, " candidates"]
) -> Float[Array, "queries candidates"]:
    """Gumbel noise that belongs to a pair of examples, whatever rows of the batch they came in."""

    def bits(row, column):
        folded = jax.random.fold_in(jax.random.fold_in(key, row), column)
        return jax.random.key_data(folded)[0]

    pair_bits = jax.vmap(jax.vmap(bits, (None, 0)), (0, None))(rows, columns)
    # Odd multiples of 2⁻²⁴: float32 holds them exactly, and neither 0 nor 1 is among them.
    uniform = (pair_bits >> 9).astype(jnp.float32) * 2**-23 + 2**-24
    return -jnp.log(-jnp.log(uniform))


def _better(state, scores, labels):
    """The largest score so far, and the label it came with."""
    best, label = state
    place = scores.argmax(axis=1)[:, None]
    score = jnp.take_along_axis(scores, place, axis=1)[:, 0]
    new = jnp.take_along_axis(labels, place, axis=1)[:, 0]
    return jnp.maximum(best, score), jnp.where(score > best, new, label)
