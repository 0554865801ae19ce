"""What convolutional image encoders are made of: convolution, batch norm, and stages of layers.

Padding is always given in pixels, as PyTorch counts it; maps are [batch, height, width, channels].
"""

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float, Key

from mmjax.errors import InputError, near_misses
from mmjax.layers import ACTIVATIONS, Stack, StackConfig, split_key
from mmjax.models.features import Encoded
from mmjax.remat import REMAT_POLICIES
from mmjax.sharding import constrain_batch

# Keeps the scale of activations through ReLUs (He et al. 2015, equation 14), as published ResNets.
_KERNEL_INIT = nnx.initializers.variance_scaling(2.0, "fan_out", "normal")


@dataclass(frozen=True)
class ConvolutionConfig:
    """What the configs of convolutional encoders share."""

    image_size: int | tuple[int, int] = 224  # for `grid` alone: pictures of any size run
    activation: str = "relu"
    epsilon: float = 1e-5  # of every batch norm
    mean: tuple[float, ...] = field(default=(0.485, 0.456, 0.406))  # of pixels in [0, 1]
    std: tuple[float, ...] = field(default=(0.229, 0.224, 0.225))

    dtype: str = "float32"  # of activations: 'float32' or 'bfloat16'
    remat: str = "none"  # a key of mmjax.remat.REMAT_POLICIES
    unroll: bool = False  # a CPU convolves several times faster outside of a loop

    def __post_init__(self) -> None:
        """Refuse what cannot be built."""
        for key, known in (
            ("activation", list(ACTIVATIONS)),
            ("remat", list(REMAT_POLICIES)),
            ("dtype", ["float32", "bfloat16"]),
        ):
            if (value := getattr(self, key)) not in known:
                name = type(self).__name__
                raise InputError(f"{name}: {key} is {value!r}.{near_misses(value, known)}")


class FrozenBatchNorm(nnx.Module):
    """Batch norm by stored statistics: (x - mean) / √(var + ε) · scale + bias, in float32.

    Scale and bias are trained; mean and variance are loaded and stay, with zero gradients. That is
    how a pre-trained network is tuned within a bigger one, where the statistics of small batches
    would do harm; a network without pre-trained statistics is not normalised by it.
    """

    def __init__(self, width: int, epsilon: float):
        self.epsilon = epsilon
        self.scale = nnx.Param(jnp.ones(width))
        self.bias = nnx.Param(jnp.zeros(width))
        self.mean = nnx.BatchStat(jnp.zeros(width))
        self.var = nnx.BatchStat(jnp.ones(width))

    def __call__(self, x: Float[Array, "*map channels"]) -> Float[Array, "*map channels"]:
        """Normalise every channel."""
        mean, var = (jax.lax.stop_gradient(stored[...]) for stored in (self.mean, self.var))
        factor = self.scale[...] * jax.lax.rsqrt(var + self.epsilon)
        return ((x - mean) * factor + self.bias[...]).astype(x.dtype)


class NormedConvolution(nnx.Module):
    """Convolution without bias, batch norm, activation ('' for none).

    `padding` is (before, after), the same down and across; by default it keeps the map's size, but
    for the stride.
    """

    def __init__(
        self,
        inputs: int,
        outputs: int,
        kernel: int,
        config: ConvolutionConfig,
        rngs: nnx.Rngs,
        *,
        stride: int = 1,
        padding: tuple[int, int] | None = None,
        groups: int = 1,
        activation: str = "",
    ):
        self.activation = activation
        padding = padding or (kernel // 2, kernel // 2)
        self.convolution = nnx.Conv(
            inputs,
            outputs,
            (kernel, kernel),
            strides=stride,
            padding=(padding, padding),  # (a tuple, as a model's structure is hashed)
            feature_group_count=groups,
            use_bias=False,
            dtype=jnp.dtype(config.dtype),
            kernel_init=_KERNEL_INIT,
            rngs=rngs,
        )
        self.norm = FrozenBatchNorm(outputs, config.epsilon)

    def __call__(
        self, x: Float[Array, "batch height width inputs"]
    ) -> Float[Array, "batch new_height new_width outputs"]:
        """Apply all three."""
        x = self.norm(self.convolution(x))
        return ACTIVATIONS[self.activation](x) if self.activation else x


class Stage(nnx.Module):
    """A first layer, which may change the map's size and channels, and the rest, all alike."""

    def __init__(
        self,
        make_first: Callable[[nnx.Rngs], nnx.Module],
        make_rest: Callable[[nnx.Rngs], nnx.Module],
        depth: int,
        config: ConvolutionConfig,
        rngs: nnx.Rngs,
    ):
        self.remat = config.remat
        self.first = make_first(rngs)
        rest = StackConfig(depth - 1, config.remat, config.unroll)
        self.rest = Stack(make_rest, rest, rngs) if depth > 1 else None

    def __call__(self, carry: Any, key: Key[Array, ""] | None = None) -> Any:
        """`carry = layer(carry, key=…)` for every layer."""
        first_key, rest_key = split_key(key, 2)
        graph, parameters = nnx.split(self.first)

        def first(parameters, carry):
            return nnx.merge(graph, parameters)(carry, key=first_key)

        if (policy := REMAT_POLICIES[self.remat]) is not None:
            first = jax.checkpoint(first, policy=policy)
        carry = first(parameters, jax.tree.map(constrain_batch, carry))
        return carry if self.rest is None else self.rest(carry, key=rest_key)


def encoded(features: Float[Array, "batch height width channels"], pool: str = "mean") -> Encoded:
    """A feature map as tokens, row by row, with their 'mean' or 'max' as the pooled vector."""
    tokens = features.reshape(features.shape[0], -1, features.shape[-1])
    if pool == "mean":
        return Encoded(tokens=tokens, mask=None, pooled=tokens.mean(axis=1))
    # The gradient of max() asks which number equals the greatest, which XLA may have computed twice
    # and rounded otherwise: then none does, and it divides by zero.
    greatest = tokens.argmax(axis=1, keepdims=True)
    pooled = jnp.take_along_axis(tokens, greatest, axis=1)[:, 0]
    return Encoded(tokens=tokens, mask=None, pooled=pooled)
