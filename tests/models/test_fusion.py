"""Co-attention between the two encoders' tokens."""

from dataclasses import replace
from functools import cache

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from mmjax.errors import InputError
from mmjax.models import CoAttention, CoAttentionConfig, Encoded
from tests.models import reference

PLAIN = CoAttentionConfig(width=32, depth=2, heads=4, mlp_width=48)
METER = CoAttentionConfig(
    width=21, depth=3, heads=3, norm="post", epsilon=1e-12, project=True, token_types=True
)
LXMERT = CoAttentionConfig(
    width=24,
    depth=2,
    heads=3,
    norm="post",
    epsilon=1e-12,
    order="cross_first",
    share_cross=True,
    pool="text",
)
CONFIGS = {
    "plain": PLAIN,
    "meter": METER,
    "lxmert": LXMERT,
    "pre_norm_lxmert": replace(LXMERT, norm="pre", epsilon=1e-5),
    "pre_norm_meter": replace(METER, norm="pre"),
}


def widths(config):
    return (20, 28) if config.project else (config.width, config.width)


def pair(config, lengths=(6, 3), length=6, seed=0):
    rng = np.random.default_rng(seed)
    image_width, text_width = widths(config)
    mask = jnp.array(np.arange(length) < np.array(lengths)[:, None])
    image = jnp.array(rng.normal(size=(len(lengths), 5, image_width)), jnp.float32)
    text = jnp.array(rng.normal(size=(len(lengths), length, text_width)), jnp.float32)
    return Encoded(image, None, image[:, 0]), Encoded(text, mask, text[:, 0])


def make(config, class_token=True):
    return reference.split(
        lambda: CoAttention(config, *widths(config), nnx.Rngs(0), image_class_token=class_token)
    )


@cache
def compiled(config, class_token):
    graph, params = make(config, class_token)
    return jax.jit(lambda *inputs: nnx.merge(graph, params)(*inputs))


def fuse(config, image, text, key=None, class_token=True):
    return compiled(config, class_token)(image, text, key)


@pytest.mark.parametrize("class_token", [True, False])
@pytest.mark.parametrize("name", CONFIGS)
def test_agrees_with_the_papers(name, class_token):
    config = CONFIGS[name]
    if config.pool == "text" and not class_token:
        pytest.skip("the text alone is pooled")
    image, text = pair(config)
    fused = fuse(config, image, text, class_token=class_token)
    expected = reference.co_attention(
        make(config)[1],
        np.asarray(image.tokens, np.float64),
        np.asarray(text.tokens, np.float64),
        np.asarray(text.mask),
        config,
        class_token,
    )
    for found, wanted in zip(
        (fused.image_tokens, fused.text_tokens, fused.pooled), expected, strict=True
    ):
        np.testing.assert_allclose(found, wanted, atol=1e-4)


@pytest.mark.parametrize("name", ["plain", "meter", "lxmert"])
def test_padding_changes_nothing(name):
    config = CONFIGS[name]
    image, text = pair(config)
    padding = jnp.full((2, 3, text.tokens.shape[2]), 7.0)
    padded = Encoded(
        jnp.concatenate([text.tokens, padding], axis=1),
        jnp.pad(text.mask, ((0, 0), (0, 3))),
        text.pooled,
    )
    expected, found = fuse(config, image, text), fuse(config, image, padded)
    np.testing.assert_allclose(found.image_tokens, expected.image_tokens, atol=1e-5)
    np.testing.assert_allclose(found.pooled, expected.pooled, atol=1e-5)
    seen = np.asarray(text.mask)
    np.testing.assert_allclose(
        found.text_tokens[:, :6][seen], np.asarray(expected.text_tokens)[seen], atol=1e-5
    )


def test_both_streams_hear_of_each_other():
    """A change of one picture reaches its own text and no other row."""
    image, text = pair(PLAIN)
    changed = replace(image, tokens=image.tokens.at[0, 2, 3].add(1.0))
    before, after = fuse(PLAIN, image, text), fuse(PLAIN, changed, text)
    assert np.abs(after.text_tokens[0] - before.text_tokens[0]).max() > 1e-2
    np.testing.assert_array_equal(after.text_tokens[1], before.text_tokens[1])
    changed = replace(text, tokens=text.tokens.at[1, 1, 3].add(1.0))
    after = fuse(PLAIN, image, changed)
    assert np.abs(after.image_tokens[1] - before.image_tokens[1]).max() > 1e-2
    np.testing.assert_array_equal(after.image_tokens[0], before.image_tokens[0])


