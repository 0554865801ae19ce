"""The Vision Transformer, the attention below it, and its position embeddings."""

from dataclasses import replace
from functools import cache

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from mmjax.attention import IMPLEMENTATIONS, attention, attention_weights
from mmjax.errors import InputError
from mmjax.models import ViT, ViTConfig, resize_position_embedding
from mmjax.models.vit import normalise
from tests.models import reference

SMALL = ViTConfig(width=32, depth=2, heads=4, mlp_width=48, image_size=24, patch_size=8)
ODD = ViTConfig(
    width=21, depth=3, heads=3, image_size=20, patch_size=10, pool="mean", epsilon=1e-3
)  # fmt: skip
CONFIGS = {
    "class_token": SMALL,
    "mean_odd_heads": ODD,
    "attention_pool": replace(ODD, pool="attention"),
    "post_norm": replace(SMALL, norm="post"),
}


def pictures(config, rows=3, seed=0):
    side = config.image_size
    return jnp.array(np.random.default_rng(seed).normal(size=(rows, side, side, 3)), jnp.float32)


@cache
def compiled(config):
    graph, params = reference.split(lambda: ViT(config, nnx.Rngs(0)))
    return jax.jit(lambda image, key: nnx.merge(graph, params)(image, key))


def encode(config, image, key=None):
    return compiled(config)(image, key)


