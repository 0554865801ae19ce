"""What the parts of a model hand to one another."""

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import jax
import numpy as np
from jaxtyping import Bool, Float

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
    pooled: Float[AnyArray, "batch width"]

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
