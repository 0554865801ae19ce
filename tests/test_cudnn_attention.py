"""cuDNN's kernel is asked for what it answers; whether it answers right, a GPU alone can tell."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from mmjax.attention import attention

BATCH, QUERIES, KEYS, HEADS, WIDTH = 2, 5, 7, 3, 8
MASKS = {
    "none": None,
    "keys": np.arange(KEYS) < np.array([[[7]], [[3]]]),
    "shared": np.tril(np.ones((1, QUERIES, KEYS), bool)),
    "pairs": np.random.default_rng(1).random((BATCH, QUERIES, KEYS)) < 0.8,
}


@pytest.mark.parametrize("biased", [False, True])
@pytest.mark.parametrize("mask", MASKS)
def test_masks_are_spelt_out_and_lengths_even(mask, biased, monkeypatch):
    rng = np.random.default_rng(0)
    query = jnp.array(rng.normal(size=(BATCH, QUERIES, HEADS, WIDTH)), jnp.float32)
    key, value = jnp.array(rng.normal(size=(2, BATCH, KEYS, HEADS, WIDTH)), jnp.float32)
    bias = jnp.array(rng.normal(size=(1, HEADS, QUERIES, KEYS)), jnp.float32) if biased else None
    mask = None if MASKS[mask] is None else jnp.array(MASKS[mask])
    real, asked = jax.nn.dot_product_attention, []

    def kernel(query, key, value, bias=None, mask=None, *, implementation):
        # What check_layout and check_is_flash_attention of jax._src.cudnn ask for.
        asked.append(implementation)
        lengths = query.shape[1], key.shape[1]
        for array in (bias, mask):
            assert array is None or array.shape[2:] == lengths
        assert (bias is None and mask is None) or not any(length % 2 for length in lengths)
        return real(query, key, value, bias, mask, implementation="xla")

    monkeypatch.setattr(jax.nn, "dot_product_attention", kernel)

    def outcome(implementation):
        def loss(*inputs):
            heads = attention(*inputs, mask, implementation, bias)
            return jnp.sin(heads).sum(), heads

        (_, heads), gradients = jax.value_and_grad(loss, (0, 1, 2), True)(query, key, value)
        return heads, *gradients

    for found, expected in zip(outcome("cudnn"), outcome("einsum"), strict=True):
        np.testing.assert_allclose(found, expected, atol=3e-6)
    assert asked == ["cudnn"]
