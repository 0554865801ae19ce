"""Image-text contrastive learning (ITC): by a softmax, by a sigmoid, and token by token."""

from dataclasses import dataclass
from typing import Any, ClassVar

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from mmjax.errors import InputError
from mmjax.models.heads import unit
from mmjax.objectives.features import Features
from mmjax.objectives.folds import Hit, InfoNce, Sigmoid
from mmjax.objectives.geometry import geometry_metrics
from mmjax.objectives.loss import Loss, Sum, weighted
from mmjax.objectives.objective import Objective


@dataclass(frozen=True)
class Contrastive(Objective):
    """Symmetric InfoNCE over the global batch (Radford et al. 2021, CLIP, figure 3).

    Rows that show the same picture (equal `image_id`) are positives of one another. With
    `smoothing=0.1` the loss is ALIGN's (Jia et al. 2021, section 5). FLAVA's global contrastive
    loss (Singh et al. 2022, section 3.2) is this one, its gradient taken through the whole batch.
    """

    smoothing: float = 0.0  # the share of the target that is spread evenly over all candidates

    formula: ClassVar[str] = "−½ Σⱼ yᵢⱼ (log softmaxⱼ(s xᵢ·tⱼ) + log softmaxⱼ(s tᵢ·xⱼ))"
    source: ClassVar[str] = "Radford et al. 2021, CLIP, figure 3"
    needs: ClassVar[tuple[str, ...]] = ("contrastive",)
    compares_examples: ClassVar[bool] = True
    compares_embeddings: ClassVar[bool] = True

    def check(self, name: str, model: Any) -> None:
        """A share is a share."""
        super().check(name, model)
        if not 0 <= self.smoothing < 1:
            raise InputError(f"objectives.{name}.smoothing is {self.smoothing}: take 0 ≤ … < 1.")

    def prepare(self, features: Features, key: jax.Array) -> None:
        """Both ways."""
        for side in ("image", "text"):
            features.walk(side).ask("contrastive", InfoNce(self.smoothing))
        features.walk("image").ask("hit", Hit())

    def __call__(self, features: Features, key: jax.Array) -> Loss:
        """Nothing is left to chance."""
        self.prepare(features, key)
        of_images, of_texts = (
            features.walk(side).answer("contrastive") for side in ("image", "text")
        )
        return _loss("contrastive", features, (of_images + of_texts) / 2)


@dataclass(frozen=True)
class SigmoidContrastive(Objective):
    """Every pair of the global batch is a question of its own: do they belong together?

    The head has the scale and the bias; SigLIP's (`factor=10`, `logit_bias=True`) begin at 10 and
    −10. Captions of the same picture (equal `image_id`) belong to it as well.
    """

    formula: ClassVar[str] = "−Σⱼ log σ(zᵢⱼ (s xᵢ·tⱼ + b)), z = 1 for positives, else −1"
    source: ClassVar[str] = "Zhai et al. 2023, SigLIP, algorithm 1"
    needs: ClassVar[tuple[str, ...]] = ("contrastive",)
    compares_examples: ClassVar[bool] = True
    compares_embeddings: ClassVar[bool] = True

    def prepare(self, features: Features, key: jax.Array) -> None:
        """One way: the other one has the same pairs."""
        features.walk("image").ask("sigmoid_contrastive", Sigmoid())
        features.walk("image").ask("hit", Hit())

    def __call__(self, features: Features, key: jax.Array) -> Loss:
        """Nothing is left to chance."""
        self.prepare(features, key)
        losses = features.walk("image").answer("sigmoid_contrastive")
        return _loss("sigmoid_contrastive", features, losses)


@dataclass(frozen=True)
class TokenContrastive(Contrastive):
    """InfoNCE over similarities of tokens: each picks the most similar one of the other side.

    All pairs' similarities are held at once, [B, B] split by rows.

    Tokens are the picture's patches without their class token, and all of a text that is no
    padding: the paper leaves out nothing else, so [CLS] and [SEP] take part. They go through the
    contrastive head's projections.
    """

    formula: ClassVar[str] = "InfoNCE of meanₖ maxᵣ xᵢₖ·tⱼᵣ and of meanᵣ maxₖ xⱼₖ·tᵢᵣ"
    source: ClassVar[str] = "Yao et al. 2022, FILIP, eq. 3-5"
    compares_embeddings: ClassVar[bool] = False

    def prepare(self, features: Features, key: jax.Array) -> None:
        """Similarities of tokens are no products of two vectors: no walk makes them."""

    def __call__(self, features: Features, key: jax.Array) -> Loss:
        """Nothing is left to chance."""
        head, image = features.model.contrastive, features.image
        # (the class token stands for the whole picture)
        first = int(getattr(features.model.config.image, "pool", "") == "class_token")
        patches, words = head.image(image.tokens[:, first:]), head.text(features.text.tokens)
        seen = jnp.ones(patches.shape[:2], bool) if image.mask is None else image.mask[:, first:]
        read = features.batch["text_mask"]
        to_text, to_image = late_interaction(patches, words, seen, read)
        to_text, to_image = head.scale * to_text, head.scale * to_image
        valid, positives = features.batch["valid"], same_image(features.batch["image_id"])
        of_images, of_texts = (
            info_nce(logits, positives, valid, self.smoothing) for logits in (to_text, to_image)
        )
        total, weight = weighted((of_images + of_texts) / 2, valid)
        best = jnp.where(valid, to_text, -jnp.inf).argmax(axis=-1)
        hit = jnp.take_along_axis(positives, best[:, None], axis=1)[:, 0]
        vectors = _mean_direction(patches, seen), _mean_direction(words, read)
        metrics = contrastive_metrics("token_contrastive", features, hit, *vectors)
        return Loss(total, weight, metrics, scores=(to_text, valid.astype(jnp.float32)))


