"""Attention in slices is attention: values and gradients, on any mesh, with any mask."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import NamedSharding, PartitionSpec

from mmjax import sliced_attention as module
from mmjax.attention import attention
from mmjax.sharding import BATCH_AXES, make_mesh
from mmjax.sliced_attention import rows_of_slice

ROWS, QUERIES, KEYS, HEADS, WIDTH = 8, 5, 7, 4, 6


@pytest.fixture(autouse=True)
def two_rows_at_a_time(monkeypatch):
    monkeypatch.setattr(module, "SLICE_BYTES", 2 * 4 * HEADS * 8 * 128)


def inputs(dtype=jnp.float32):
    draw = np.random.default_rng(0).standard_normal
    shapes = [(ROWS, QUERIES, HEADS, WIDTH), *[(ROWS, KEYS, HEADS, WIDTH)] * 2]
    return [jnp.array(draw(shape), dtype) for shape in shapes]


def masks():
    rows = np.arange(KEYS) < np.arange(ROWS)[:, None]  # the first looks nowhere
    return {
        "none": None,
        "by row": jnp.array(rows[:, None]),
        "for all": jnp.array(np.tri(QUERIES, KEYS, 2, bool)[None]),
    }


def by_numpy(query, key, value, mask):
    """Row by row and head by head, in float64."""
    query, key, value = (np.asarray(x, np.float64) for x in (query, key, value))
    output = np.zeros(query.shape)
    for row in range(len(query)):
        seen = np.ones((QUERIES, KEYS), bool)
        if mask is not None:
            seen = np.broadcast_to(np.asarray(mask)[row % len(mask)], seen.shape)
        for head in range(HEADS):
            scores = query[row, :, head] @ key[row, :, head].T / np.sqrt(WIDTH)
            weights = np.exp(
                np.where(seen, scores, -1e30) - np.where(seen, scores, -1e30).max(1)[:, None]
            )
            output[row, :, head] = weights / weights.sum(1, keepdims=True) @ value[row, :, head]
    return output


@pytest.mark.parametrize("mask", masks().values(), ids=masks())
def test_values_are_those_of_the_formula(mask):
    query, key, value = inputs()
    found = attention(query, key, value, mask, "sliced")
    np.testing.assert_allclose(found, by_numpy(query, key, value, mask), atol=2e-6)


@pytest.mark.parametrize("mask", masks().values(), ids=masks())
def test_gradients_are_those_of_the_plain_one(mask):
    weights = jnp.array(np.random.default_rng(1).standard_normal((ROWS, QUERIES, HEADS, WIDTH)))

    def gradients(name):
        loss = lambda *x: jnp.vdot(weights, attention(*x, mask, name))  # noqa: E731
        return jax.jit(jax.grad(loss, argnums=(0, 1, 2)))(*inputs())

    for found, expected in zip(gradients("sliced"), gradients("einsum"), strict=True):
        np.testing.assert_allclose(found, expected, atol=2e-6)


def test_it_is_walked_in_slices():
    assert rows_of_slice(ROWS, QUERIES, KEYS, HEADS) == 2
    program = str(jax.make_jaxpr(lambda *x: attention(*x, implementation="sliced"))(*inputs()))
    scores = f"f32[2,{HEADS},{QUERIES},{KEYS}]"
    assert scores in program
    assert scores.replace("[2", f"[{ROWS}") not in program


@pytest.mark.parametrize(
    ("rows", "tokens", "heads", "expected"),
    [
        (128, 196, 12, 16),
        (64, 256, 12, 16),
        (128, 64, 12, 128),
        (6, 4096, 12, 1),
        (14, 196, 12, 14),
    ],
)
def test_scores_of_a_slice_fit(monkeypatch, rows, tokens, heads, expected):
    monkeypatch.undo()
    assert rows_of_slice(rows, tokens, tokens, heads) == expected


@pytest.mark.parametrize("axes", [{"data": 4, "tensor": 2}, {"data": 2, "fsdp": 2, "tensor": 2}])
def test_every_device_walks_over_its_own_rows(axes):
    mesh = make_mesh(**axes)
    sharding = NamedSharding(mesh, PartitionSpec(BATCH_AXES, None, "tensor"))
    mask = masks()["by row"]

    def loss(query, key, value):
        with jax.sharding.use_abstract_mesh(mesh.abstract_mesh):
            return jnp.square(attention(query, key, value, mask, "sliced")).sum()

    sharded = [jax.device_put(x, sharding) for x in inputs()]
    compiled = jax.jit(jax.grad(loss, argnums=(0, 1, 2))).lower(*sharded).compile()
    program = compiled.as_text()
    assert not [name for name in ("all-gather", "all-to-all", "permute") if name in program]
    expected = jax.grad(
        lambda *x: jnp.square(attention(*x, mask, "einsum")).sum(), argnums=(0, 1, 2)
    )(*inputs())
    for found, wanted in zip(compiled(*sharded), expected, strict=True):
        np.testing.assert_allclose(found, wanted, atol=5e-6)
