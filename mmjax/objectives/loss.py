"""What an objective returns, and the features that the objectives of one step share."""

import zlib
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cached_property

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int, Key, Shaped

from mmjax.models import Encoded, Fused, VisionLanguageModel

Sum = tuple[Float[Array, ""], Float[Array, ""]]


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Loss:
    """A sum over the global batch and its weight: sums add up over devices and micro-batches."""

    total: Float[Array, ""]
    weight: Float[Array, ""]
    metrics: dict[str, Sum] = field(default_factory=dict)  # likewise (sum, weight) by name


def weighted(values: Shaped[Array, "*shape"], weights: Shaped[Array, "*shape"]) -> Sum:
    """The weighted sum of `values` and the sum of the weights."""
    weights = jnp.asarray(weights, jnp.float32)
    return (values * weights).sum(), weights.sum()


def purpose_key(key: Key[Array, ""], purpose: str) -> Key[Array, ""]:
    """A key for one named purpose of a step: never carried on, so nothing depends on an order."""
    return jax.random.fold_in(key, zlib.crc32(purpose.encode()) & 0x7FFFFFFF)


def example_keys(key: Key[Array, ""], index: Int[Array, " batch"]) -> Key[Array, " batch"]:
    """A key for each example, by its number in the data set: rows may be dealt out anyhow."""
    return jax.vmap(lambda number: jax.random.fold_in(key, number))(index)


class Features:
    """The encodings of one batch, each computed when the first objective asks for it.

    `key` draws dropout; `None` is evaluation.
    """

    def __init__(
        self, model: VisionLanguageModel, batch: Mapping[str, Array], key: Key[Array, ""] | None
    ):
        self.model, self.batch, self.key = model, batch, key

    def dropout_key(self, purpose: str) -> Key[Array, ""] | None:
        """The key of one pass through the model."""
        return None if self.key is None else purpose_key(self.key, f"dropout/{purpose}")

    @cached_property
    def image(self) -> Encoded:
        """The pictures, encoded."""
        return self.model.encode_image(self.batch["image"], key=self.dropout_key("image"))

    @cached_property
    def text(self) -> Encoded:
        """The texts, encoded."""
        return self.model.encode_text(
            self.batch["text"], self.batch["text_mask"], key=self.dropout_key("text")
        )

    @cached_property
    def fused(self) -> Fused:
        """Each picture fused with its own text."""
        return self.model.fuse(self.image, self.text, key=self.dropout_key("fusion"))

    @cached_property
    def image_embedding(self) -> Float[Array, "batch embedding"]:
        """Unit vectors of the pictures."""
        return self.model.contrastive.image(self.image.pooled)

    @cached_property
    def text_embedding(self) -> Float[Array, "batch embedding"]:
        """Unit vectors of the texts."""
        return self.model.contrastive.text(self.text.pooled)

    @cached_property
    def similarity_logits(self) -> Float[Array, "batch batch"]:
        """Scaled cosines of every picture (rows) with every text of the global batch.

        At full float32 precision: a TPU would round the factors to bfloat16, and the scale makes
        tenths of a logit of that.
        """
        cosines = jnp.matmul(
            self.image_embedding, self.text_embedding.T, precision=jax.lax.Precision.HIGHEST
        )
        return self.model.contrastive.scale * cosines
