"""Scaled dot-product attention: one function, and an implementation per backend behind it.

Which is fastest depends on the backend: on the CPU the head-major layout with the division after
the value product, as measured in `docs/performance.md`; on a TPU the einsum in slices that stay in
on-chip memory, as its compiler says; elsewhere, until somebody has measured, the plain einsum over
the projections' own layout. On request are our own kernels for TPUs, which nobody has timed yet,
and cuDNN's (a GPU, half precision).
"""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float

from mmjax import platform
from mmjax.errors import InputError, near_misses
from mmjax.fused_attention import fused_attention
from mmjax.sliced_attention import sliced_attention

# Added to the scores of masked keys: exp() of it is zero, and a fully masked row stays finite.
MASKED = -1e30


@jax.named_scope("core")
def attention(
    query: Float[Array, "batch queries heads head_width"],
    key: Float[Array, "batch keys heads head_width"],
    value: Float[Array, "batch keys heads head_width"],
    mask: Bool[Array, "#batch _ keys"] | None = None,
    implementation: str = "auto",
    bias: Float[Array, "_ heads queries keys"] | None = None,
) -> Float[Array, "batch queries heads head_width"]:
    """softmax(query · keyᵀ / √head_width + bias) · value (Vaswani et al. 2017, equation 1).

    `mask` is true where a query may look at a key; it and `bias` have a row for each of the batch,
    or one for all. The softmax is taken in float32. `implementation` is one of `IMPLEMENTATIONS`,
    or 'auto': chosen by the backend.
    """
    if implementation == "auto":
        implementation = BEST.get(platform.current(), "einsum")
    if implementation not in IMPLEMENTATIONS:
        raise InputError(
            f"attention implementation {implementation!r} is unknown."
            + near_misses(implementation, ["auto", *IMPLEMENTATIONS])
        )
    return IMPLEMENTATIONS[implementation](query, key, value, mask, bias)


def attention_weights(
    query: Float[Array, "batch queries heads head_width"],
    key: Float[Array, "batch keys heads head_width"],
    mask: Bool[Array, "#batch _ keys"] | None = None,
    bias: Float[Array, "_ heads queries keys"] | None = None,
) -> Float[Array, "batch heads queries keys"]:
    """The probabilities themselves, in float32: for looking at."""
    return jax.nn.softmax(_masked(attention_scores(query, key, bias), mask, None))


def attention_scores(
    query: Float[Array, "batch queries heads head_width"],
    key: Float[Array, "batch keys heads head_width"],
    bias: Float[Array, "_ heads queries keys"] | None = None,
) -> Float[Array, "batch heads queries keys"]:
    """What the softmax is taken of, before any mask, in float32: to distil from."""
    scores = jnp.einsum("bqhd,bkhd->bhqk", query, key, preferred_element_type=jnp.float32)
    scores = scores * query.shape[-1] ** -0.5
    return scores if bias is None else scores + bias


def _einsum(query, key, value, mask, bias):
    weights = attention_weights(query, key, mask, bias).astype(value.dtype)
    return jnp.einsum("bhqk,bkhd->bqhd", weights, value)


def _sliced(query, key, value, mask, bias):
    if bias is not None:  # none of the models that were measured has one
        return _einsum(query, key, value, mask, bias)
    return sliced_attention(_unbiased, query, key, value, mask)


def _unbiased(query, key, value, mask):
    return _einsum(query, key, value, mask, None)


def _head_major(query, key, value, mask, bias):
    """Heads before positions, so that each product is a contiguous matrix product."""
    query, key, value = (jnp.swapaxes(x, 1, 2) for x in (query, key, value))
    scores = jnp.einsum("bhqd,bhkd->bhqk", query, key, preferred_element_type=jnp.float32)
    scores = _masked(scores * query.shape[-1] ** -0.5, mask, bias)
    # The shift only keeps exp() in range; the result does not depend on it, nor does the gradient.
    shift = jax.lax.stop_gradient(scores.max(axis=-1, keepdims=True))
    exponentials = jnp.exp(scores - shift)
    # Dividing after the product touches head_width numbers a query instead of one a key.
    sums = exponentials.sum(axis=-1, keepdims=True)
    output = jnp.einsum("bhqk,bhkd->bhqd", exponentials.astype(value.dtype), value)
    return jnp.swapaxes((output / sums).astype(value.dtype), 1, 2)


def _fused(query, key, value, mask, bias):
    """Our kernels for TPUs, not timed on one yet."""
    if bias is not None:
        raise InputError(
            "attention 'fused' adds no bias to its scores: set that part's model.*.attention to "
            "'auto'."
        )
    return fused_attention(query, key, value, mask)


def _cudnn(query, key, value, mask, bias):
    """The fused kernel of NVIDIA's library: half precision and a GPU only.

    It takes masks and biases that are spelt out, and, to train with them, even lengths: odd ones
    get a row more, at which nobody looks and which nobody sees.
    """
    if mask is None and bias is None:
        return jax.nn.dot_product_attention(query, key, value, implementation="cudnn")
    queries, keys = query.shape[1], key.shape[1]
    seen = jnp.ones((1, 1, 1), bool) if mask is None else mask
    seen = jnp.broadcast_to(seen, (len(seen), queries, keys))[:, None]
    if bias is not None:
        bias = _evened(bias.astype(query.dtype), 2, 3)
    query, key, value = (_evened(x, 1) for x in (query, key, value))
    seen = _evened(seen, 2, 3)
    heads = jax.nn.dot_product_attention(query, key, value, bias, seen, implementation="cudnn")
    return heads[:, :queries]


def _evened(x, *axes):
    return jnp.pad(x, [(0, x.shape[axis] % 2 * (axis in axes)) for axis in range(x.ndim)])


def _masked(scores, mask, bias):
    scores = scores if bias is None else scores + bias
    return scores if mask is None else jnp.where(mask[:, None], scores, MASKED)


IMPLEMENTATIONS = {
    "einsum": _einsum,
    "sliced": _sliced,
    "head_major": _head_major,
    "fused": _fused,
    "cudnn": _cudnn,
}
# By platform, as measured in docs/performance.md; for the others nobody has.
BEST = {"cpu": "head_major", "tpu": "sliced"}
