"""The BERT encoder."""

from dataclasses import replace
from functools import cache

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from mmjax.errors import InputError
from mmjax.models import BertConfig, BertEncoder
from tests.models import reference

SMALL = BertConfig(width=32, depth=2, heads=4, mlp_width=48, vocabulary_size=30, max_length=12)
ODD = BertConfig(
    width=21, depth=3, heads=3, vocabulary_size=17, max_length=9, types=3, norm="pre", epsilon=1e-5
)
CONFIGS = {"post_norm": SMALL, "pre_norm_odd_heads": ODD}


def texts(config, lengths=(7, 4, 1), length=7, seed=0):
    rng = np.random.default_rng(seed)
    text = rng.integers(1, config.vocabulary_size, (len(lengths), length))
    mask = np.arange(length) < np.array(lengths)[:, None]
    return jnp.array(np.where(mask, text, 0), jnp.int32), jnp.array(mask)


@cache
def compiled(config):
    graph, params = reference.split(lambda: BertEncoder(config, nnx.Rngs(0)))
    return jax.jit(lambda *inputs: nnx.merge(graph, params)(*inputs))


def encode(config, text, mask, types=None, key=None):
    return compiled(config)(text, mask, types, key)


@pytest.mark.parametrize("name", CONFIGS)
def test_agrees_with_the_paper(name):
    config = CONFIGS[name]
    _, params = reference.split(lambda: BertEncoder(config, nnx.Rngs(0)))
    text, mask = texts(config)
    types = jnp.array(np.random.default_rng(1).integers(0, config.types, text.shape), jnp.int32)
    for given in (None, types):
        encoded = encode(config, text, mask, given)
        tokens, pooled = reference.bert(
            params, np.asarray(text), np.asarray(mask), config, 0 if given is None else types
        )
        np.testing.assert_allclose(encoded.tokens, tokens, atol=5e-5)
        np.testing.assert_allclose(encoded.pooled, pooled, atol=5e-5)
        np.testing.assert_array_equal(encoded.mask, mask)


@pytest.mark.parametrize("name", CONFIGS)
def test_padding_changes_nothing(name):
    config = CONFIGS[name]
    short, short_mask = texts(config, (5, 3), length=5)
    padded = jnp.pad(short, ((0, 0), (0, 4)), constant_values=config.vocabulary_size - 1)
    padded_mask = jnp.pad(short_mask, ((0, 0), (0, 4)))
    expected, found = encode(config, short, short_mask), encode(config, padded, padded_mask)
    seen = np.asarray(short_mask)
    np.testing.assert_allclose(
        found.tokens[:, :5][seen], np.asarray(expected.tokens)[seen], atol=1e-5
    )
    np.testing.assert_allclose(found.pooled, expected.pooled, atol=1e-5)


def test_words_are_scored_by_the_embedding_table():
    graph, params = reference.split(lambda: BertEncoder(SMALL, nnx.Rngs(0)))
    x = np.random.default_rng(0).normal(size=(2, 5, 32)).astype(np.float32)
    encoder = nnx.merge(graph, params)
    table = params["embeddings"]["token_embedding"]["embedding"]
    np.testing.assert_allclose(encoder.embeddings.logits(jnp.array(x)), x @ table.T, atol=1e-4)
    assert encoder.embeddings.logits(jnp.array(x, jnp.bfloat16)).dtype == jnp.float32


def loss_and_gradient(config, key):
    graph, params = reference.split(lambda: BertEncoder(config, nnx.Rngs(0)))
    text, mask = texts(config)

    def loss(params):
        tokens = nnx.merge(graph, params)(text, mask, key=key).tokens
        return jnp.sin(tokens).sum(where=mask[..., None])

    return jax.jit(jax.value_and_grad(loss))(params)


@pytest.fixture(scope="module")
def plain():
    return loss_and_gradient(replace(SMALL, dropout=0.2), jax.random.key(3))


@pytest.mark.parametrize(
    "change",
    [{"unroll": True, "attention": "einsum"}, {"remat": "full", "attention": "head_major"}],
    ids=str,
)
def test_how_it_computes_changes_nothing(change, plain):
    loss, gradient = plain
    found, found_gradient = loss_and_gradient(
        replace(SMALL, dropout=0.2, **change), jax.random.key(3)
    )
    np.testing.assert_allclose(found, loss, rtol=1e-5)
    reference.assert_close(found_gradient, gradient)


def test_half_precision_stays_near():
    text, mask = texts(SMALL)
    exact = encode(SMALL, text, mask)
    half = encode(replace(SMALL, dtype="bfloat16"), text, mask)
    assert half.tokens.dtype == jnp.bfloat16
    error = np.abs(half.tokens.astype(np.float32) - exact.tokens)[np.asarray(mask)]
    assert error.max() < 0.2
    assert error.mean() < 0.02


def test_dropout_is_drawn_by_the_key():
    config = replace(SMALL, dropout=0.5)
    text, mask = texts(config)
    once, again, other = (encode(config, text, mask, None, jax.random.key(n)) for n in (1, 1, 2))
    np.testing.assert_array_equal(once.tokens, again.tokens)
    assert np.abs(once.tokens - other.tokens).max() > 0.1
    np.testing.assert_array_equal(
        encode(config, text, mask).tokens, encode(SMALL, text, mask).tokens
    )


def test_named_sizes():
    base = BertConfig(size="base", vocabulary_size=30522)
    assert (base.width, base.depth, base.heads, base.mlp_width) == (768, 12, 12, 3072)
    tiny = BertConfig(size="tiny")
    assert (tiny.width, tiny.depth, tiny.heads, tiny.mlp_width) == (128, 2, 2, 512)
    assert BertConfig(size="base", depth=6).depth == 6
    shapes = jax.eval_shape(lambda: nnx.to_pure_dict(nnx.split(BertEncoder(base, nnx.Rngs(0)))[1]))
    # BERT-base without its pooler (768 × 768 + 768).
    assert sum(leaf.size for leaf in jax.tree.leaves(shapes)) == 109_482_240 - 590_592


@pytest.mark.parametrize(
    ("fields", "words"),
    [
        ({"size": "bsae"}, ["'bsae'", "Did you mean base?"]),
        ({}, ["BertConfig", "named size"]),
        ({"width": 48, "depth": 1, "heads": 7}, ["width 48", "7 heads"]),
    ],
    ids=str,
)
def test_what_cannot_be_built_is_refused(fields, words):
    with pytest.raises(InputError) as error:
        BertConfig(**fields)
    assert all(word in str(error.value) for word in words), str(error.value)


def test_a_vocabulary_is_needed():
    with pytest.raises(InputError, match="vocabulary_size is 0"):
        BertEncoder(replace(SMALL, vocabulary_size=0), nnx.Rngs(0))


def test_a_text_longer_than_the_positions_is_refused():
    with pytest.raises(InputError, match=r"13 tokens .* 12 positions: .*data\.text_length"):
        encode(SMALL, *texts(SMALL, (13,), length=13))