@pytest.mark.parametrize("name", CONFIGS)
def test_agrees_with_the_paper(name):
    config = CONFIGS[name]
    _, params = reference.split(lambda: ViT(config, nnx.Rngs(0)))
    image = pictures(config)
    encoded = encode(config, image)
    tokens, pooled = reference.vit(params, image, config)
    np.testing.assert_allclose(encoded.tokens, tokens, atol=5e-5)
    np.testing.assert_allclose(encoded.pooled, pooled, atol=5e-5)
    assert encoded.mask is None
    patches = (config.image_size // config.patch_size) ** 2
    assert tokens.shape[1] == patches + (config.pool == "class_token")


def test_pixels_are_normalised_on_the_way_in():
    config = replace(SMALL, mean=(0.1, 0.4, 0.5), std=(0.2, 0.3, 0.5))
    pixels = np.random.default_rng(0).integers(0, 256, (2, 24, 24, 3)).astype(np.uint8)
    expected = (pixels / 255.0 - np.array(config.mean)) / np.array(config.std)
    np.testing.assert_allclose(
        normalise(jnp.array(pixels), config.mean, config.std), expected, atol=1e-5
    )
    np.testing.assert_allclose(
        encode(config, pixels).tokens,
        encode(config, jnp.array(expected, jnp.float32)).tokens,
        atol=1e-4,
    )


def loss_and_gradient(config, key=None):
    graph, params = reference.split(lambda: ViT(config, nnx.Rngs(0)))
    image = pictures(config)

    def loss(params):
        encoded = nnx.merge(graph, params)(image, key)
        return jnp.square(encoded.tokens.astype(jnp.float32)).mean() + encoded.pooled.sum()

    return jax.jit(jax.value_and_grad(loss))(params)


@pytest.fixture(scope="module")
def plain():
    return loss_and_gradient(replace(SMALL, dropout=0.2), jax.random.key(3))


@pytest.mark.parametrize(
    "change", [{"unroll": True}, {"remat": "dots"}, {"unroll": True, "remat": "full"}], ids=str
)
def test_how_it_computes_changes_nothing(change, plain):
    """Neither values nor gradients, and every layer's dropout is drawn alike."""
    loss, gradient = plain
    found, found_gradient = loss_and_gradient(
        replace(SMALL, dropout=0.2, **change), jax.random.key(3)
    )
    np.testing.assert_allclose(found, loss, rtol=1e-5)
    reference.assert_close(found_gradient, gradient)


def test_half_precision_stays_near():
    exact = encode(SMALL, pictures(SMALL))
    half = encode(replace(SMALL, dtype="bfloat16"), pictures(SMALL))
    assert half.tokens.dtype == jnp.bfloat16
    error = np.abs(half.tokens.astype(np.float32) - exact.tokens)
    assert error.max() < 0.1
    assert error.mean() < 0.01


def test_dropout_is_drawn_by_the_key_and_anew_in_every_layer():
    config = replace(SMALL, dropout=0.5)
    image = pictures(config)
    once, again, other = (encode(config, image, jax.random.key(n)).tokens for n in (1, 1, 2))
    np.testing.assert_array_equal(once, again)
    assert np.abs(once - other).max() > 0.1
    np.testing.assert_array_equal(encode(config, image).tokens, encode(SMALL, image).tokens)


def test_every_layer_draws_its_own_mask():
    config = replace(SMALL, dropout=0.5)
    graph, params = reference.split(lambda: ViT(config, nnx.Rngs(0)))
    blocks = nnx.merge(graph, params).blocks
    x = jnp.ones((2, 4, 32))

    def dropped(layer, x, key):
        return x, layer.mlp(x, key=key) == x

    masks = np.asarray(blocks.run(dropped, x, jax.random.key(0))[1])
    assert 0.4 < masks.mean() < 0.6
    assert (masks[0] != masks[1]).mean() > 0.3
    assert not np.asarray(blocks.run(dropped, x)[1]).any()


def test_named_sizes():
    base = ViTConfig(size="B/16")
    assert (base.width, base.depth, base.heads, base.mlp_width) == (768, 12, 12, 3072)
    assert (base.patch_size, base.grid) == (16, (14, 14))
    large = ViTConfig(size="L/14", image_size=336)
    assert (large.width, large.depth, large.heads, large.mlp_width) == (1024, 24, 16, 4096)
    assert large.grid == (24, 24)
    for size, width, heads in (("Ti/16", 192, 3), ("S/16", 384, 6), ("B/32", 768, 12)):
        config = ViTConfig(size=size)
        assert (config.width, config.heads, config.depth) == (width, heads, 12)
        assert config.mlp_width == 4 * width
    assert ViTConfig(size="B/16", depth=4).depth == 4
    assert ViTConfig(width=128, depth=1, patch_size=16).heads == 2
    shapes = jax.eval_shape(
        lambda: nnx.to_pure_dict(nnx.split(ViT(ViTConfig(size="B/16"), nnx.Rngs(0)))[1])
    )
    # 86.6 million, the paper's table 1, less the 1000-class head of 768,000 + 1,000.
    assert sum(leaf.size for leaf in jax.tree.leaves(shapes)) == 86_567_656 - 769_000


@pytest.mark.parametrize(
    ("fields", "words"),
    [
        ({"size": "B"}, ["'B'", "B/16"]),
        ({"size": "XL/16"}, ["'XL/16'", "WIDTH/PATCH"]),
        ({"size": "B/x"}, ["'B/x'"]),
        ({}, ["ViTConfig", "width is 0"]),
        ({"width": 32, "depth": 0, "patch_size": 8}, ["depth 0"]),
        ({"width": 32, "depth": 1, "heads": 5, "patch_size": 8}, ["width 32", "5 heads"]),
        ({"width": 64, "depth": 1, "patch_size": 15}, ["224", "15"]),
        ({"width": 64, "depth": 1}, ["patch_size 0"]),
        ({"size": "S/16", "pool": "avg"}, ["'avg'", "mean"]),
        ({"size": "S/16", "norm": "post-norm"}, ["'post-norm'", "post"]),
        ({"size": "S/16", "activation": "gelu_tan"}, ["gelu_tanh"]),
        ({"size": "S/16", "remat": "ful"}, ["full"]),
        ({"size": "S/16", "dtype": "float16"}, ["float16", "bfloat16"]),
    ],
    ids=str,
)
def test_what_cannot_be_built_is_refused(fields, words):
    with pytest.raises(InputError) as error:
        ViTConfig(**fields)
    assert all(word in str(error.value) for word in words), str(error.value)


def test_a_picture_of_another_size_is_refused():
    with pytest.raises(InputError, match=r"24×24 pixels .* 32×24.*image_size"):
        encode(SMALL, jnp.zeros((1, 32, 24, 3)))


# ---- attention


def attention_inputs(batch=2, queries=5, keys=7, heads=3, width=4, seed=0):
    rng = np.random.default_rng(seed)
    query = 2 * rng.normal(size=(batch, queries, heads, width))
    key, value = (rng.normal(size=(batch, keys, heads, width)) for _ in range(2))
    return [jnp.array(x, jnp.float32) for x in (query, key, value)]


MASKS = {
    "none": None,
    "keys": np.arange(7) < np.array([[[7]], [[3]]]),
    "pairs": np.random.default_rng(1).random((2, 5, 7)) < 0.6,
}


@pytest.mark.parametrize("mask", MASKS)
@pytest.mark.parametrize("implementation", ["einsum", "head_major", "auto"])
def test_attention_agrees_with_the_paper(implementation, mask):
    query, key, value = attention_inputs()
    mask = None if MASKS[mask] is None else jnp.array(MASKS[mask])
    found = attention(query, key, value, mask, implementation)
    expected = np.zeros(query.shape)
    full = np.ones((2, 5, 7), bool) if mask is None else np.broadcast_to(mask, (2, 5, 7))
    for b, h in np.ndindex(2, 3):
        expected[b, :, h] = reference.attend(query[b, :, h], key[b, :, h], value[b, :, h], full[b])
    np.testing.assert_allclose(found, expected, atol=2e-6)
    weights = attention_weights(query, key, mask)
    np.testing.assert_allclose(weights.sum(axis=-1), 1, atol=1e-6)
    np.testing.assert_allclose(np.einsum("bhqk,bkhd->bqhd", weights, value), expected, atol=2e-6)


@pytest.mark.parametrize("implementation", ["einsum", "sliced", "head_major"])
def test_attention_gradients(implementation):
    query, key, value = attention_inputs()
    mask = MASKS["keys"]

    def loss(*qkv):
        return jnp.sin(attention(*qkv, jnp.array(mask), implementation)).sum()

    gradients = jax.grad(loss, (0, 1, 2))(query, key, value)
    rng = np.random.default_rng(2)

    def exact(*qkv):
        out = np.zeros(query.shape)
        for b, h in np.ndindex(2, 3):
            out[b, :, h] = reference.attend(*(x[b, :, h] for x in qkv), mask[b])
        return np.sin(out).sum()

    for position, gradient in enumerate(gradients):
        direction = rng.normal(size=gradient.shape)
        ends = []
        for sign in (1, -1):
            moved = [np.asarray(x, np.float64) for x in (query, key, value)]
            moved[position] = moved[position] + sign * 1e-5 * direction
            ends.append(exact(*moved))
        np.testing.assert_allclose(
            (gradient * direction).sum(), (ends[0] - ends[1]) / 2e-5, rtol=1e-4, atol=1e-5
        )


@pytest.mark.parametrize("implementation", ["einsum", "sliced", "head_major"])
def test_rows_without_a_key_stay_finite(implementation):
    query, key, value = attention_inputs()
    mask = jnp.array([True, False])[:, None, None] & jnp.ones((1, 1, 7), bool)
    out, gradients = jax.value_and_grad(
        lambda *qkv: attention(*qkv, mask, implementation).sum(), (0, 1, 2)
    )(query, key, value)
    assert np.isfinite(out)
    assert all(np.isfinite(gradient).all() for gradient in gradients)


@pytest.mark.parametrize("implementation", ["einsum", "sliced", "head_major"])
def test_attention_in_half_precision_keeps_large_scores_apart(implementation):
    query, key, value = (jnp.array(x, jnp.bfloat16) for x in attention_inputs())
    query = query * 8
    out = attention(query, key, value, None, implementation)
    assert out.dtype == jnp.bfloat16
    exact = attention(*(x.astype(jnp.float32) for x in (query, key, value)), None, "einsum")
    assert np.abs(out.astype(np.float32) - exact).max() < 0.03


def test_an_unknown_implementation_is_named():
    query, key, value = attention_inputs()
    with pytest.raises(InputError, match=r"'headmajor' is unknown.*head_major"):
        attention(query, key, value, None, "headmajor")
    assert set(IMPLEMENTATIONS) == {"einsum", "sliced", "head_major", "fused", "cudnn"}


# ---- position embeddings


@pytest.mark.parametrize(("old", "new"), [(4, 6), (6, 4), (5, 5)])
def test_resized_positions_agree_with_albef(old, new, shared):
    with np.load(shared / "goldens" / "albef_posembed_dev.npz") as golden:
        before, after = golden[f"in/{old}to{new}"][0], golden[f"out/{old}to{new}"][0]
    found = resize_position_embedding(before, 1 + new**2)
    assert found.dtype == before.dtype
    np.testing.assert_allclose(found, after, atol=2e-6)


def test_resizing_positions_keeps_what_it_should():
    table = np.random.default_rng(0).normal(size=(17, 8)).astype(np.float32)
    np.testing.assert_array_equal(resize_position_embedding(table, 17), table)
    np.testing.assert_array_equal(resize_position_embedding(table, 50)[0], table[0])
    grid = table[1:]
    np.testing.assert_array_equal(resize_position_embedding(grid, 16), grid)
    np.testing.assert_allclose(
        resize_position_embedding(grid, 49), resize_position_embedding(table, 50)[1:]
    )
    flat = np.full((9, 2), 3.0)
    np.testing.assert_allclose(resize_position_embedding(flat, 25), 3.0, atol=1e-12)


def test_positions_that_make_no_grid_are_refused():
    table = np.zeros((17, 8), np.float32)
    with pytest.raises(InputError, match="17 and of 16 rows"):
        resize_position_embedding(table, 16)
    with pytest.raises(InputError, match="19 position embeddings are no square"):
        resize_position_embedding(table, 19)
