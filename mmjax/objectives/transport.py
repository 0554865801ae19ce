"""Word-region alignment: how far a text's words are from a picture's regions.

The distance is that of optimal transport: every word has an equal share of one unit of mass, every
region room for an equal share, and what it costs to move mass from one to the other is how little
the two look in the same direction (Chen et al. 2020, UNITER, section 3.2). Patches serve as regions
do (Kim et al. 2021, ViLT, section 3.3).
"""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float

from mmjax.models.heads import unit


def transport_distance(
    words: Float[Array, "batch length width"],
    regions: Float[Array, "batch regions width"],
    word_mask: Bool[Array, "batch length"],
    region_mask: Bool[Array, "batch regions"],
) -> Float[Array, " batch"]:
    """What the best plan costs; the gradient is that of the costs at this plan."""
    both = word_mask[:, :, None] & region_mask[:, None, :]
    cost = jnp.where(both, cosine_distance(words, regions), 0)
    return (cost * transport_plan(cost, word_mask, region_mask)).sum(axis=(1, 2))


def cosine_distance(
    words: Float[Array, "batch length width"], regions: Float[Array, "batch regions width"]
) -> Float[Array, "batch length regions"]:
    """1 - cosine of every word and region, float32: 0 where they point the same way, at most 2."""
    words, regions = jax.vmap(unit)(words), jax.vmap(unit)(regions)
    return 1 - jnp.einsum("bld,brd->blr", words, regions, precision=jax.lax.Precision.HIGHEST)


def transport_plan(
    cost: Float[Array, "batch length regions"],
    word_mask: Bool[Array, "batch length"],
    region_mask: Bool[Array, "batch regions"],
    beta: float = 0.5,
    iterations: int = 50,
) -> Float[Array, "batch length regions"]:
    """How much of each word goes to each region, by IPOT (Xie et al. 2019, algorithm 1, L = 1).

    Words share their mass exactly, regions as nearly as the steps allow; padding has none. `beta`
    is the step size of the proximal method. The plan is no path for gradients.
    """
    both = word_mask[:, :, None] & region_mask[:, None, :]
    kernel = jnp.where(both, jnp.exp(-jax.lax.stop_gradient(cost) / beta), 0)
    word_count = word_mask.sum(axis=1, keepdims=True)
    region_count = region_mask.sum(axis=1, keepdims=True)

    # Sums of products, not matrix products, which a TPU would round to bfloat16 in every step.
    def step(_, state):
        plan, word_scale = state
        plan = kernel * plan
        region_scale = _inverse(region_count * (plan * word_scale[:, :, None]).sum(axis=1))
        word_scale = _inverse(word_count * (plan * region_scale[:, None, :]).sum(axis=2))
        return word_scale[:, :, None] * plan * region_scale[:, None, :], word_scale

    start = both.astype(cost.dtype), _inverse(word_mask * word_count.astype(cost.dtype))
    return jax.lax.fori_loop(0, iterations, step, start)[0]


def _inverse(x: Float[Array, "*shape"]) -> Float[Array, "*shape"]:
    """1 / x, and 0 of 0: what is padding has no mass, and so no scale."""
    return jnp.where(x > 0, 1 / jnp.where(x > 0, x, 1), 0)