def same_image(image_id: Int[Array, " batch"]) -> Bool[Array, "batch batch"]:
    """True where two rows of the batch show the same picture: the positives."""
    return image_id[:, None] == image_id[None, :]


def info_nce(
    logits: Float[Array, "queries candidates"],
    positives: Bool[Array, "queries candidates"],
    valid: Bool[Array, " candidates"],
    smoothing: float = 0.0,
) -> Float[Array, " queries"]:
    """Cross-entropy of each query's softmax over the candidates (van den Oord et al. 2018, eq. 4).

    Several positives share the target evenly, as in ALBEF's retrieval loss (Li et al. 2021, section
    3.4). Of the target a share of `smoothing` is spread over all candidates, positives included
    (Szegedy et al. 2016, section 7). Invalid candidates take no part in either.
    """
    log_p = jax.nn.log_softmax(jnp.where(valid, logits, -1e30), axis=-1)
    target = (1 - smoothing) * _shares(positives & valid) + smoothing * _shares(valid)
    return -jnp.where(valid, target * log_p, 0).sum(axis=-1)


def sigmoid_loss(
    logits: Float[Array, "queries candidates"],
    positives: Bool[Array, "queries candidates"],
    valid: Bool[Array, " candidates"],
) -> Float[Array, " queries"]:
    """Binary cross-entropy of every pair, summed over candidates (Zhai et al. 2023, eq. 1)."""
    signs = jnp.where(positives, 1.0, -1.0)
    return -jnp.where(valid, jax.nn.log_sigmoid(signs * logits), 0).sum(axis=-1)


def late_interaction(
    patches: Float[Array, "pictures patches embedding"],
    words: Float[Array, "texts words embedding"],
    patch_mask: Bool[Array, "pictures patches"],
    word_mask: Bool[Array, "texts words"],
) -> tuple[Float[Array, "pictures texts"], Float[Array, "texts pictures"]]:
    """Of each picture to each text, and back: how well its tokens find their like (FILIP, eq. 3-5).

    A token's similarity is the cosine of the most similar token of the other side; the mean over
    one's own tokens is that of the pair, so that the two directions differ. Masks are true on
    tokens; what they leave out is neither averaged over nor found.
    """

    def of_text(text):
        vectors, mask = text
        # An average of many forgives the rounding that a TPU does to the factors of a product.
        cosines = jnp.einsum("bpe,we->bpw", patches, vectors)
        of_patches = jnp.where(mask, cosines, -1).max(axis=2)
        of_words = jnp.where(patch_mask[..., None], cosines, -1).max(axis=1)
        return _mean(of_patches, patch_mask), _mean(of_words, mask)

    # Some texts at a time, computed again for the gradient: all cosines of a batch are too many.
    to_text, to_image = jax.lax.map(jax.checkpoint(of_text), (words, word_mask), batch_size=8)
    return to_text.T, to_image


def contrastive_metrics(
    name: str,
    features: Features,
    hit: Bool[Array, " batch"],
    images: Float[Array, "batch embedding"],
    texts: Float[Array, "batch embedding"],
) -> dict[str, Sum]:
    """How often a picture's best candidate is one of its texts, the scale, and the geometry."""
    batch = features.batch
    return {
        f"{name}/accuracy": weighted(hit, batch["valid"]),
        "contrastive/logit_scale": (features.model.contrastive.scale, jnp.ones(())),
        **geometry_metrics(images, texts, batch["valid"], batch["image_id"]),
    }


def _loss(name: str, features: Features, losses: Float[Array, " batch"]) -> Loss:
    """The mean over valid rows, of walks from pictures to texts and back."""
    valid = features.batch["valid"]
    total, weight = weighted(losses, valid)
    hit = features.walk("image").answer("hit")
    vectors = features.image_embedding, features.text_embedding
    metrics = contrastive_metrics(name, features, hit, *vectors)
    # (asked for by adversarial training alone; otherwise the compiler leaves them out)
    scores = features.similarity_logits, valid.astype(jnp.float32)
    return Loss(total, weight, metrics, scores=scores)


def _shares(chosen: Bool[Array, "*queries candidates"]) -> Float[Array, "*queries candidates"]:
    """1 spread evenly over the chosen; zeros where there are none."""
    return chosen / jnp.maximum(chosen.sum(axis=-1, keepdims=True), 1)


def _mean_direction(
    tokens: Float[Array, "batch length embedding"], mask: Bool[Array, "batch length"]
) -> Float[Array, "batch embedding"]:
    """One unit vector for all tokens, to measure."""
    return unit(jnp.where(mask[..., None], tokens, 0).sum(axis=1))


def _mean(
    values: Float[Array, "*rows length"], mask: Bool[Array, "*#rows length"]
) -> Float[Array, "*rows"]:
    """The mean over what the mask is true on; zero where that is nothing."""
    return jnp.where(mask, values, 0).sum(axis=-1) / jnp.maximum(mask.sum(axis=-1), 1)
