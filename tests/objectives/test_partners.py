"""Rows that travel between devices: what arrives is what indexing picks, and so is the gradient."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from mmjax.objectives import pairwise_exchange, partners, ragged_exchange
from mmjax.objectives.partners import fetch
from mmjax.sharding import BATCH_AXES
from tests.objectives.test_walk import on_devices

ROWS = 24
RANDOM = np.random.default_rng(0)
REQUESTS = {
    "anyone": RANDOM.integers(0, ROWS, ROWS),
    "everyone_the_same": np.full(ROWS, 17),  # (more than a round carries from one device)
    "one_popular_device": RANDOM.integers(3, 6, ROWS),
    "oneself": np.arange(ROWS),
    "backwards": np.arange(ROWS)[::-1].copy(),
}


def gathered(rows, output, sent_from, sent_to, sent_at, received_from, *, axis_name):
    """`jax.lax.ragged_all_to_all`, which CPUs have not: everything goes to everybody."""
    assert axis_name == BATCH_AXES
    me = jax.lax.axis_index(BATCH_AXES)
    told = jnp.all(jax.lax.all_gather(sent_to, BATCH_AXES)[:, me] == received_from)
    rows = jax.lax.all_gather(rows, BATCH_AXES)
    sent_from, sent_to, sent_at = (
        jax.lax.all_gather(x, BATCH_AXES)[:, me, None] for x in (sent_from, sent_to, sent_at)
    )
    number = jnp.arange(rows.shape[1]) - sent_from
    place = jnp.where((number >= 0) & (number < sent_to), sent_at + number, len(output))
    flat = rows.reshape(-1, *rows.shape[2:])
    arrived = output.at[place.reshape(-1)].set(flat, mode="drop")
    return jnp.where(told, arrived, jnp.full_like(arrived, -1))  # nothing that a test expects


@pytest.fixture(params=[pairwise_exchange, ragged_exchange], ids=["pairwise", "ragged"])
def exchange(request, monkeypatch):
    monkeypatch.setattr(partners, "_exchange", lambda: request.param)
    monkeypatch.setattr(jax.lax, "ragged_all_to_all", gathered)


def test_devices_take_the_exchange_that_they_have():
    with on_devices(8):
        assert partners._exchange() is pairwise_exchange


@pytest.mark.usefixtures("exchange")
@pytest.mark.parametrize("axes", [(1,), (8, 2), (8, 2, 2)], ids=str)
@pytest.mark.parametrize("case", REQUESTS)
def test_what_arrives_is_what_was_asked_for(case, axes):
    rows = jnp.array(REQUESTS[case])
    tree = {
        "tokens": jnp.array(RANDOM.normal(size=(ROWS, 3, 4)), jnp.float32),
        "half": jnp.arange(ROWS, dtype=jnp.bfloat16),
        "mask": jnp.array(RANDOM.integers(0, 2, (ROWS, 3)) > 0),
        "none": None,
    }
    weights = jnp.array(RANDOM.normal(size=(ROWS, 3, 4)), jnp.float32)

    def run(tree, rows):
        _, back = jax.vjp(lambda x: fetch(tree | {"tokens": x}, rows)["tokens"], tree["tokens"])
        return fetch(tree, rows), back(weights)[0]

    with on_devices(*axes):
        found, gradient = jax.jit(run)(tree, rows)
    for name in ("tokens", "half", "mask"):
        np.testing.assert_array_equal(found[name], tree[name][rows])
        assert found[name].dtype == tree[name].dtype
    expected = np.zeros((ROWS, 3, 4))
    np.add.at(expected, REQUESTS[case], np.float64(weights))
    np.testing.assert_allclose(gradient, expected, rtol=1e-5, atol=1e-6)
