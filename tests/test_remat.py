"""Remat policies store what their table says, and change nothing else."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from mmjax.layers import Block, LayerConfig, Stack
from mmjax.remat import REMAT_POLICIES

WIDTH, DEPTH, LENGTH = 8, 3, 5


def stack(policy, **changes):
    config = LayerConfig(width=WIDTH, depth=DEPTH, heads=2, remat=policy, **changes)
    return Stack(lambda rngs: Block(config, rngs), config, nnx.Rngs(0))


def loss(layers, x):
    return jnp.sin(layers(x)).sum()


def stored_numbers(policy, rows):
    """How many numbers the backward pass is handed."""
    x = jnp.zeros((rows, LENGTH, WIDTH))
    graph, params = nnx.split(stack(policy, attention="sliced"))
    backward = jax.eval_shape(
        lambda params, x: jax.vjp(lambda p, x: nnx.merge(graph, p)(x), params, x)[1], params, x
    )
    return sum(leaf.size for leaf in jax.tree.leaves(backward))


@pytest.mark.parametrize(
    ("policy", "widths", "more"),
    [("products", 9, 4), ("attention", 5, 4), ("heads", 4, 4), ("dots", 8, 0), ("full", 0, 0)],
)
def test_a_token_stores_what_the_table_says(policy, widths, more):
    rows = 4  # what does not grow with rows are parameters
    a_token = (stored_numbers(policy, 2 * rows) - stored_numbers(policy, rows)) / rows / LENGTH
    entered = WIDTH
    assert a_token / DEPTH == entered + widths * WIDTH + more


def test_without_a_policy_more_is_stored():
    assert stored_numbers("none", 4) > 1.5 * stored_numbers("products", 4)


@pytest.mark.parametrize("unroll", [False, True])
@pytest.mark.parametrize("policy", REMAT_POLICIES)
def test_gradients_are_those_without_remat(policy, unroll):
    x = jnp.array(np.random.default_rng(0).normal(size=(2, LENGTH, WIDTH)), jnp.float32)
    expected = nnx.grad(loss)(stack("none"), x)
    found = nnx.jit(nnx.grad(loss))(stack(policy, unroll=unroll), x)
    assert jax.tree.structure(found) == jax.tree.structure(expected)
    for a, b in zip(jax.tree.leaves(found), jax.tree.leaves(expected), strict=True):
        np.testing.assert_allclose(a, b, atol=2e-5)
