"""Image-text matching (ITM) with hard negatives from the batch."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int, Key, Shaped

from mmjax.errors import InputError, near_misses
from mmjax.models import Encoded
from mmjax.objectives.features import Features
from mmjax.objectives.folds import Draw
from mmjax.objectives.loss import Loss, purpose_key, weighted
from mmjax.objectives.objective import Objective
from mmjax.objectives.partners import fetch
from mmjax.objectives.walk import Scale, Side, walk

NEGATIVES = ("hard", "random")
DRAWN = {"image": "false texts", "text": "false pictures"}  # of each of the one, the other


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
    evenly then grows with the batch: about 1e-4 times its size, so most at 16,384 pairs.
    `smoothing` is that share itself.
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

    def prepare(self, features: Features, key: jax.Array) -> None:
        """Hard negatives are drawn in the walk of the contrastive loss, if there is one."""
        if self.negatives == "hard":
            for side, purpose in DRAWN.items():
                walk = features.walk(side, features.average is not None)
                walk.ask("negative", Draw(purpose_key(key, purpose), self.smoothing))

    def __call__(self, features: Features, key: jax.Array) -> Loss:
        """Three pairs an example; invalid rows and rows without a false partner do not count."""
        return match_triples(features, self.draw(features, key))

    def draw(self, features: Features, key: Key[Array, ""]) -> Negatives:
        """A false partner for each picture and for each text, by example.

        The other side is that of the moving average, where there is one (ALBEF, section 3.2).
        """
        if self.negatives == "random":
            keys = (purpose_key(key, purpose) for purpose in DRAWN.values())
            texts, images = (draw_evenly(features.batch, each) for each in keys)
        else:
            self.prepare(features, key)
            walks = (features.walk(side, features.average is not None) for side in DRAWN)
            texts, images = (walk.answer("negative") for walk in walks)
        return Negatives(*texts, *images)


def draw_evenly(
    batch: Mapping[str, Array], key: Key[Array, ""]
) -> tuple[Int[Array, " batch"], Bool[Array, " batch"]]:
    """For each row of the global batch one that shows another picture; whether there was any."""
    image_id, rows = batch["image_id"], jnp.arange(len(batch["image_id"]))
    alike = Side(jnp.zeros((len(rows), 0)), image_id, batch["valid"], batch["index"], rows)
    scale = Scale(jnp.ones(()), jnp.zeros(()))
    return walk(scale, alike, (alike,), (Draw(key, evenly=1.0),))[0]


def match_triples(features: Features, negatives: Negatives) -> Loss:
    """Is each pair, each picture with its false text, each text with its false picture a match?"""
    image, text = features.image, features.text
    fused = features.fuse(
        interleave(image, image, fetch(image, negatives.image)),
        interleave(text, fetch(text, negatives.text), text),
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
