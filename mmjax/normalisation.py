"""LayerNorm (Ba et al. 2016), with statistics that a rematerialised layer can keep."""

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float

from mmjax.remat import named


class LayerNorm(nnx.Module):
    """(x - mean) / √(variance + epsilon) · scale + bias over the last axis, computed in float32.

    The result is of `dtype`. The statistics take two passes, where one would be off by the square
    of a large mean.
    """

    def __init__(self, width: int, epsilon: float, dtype: str, rngs: nnx.Rngs):
        self.epsilon, self.dtype = epsilon, jnp.dtype(dtype)
        self.scale = nnx.Param(jnp.ones(width))
        self.bias = nnx.Param(jnp.zeros(width))

    def __call__(self, x: Float[Array, "*batch width"]) -> Float[Array, "*batch width"]:
        """Normalise the last axis."""
        x = x.astype(jnp.float32)
        mean = named("statistics", x.mean(axis=-1, keepdims=True))
        # The variance is least at the mean: it has no gradient there, and none need be computed.
        centred = x - jax.lax.stop_gradient(mean)
        variance = jnp.square(centred).mean(axis=-1, keepdims=True)
        inverse = named("statistics", jax.lax.rsqrt(variance + self.epsilon))
        return ((x - mean) * inverse * self.scale[...] + self.bias[...]).astype(self.dtype)


def layer_norm(width: int, epsilon: float, dtype: str, rngs: nnx.Rngs) -> LayerNorm:
    """A LayerNorm of its own parameters."""
    return LayerNorm(width, epsilon, dtype, rngs)
