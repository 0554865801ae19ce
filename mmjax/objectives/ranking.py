"""Fine-tuning for retrieval: a pair that belongs together ranks above pairs that do not."""

from dataclasses import dataclass
from typing import ClassVar

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from mmjax.objectives.contrastive import same_image
from mmjax.objectives.features import Features
from mmjax.objectives.folds import pair_gumbel
from mmjax.objectives.loss import Loss, purpose_key, weighted
from mmjax.objectives.matching import interleave
from mmjax.objectives.objective import Objective
from mmjax.objectives.partners import fetch


def draw_partners(
    noise: Float[Array, "queries candidates"],
    allowed: Bool[Array, "queries candidates"],
    count: int,
) -> tuple[Int[Array, "queries drawn"], Bool[Array, "queries drawn"]]:
    """For each query `count` different candidates, each allowed set of them equally likely.

    Returns the candidates and whether they are allowed: where fewer are than are asked for, others
    fill up.
    """
    candidates = jax.lax.top_k(jnp.where(allowed, noise, -jnp.inf), count)[1]
    return candidates, jnp.take_along_axis(allowed, candidates, axis=1)


def ranking_loss(
    true: Float[Array, " batch"],
    false: Float[Array, "batch drawn"],
    allowed: Bool[Array, "batch drawn"],
) -> Float[Array, " batch"]:
    """Cross-entropy of the true pair among all that are allowed, by their scores."""
    return -jax.nn.log_softmax(_with_false(true, false, allowed))[:, 0]


def margin_loss(
    true: Float[Array, " batch"], false: Float[Array, "batch drawn"], margin: float
) -> Float[Array, "batch drawn"]:
    """By how much σ(true) fails to lie `margin` above σ(false) (UNITER, Chen et al. 2020, 4.1)."""
    return jax.nn.relu(margin + jax.nn.sigmoid(false) - jax.nn.sigmoid(true)[:, None])


@dataclass(frozen=True)
class Ranking(Objective):
    """Each picture with its own text and with false ones, of other pictures of the batch."""

    false_texts: int = 15

    formula: ClassVar[str] = "−log softmax₀(z₀, …, zₙ) of a true pair and n with false texts"
    source: ClassVar[str] = "Dou et al. 2022, METER; Kim et al. 2021, ViLT, section 4.4"
    needs: ClassVar[tuple[str, ...]] = ("ranking",)
    compares_examples: ClassVar[bool] = True

    def __call__(self, features: Features, key: jax.Array) -> Loss:
        """An example without any false text does not count."""
        true, false, allowed = score_pairs(features, key, texts=self.false_texts)
        counts = allowed.any(axis=1)
        total, weight = weighted(ranking_loss(true, false, allowed), counts)
        scores = _with_false(true, false, allowed)
        metrics = {"ranking/accuracy": weighted(scores.argmax(axis=1) == 0, counts)}
        return Loss(total, weight, metrics, scores=(scores, counts.astype(jnp.float32)))


@dataclass(frozen=True)
class MarginRanking(Objective):
    """Each pair before pairs of which one side is another example's, by a margin."""

    false_texts: int = 1
    false_images: int = 1
    margin: float = 0.2

    formula: ClassVar[str] = "max(0, m + σ(z⁻) − σ(z⁺)), mean over false pairs"
    source: ClassVar[str] = "Chen et al. 2020, UNITER, section 4.1"
    needs: ClassVar[tuple[str, ...]] = ("ranking",)
    compares_examples: ClassVar[bool] = True

    def __call__(self, features: Features, key: jax.Array) -> Loss:
        """One term a false pair."""
        true, false, allowed = score_pairs(features, key, self.false_texts, self.false_images)
        total, weight = weighted(margin_loss(true, false, self.margin), allowed)
        metrics = {"margin_ranking/accuracy": weighted(false < true[:, None], allowed)}
        scores = _with_false(true, false, allowed)
        terms = allowed.sum(axis=1).astype(jnp.float32)
        return Loss(total, weight, metrics, scores=(scores, terms))


def score_pairs(
    features: Features, key: jax.Array, texts: int = 0, images: int = 0
) -> tuple[Float[Array, " batch"], Float[Array, "batch drawn"], Bool[Array, "batch drawn"]]:
    """Scores of each example's pair, of it with false texts and of it with false pictures.

    These are drawn evenly from the batch, by example; the same picture, and so its other captions,
    is never false. The last array says which of the false pairs count.
    """
    batch, image, text = features.batch, features.image, features.text
    valid, index = batch["valid"], batch["index"]
    allowed = ~same_image(batch["image_id"]) & valid[None, :] & valid[:, None]

    def draw(purpose, count):
        noise = pair_gumbel(purpose_key(key, purpose), index, index)
        return draw_partners(noise, allowed, min(count, len(valid) - 1))

    false_texts, texts_allowed = draw("false texts", texts)
    false_images, images_allowed = draw("false pictures", images)
    other_texts = [fetch(text, rows) for rows in false_texts.T]
    other_images = [fetch(image, rows) for rows in false_images.T]
    fused = features.fuse(
        interleave(image, *[image] * len(other_texts), *other_images),
        interleave(text, *other_texts, *[text] * len(other_images)),
        "ranking",
    )
    scores = features.model.rank(fused).reshape(len(valid), -1)
    return scores[:, 0], scores[:, 1:], jnp.concatenate([texts_allowed, images_allowed], axis=1)


def _with_false(true, false, allowed):
    return jnp.concatenate([true[:, None], jnp.where(allowed, false, -1e30)], axis=1)
