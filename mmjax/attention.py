"""Scaled dot-product attention: one function, and an implementation per backend behind it.

Which is fastest depends on the backend: on the CPU the head-major layout with the division after
the value product, as measured in `docs/performance.md`; elsewhere, until somebody has measured, the
plain einsum over the projections' own layout. cuDNN's fused kernel (a GPU, half precision) is on
request.
"""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float

from mmjax.errors import InputError, near_misses

# Added to the scores of masked keys: exp() of it is zero, and a fully masked row stays finite.
MASKED = -1e30


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
        implementation = "head_major" if jax.default_backend() == "cpu" else "einsum"
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


def _cudnn(query, key, value, mask, bias):
    """The fused kernel of NVIDIA's library: half precision and a GPU only."""
    mask = None if mask is None else mask[:, None]
    bias = None if bias is None else bias.astype(query.dtype)
    return jax.nn.dot_product_attention(query, key, value, bias, mask, implementation="cudnn")


def _masked(scores, mask, bias):
    scores = scores if bias is None else scores + bias
    return scores if mask is None else jnp.where(mask[:, None], scores, MASKED)


IMPLEMENTATIONS = {"einsum": _einsum, "head_major": _head_major, "cudnn": _cudnn}
