"""Attention over whole short sequences as one kernel of a TPU, scores in on-chip memory only.

An option beside the implementations of `mmjax.attention`: for pictures and texts, up to about 1,024
tokens. The kernels themselves are in `mmjax.fused_attention_kernels`.
"""

import functools

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float

from mmjax import platform
from mmjax.errors import InputError
from mmjax.fused_attention_kernels import LANES, MASKED, attend, attend_backward
from mmjax.remat import named
from mmjax.sharding import HEADS_SPLIT, MASK_SPLIT, per_device


def fused_attention(
    query: Float[Array, "batch queries heads head_width"],
    key: Float[Array, "batch keys heads head_width"],
    value: Float[Array, "batch keys heads head_width"],
    mask: Bool[Array, "#batch _ keys"] | None = None,
    *,
    interpret: bool = False,
) -> Float[Array, "batch queries heads head_width"]:
    """softmax(query · keyᵀ / √head_width) · value (Vaswani et al. 2017, equation 1), on a TPU.

    `mask`, with one row for all queries, is true where they may look; a batch row that may look
    nowhere attends uniformly, as in `mmjax.attention`. The softmax is taken in float32. Under a
    mesh every device runs the kernel on its rows and, split over `tensor`, its heads. `interpret`
    evaluates the kernel without a TPU, slowly, for tests.

    Raises InputError where there is no TPU, where the mask differs from query to query, and where
    the head width neither divides 128 nor is a multiple of it.
    """
    _check(query, mask, interpret)
    if query.shape[1] == 1:  # a product with one row is none that the compiler knows
        twice = jnp.repeat(query, 2, axis=1)
        return fused_attention(twice, key, value, mask, interpret=interpret)[:, :1]
    if mask is not None:
        # Scores that are all zero give such rows their uniform weights, and no gradient.
        nowhere = ~mask.any(axis=-1, keepdims=True)
        query = jnp.where(nowhere[..., None], 0, query)
        mask = mask | nowhere
    here = functools.partial(_attend_here, interpret)
    return per_device(here, [query, key, value, mask], [HEADS_SPLIT] * 3 + [MASK_SPLIT])


def _check(query, mask, interpret):
    if platform.current() != "tpu" and not interpret:
        raise InputError(
            "attention 'fused' is a kernel for TPUs, and this program is made for a "
            f"{platform.current()}: set model.*.attention to 'auto'."
        )
    if mask is not None and mask.shape[1] != 1:
        raise InputError(
            "attention 'fused' takes one mask for all queries of a text or picture; found "
            f"{mask.shape[1]} rows of it, as causal models have: set their model.*.attention to "
            "'auto'."
        )
    width = query.shape[-1]
    if LANES % width and width % LANES:
        raise InputError(
            f"attention 'fused' takes heads whose width divides {LANES} or is a multiple of it; "
            f"found {width}: set model.*.heads to width / 64, or model.*.attention to 'auto'."
        )


def _attend_here(interpret, query, key, value, mask):
    """Without regard to other devices."""
    bias = None if mask is None else jnp.where(mask, 0.0, MASKED)
    heads = query.shape[2]
    # Heads side by side are the projections' own layout; heads first would be a copy of each array.
    query, key, value = (x.reshape(*x.shape[:2], -1) for x in (query, key, value))
    output = _attention(heads, interpret, query, key, value, bias)
    return output.reshape(*output.shape[:2], heads, -1)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 1))
def _attention(heads, interpret, query, key, value, bias):
    return _forward(heads, interpret, query, key, value, bias)[0]


def _forward(heads, interpret, query, key, value, bias):
    output, log_sums = attend(query, key, value, bias, heads=heads, interpret=interpret)
    return output, (query, key, value, bias, named("statistics", log_sums))


def _backward(heads, interpret, residuals, gradient):
    query, key, value, bias, log_sums = residuals
    gradients = attend_backward(
        query, key, value, bias, log_sums, gradient, heads=heads, interpret=interpret
    )
    return *gradients, None


_attention.defvjp(_forward, _backward)
