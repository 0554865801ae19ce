"""What the parts of a model hand to one another."""

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float

if TYPE_CHECKING:
    AnyArray = jax.Array
else:
    AnyArray = jax.Array | np.ndarray  # on devices, or in host memory after an evaluation


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Encoded:
    """One modality after its encoder."""

    tokens: Float[AnyArray, "batch length width"]
    mask: Bool[AnyArray, "batch length"] | None  # true on tokens; None: all of them
    pooled: Float[AnyArray, "batch pooled_width"]

    def take(self, rows: Any) -> "Encoded":
        """The same features, the rows of the batch picked anew (rows may repeat)."""
        return jax.tree.map(lambda x: x[rows], self)


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Fused:
    """Both modalities after the fusion, and the vector that stands for the pair."""

    image_tokens: Float[AnyArray, "batch patches image_width"]
    text_tokens: Float[AnyArray, "batch length text_width"]
    pooled: Float[AnyArray, "batch pooled_width"]
    text_mask: Bool[AnyArray, "batch length"] | None = None  # where heads read a word by its place


def mask_of(encoded: Encoded) -> Bool[Array, "batch length"]:
    """True on tokens, whether or not a mask was given."""
    if encoded.mask is None:
        return jnp.ones(encoded.tokens.shape[:2], bool)
    return jnp.asarray(encoded.mask)


def shifted(
    x: Float[Array, "batch length width"], shift: Float[Array, "batch length width"] | None
) -> Float[Array, "batch length width"]:
    """Embedded inputs with what an adversary adds to them, in the type that they had."""
    return x if shift is None else (x + shift).astype(x.dtype)


def masked_mean(
    tokens: Float[Array, "batch length width"], mask: Bool[AnyArray, "batch length"] | None
) -> Float[Array, "batch width"]:
    """The mean of the tokens that the mask is true on (None: of all); zero where there is none."""
    if mask is None:
        return tokens.mean(axis=1)
    there = jnp.asarray(mask)[..., None]
    return jnp.where(there, tokens, 0).sum(axis=1) / jnp.maximum(there.sum(axis=1), 1)