def test_lxmert_shares_one_cross_attention():
    shared = sum(x.size for x in jax.tree.leaves(make(LXMERT)[1]))
    apart = sum(x.size for x in jax.tree.leaves(make(replace(LXMERT, share_cross=False))[1]))
    # Four projections with biases and a LayerNorm, in each of two layers.
    assert apart - shared == 2 * (4 * (24 * 24 + 24) + 2 * 24)


@pytest.mark.parametrize("name", ["plain", "meter", "lxmert"])
def test_attention_maps_are_the_attention_of_the_call(name):
    config = CONFIGS[name]
    graph, params = make(config)
    image, text = pair(config)
    maps = jax.jit(lambda params: nnx.merge(graph, params).attention_maps(image, text))(params)
    assert maps.shape == (config.depth, 2, 6, 5)
    np.testing.assert_allclose(maps.sum(axis=-1), 1, atol=1e-5)
    expected = _maps(params, image, text, config)
    np.testing.assert_allclose(maps, expected, atol=1e-4)


def _maps(params, image, text, config):
    """The same from the reference: the softmax of the words' cross-attention, mean over heads."""
    seen = []
    original = reference.multi_head

    def spy(x, context, p, mask):
        if x.shape[1] == 6 and context.shape[1] == 5:
            heads = []
            for h in range(config.heads):
                q = x @ p["query"]["kernel"][:, h] + p["query"]["bias"][h]
                k = context @ p["key"]["kernel"][:, h] + p["key"]["bias"][h]
                scores = np.einsum("bqd,bkd->bqk", q, k) / np.sqrt(q.shape[-1])
                heads.append(reference.softmax(scores))
            seen.append(np.mean(heads, axis=0))
        return original(x, context, p, mask)

    reference.multi_head = spy
    try:
        reference.co_attention(
            params, np.asarray(image.tokens), np.asarray(text.tokens), np.asarray(text.mask), config
        )
    finally:
        reference.multi_head = original
    return np.stack(seen)


def loss_and_gradient(config, key):
    graph, params = make(config)
    image, text = pair(config)

    def loss(params):
        fused = nnx.merge(graph, params)(image, text, key)
        return jnp.sin(fused.image_tokens).sum() + fused.pooled.sum()

    return jax.jit(jax.value_and_grad(loss))(params)


def test_how_it_computes_changes_nothing():
    config, key = replace(PLAIN, dropout=0.2), jax.random.key(3)
    loss, gradient = loss_and_gradient(config, key)
    found, found_gradient = loss_and_gradient(replace(config, unroll=True, remat="full"), key)
    np.testing.assert_allclose(found, loss, rtol=1e-5)
    reference.assert_close(found_gradient, gradient)


def test_half_precision_stays_near():
    image, text = pair(PLAIN)
    exact = fuse(PLAIN, image, text)
    half = fuse(replace(PLAIN, dtype="bfloat16"), image, text)
    assert np.abs(half.pooled.astype(np.float32) - exact.pooled).max() < 0.1


def test_dropout_is_drawn_by_the_key():
    config = replace(PLAIN, dropout=0.5)
    image, text = pair(config)
    once, again, other = (fuse(config, image, text, jax.random.key(n)).pooled for n in (1, 1, 2))
    np.testing.assert_array_equal(once, again)
    assert np.abs(once - other).max() > 0.05
    np.testing.assert_array_equal(fuse(config, image, text).pooled, fuse(PLAIN, image, text).pooled)


@pytest.mark.parametrize(
    ("fields", "words"),
    [
        ({"order": "self-first"}, ["'self-first'", "self_first"]),
        ({"pool": "bth"}, ["'bth'", "both"]),
        ({"heads": 5}, ["CoAttentionConfig", "5 heads"]),
    ],
    ids=str,
)
def test_what_cannot_be_built_is_refused(fields, words):
    with pytest.raises(InputError) as error:
        CoAttentionConfig(**{"width": 32, "depth": 1, "heads": 4, **fields})
    assert all(word in str(error.value) for word in words), str(error.value)


@pytest.mark.parametrize("encoders", [(32, 24), (24, 32), (24, 24)])
def test_widths_that_do_not_fit_are_refused(encoders):
    with pytest.raises(InputError, match=r"width is 32, .*project"):
        CoAttention(PLAIN, *encoders, nnx.Rngs(0))
