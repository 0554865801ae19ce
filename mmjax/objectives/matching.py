"""Image-text matching (ITM) with hard negatives from the batch."""

from dataclasses import dataclass
from typing import Any, ClassVar, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int, Key, Shaped

from mmjax.errors import InputError, near_misses
from mmjax.models import Encoded
from mmjax.objectives.contrastive import same_image
from mmjax.objectives.features import Features
from mmjax.objectives.loss import Loss, purpose_key, weighted
from mmjax.objectives.objective import Objective

NEGATIVES = ("hard", "random")


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


def sample_negatives(
    logits: Float[Array, "queries candidates"],
    allowed: Bool[Array, "queries candidates"],
    noise: Float[Array, "queries candidates"],
) -> tuple[Int[Array, " queries"], Bool[Array, " queries"]]:
    """One candidate a query, drawn from softmax(logits) over the allowed ones by Gumbel-max.

    Returns the candidates, and whether there was any to draw.
    """
    return jnp.where(allowed, logits + noise, -jnp.inf).argmax(axis=-1), allowed.any(axis=-1)


def negative_probabilities(
    logits: Float[Array, "queries candidates"],
    allowed: Bool[Array, "queries candidates"],
    smoothing: float = 0.0,
) -> Float[Array, "queries candidates"]:
    """How likely each candidate is to be drawn: softmax(logits) over the allowed ones.

    A share of `smoothing` is drawn evenly from them. Rows that allow none are zero.
    """
    hard = jax.nn.softmax(jnp.where(allowed, logits, -1e30))
    even = 1 / jnp.maximum(allowed.sum(axis=-1, keepdims=True), 1)
    return jnp.where(allowed, (1 - smoothing) * hard + smoothing * even, 0)


class Negatives(NamedTuple):
    """The false partners of a batch: rows of it, and whether there was one to draw."""

    text: Int[Array, " batch"]  # of each picture
    has_text: Bool[Array, " batch"]
    image: Int[Array, " batch"]  # of each text
    has_image: Bool[Array, " batch"]


@dataclass(frozen=True)
class Matching(Objective):
    """Does the text belong to the picture? B true pairs, and 2 B false ones.

    Every picture gets one false text and every text one false picture, drawn from the softmax of
    the similarities over the global batch (Li et al. 2021, ALBEF, section 3.2), which makes similar
    pairs likely; `negatives='random'` draws evenly. The same picture, and so its other captions, is
    never a negative. With one true pair in three, a model that knows nothing has a loss of 0.6365.

    BLIP adds 1e-4 to every probability, so that a draw is never impossible. How much is drawn
    evenly then grows with the batch: about 1e-4 times its size. `smoothing` is that share itself.
    """

    negatives: str = "hard"  # or 'random'
    smoothing: float = 0.0  # the share of hard negatives that are drawn evenly all the same

    formula: ClassVar[str] = "−log p(match) of B true pairs, −log p(no match) of 2 B false ones"
    source: ClassVar[str] = "Li et al. 2021, ALBEF, section 3.2"
    needs: ClassVar[tuple[str, ...]] = ("matching",)
    compares_examples: ClassVar[bool] = True

    def check(self, name: str, model: Any) -> None:
        """Hard negatives are drawn by the contrastive similarities; a share is a share."""
        super().check(name, model)
        if self.negatives not in NEGATIVES:
            raise InputError(
                f"objectives.{name}.negatives is {self.negatives!r}."
                + near_misses(self.negatives, NEGATIVES)
            )
        if self.negatives == "hard" and getattr(model, "contrastive", None) is None:
            raise InputError(
                f"objectives.{name}.negatives='hard' draws by the contrastive similarities: set "
                "model.embedding_width, or take negatives='random'."
            )
        if not 0 <= self.smoothing <= 1:
            raise InputError(f"objectives.{name}.smoothing is {self.smoothing}: take 0 ≤ … ≤ 1.")

    def __call__(self, features: Features, key: jax.Array) -> Loss:
        """Three pairs an example; invalid rows and rows without a false partner do not count."""
        return match_triples(features, self.draw(features, key))

    def draw(self, features: Features, key: Key[Array, ""]) -> Negatives:
        """A false partner for each picture and for each text, by example."""
        batch, index = features.batch, features.batch["index"]
        allowed = ~same_image(batch["image_id"]) & batch["valid"][None, :] & batch["valid"][:, None]
        image_to_text = text_to_image = jnp.zeros(allowed.shape, jnp.float32)
        if self.negatives == "hard":
            # The draw is no path for gradients.
            image_to_text, text_to_image = jax.lax.stop_gradient(features.negative_logits)

        def one_each(logits, purpose):
            log_p = jnp.log(negative_probabilities(logits, allowed, self.smoothing))
            noise = pair_gumbel(purpose_key(key, purpose), index, index)
            return sample_negatives(log_p, allowed, noise)

        false_texts = one_each(image_to_text, "false texts")
        return Negatives(*false_texts, *one_each(text_to_image, "false pictures"))


def match_triples(features: Features, negatives: Negatives) -> Loss:
    """Is each pair, each picture with its false text, each text with its false picture a match?"""
    image, text = features.image, features.text
    fused = features.fuse(
        interleave(image, image, image.take(negatives.image)),
        interleave(text, text.take(negatives.text), text),
        "matching",
    )
    logits = features.model.match(fused)
    labels = jnp.arange(len(logits)) % 3 == 0
    counted = features.batch["valid"], negatives.has_text, negatives.has_image
    weights = jnp.stack(counted, axis=1).reshape(-1)
    return loss_of_pairs("matching", logits, labels, weights)


def loss_of_pairs(
    name: str,
    logits: Float[Array, "pairs 2"],
    labels: Bool[Array, " pairs"],
    weights: Shaped[Array, " pairs"],
) -> Loss:
    """The mean over pairs, with the accuracy and the share of true ones.

    The metric `cross_entropy` is that mean, whatever an objective adds to its loss.
    """
    total, weight = weighted(matching_loss(logits, labels), weights)
    metrics = {
        f"{name}/cross_entropy": (total, weight),
        f"{name}/accuracy": weighted(logits.argmax(axis=-1) == labels, weights),
        f"{name}/positives": weighted(labels, weights),
    }
    return Loss(total, weight, metrics, scores=(logits, weights.astype(jnp.float32)))


def matching_loss(
    logits: Float[Array, "pairs 2"], labels: Bool[Array, " pairs"]
) -> Float[Array, " pairs"]:
    """Cross-entropy of two classes."""
    log_p = jax.nn.log_softmax(logits)
    return -jnp.where(labels, log_p[:, 1], log_p[:, 0])


def interleave(*parts: Encoded) -> Encoded:
    """Rows in turn, so that true pairs stay on the device that holds them."""
    return jax.tree.map(
        lambda *arrays: jnp.stack(arrays, axis=1).reshape(-1, *arrays[0].shape[1:]), *parts
    )
