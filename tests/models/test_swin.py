"""The Swin Transformer, beside the paper in plain numpy, and the attention bias below it."""

from dataclasses import replace
from functools import cache

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from mmjax.attention import attention, attention_weights
from mmjax.errors import InputError
from mmjax.models.swin import Swin, SwinConfig
from mmjax.models.vit import normalise
from tests.models import reference

SMALL = SwinConfig(
    image_size=16, patch_size=2, stem_width=8, depths=(2, 2), heads=(2, 4), window=4, mlp_ratio=2.0
)
CONFIGS = {
    "small": (SMALL, (16, 16)),
    "positions": (replace(SMALL, absolute_positions=True, image_size=(16, 24)), (16, 24)),
    "odd": (
        SwinConfig(
            patch_size=(4, 2), stem_width=6, depths=(3, 1, 2), heads=(3, 1, 2), window=3,
            epsilon=1e-3, qkv_bias=False,
        ),
        (45, 27),
    ),
}  # fmt: skip


def pictures(height=16, width=16, rows=2):
    shape = (rows, height, width, 3)
    return jnp.array(np.random.default_rng(0).normal(size=shape), jnp.float32)


@cache
def compiled(config):
    graph, params = reference.split(lambda: Swin(config, nnx.Rngs(0)))
    return jax.jit(lambda image, key=None: nnx.merge(graph, params)(image, key))


def fill(x, down, across):
    return np.pad(x, ((0, 0), (0, -x.shape[1] % down), (0, -x.shape[2] % across), (0, 0)))


def swin(params, image, config):
    """Liu et al. 2021, sections 3.1 and 3.2."""
    p = reference.in_float64(params)
    down, across = np.broadcast_to(config.patch_size, 2)
    image = fill(np.float64(image), down, across)
    x = np.stack(
        [
            np.stack(
                [
                    np.einsum(
                        "bpqc,pqcd->bd",
                        image[:, r * down : (r + 1) * down, c * across : (c + 1) * across],
                        p["patch"]["kernel"],
                    )
                    for c in range(image.shape[2] // across)
                ],
                axis=1,
            )
            for r in range(image.shape[1] // down)
        ],
        axis=1,
    )
    x = reference.layer_norm(x + p["patch"]["bias"], p["embedding_norm"], 1e-5)
    if config.absolute_positions:
        x = x + p["position_embedding"].reshape(x.shape[1:])
    for stage, depth in enumerate(config.depths):
        stage_p = p["stages"][stage]
        for i, block in enumerate(reference.layers_of(stage_p["blocks"], depth)):
            shift = config.window // 2 if i % 2 and min(x.shape[1:3]) > config.window else 0
            x = x + windowed(x, block["window_attention"], config, shift)
            normed = reference.layer_norm(x, block["mlp"]["norm"], config.epsilon)
            hidden = reference.gelu(reference.dense(normed, block["mlp"]["up"]))
            x = x + reference.dense(hidden, block["mlp"]["down"])
        if stage < len(config.depths) - 1:
            x = fill(x, 2, 2)
            corners = [x[:, r::2, c::2] for r, c in ((0, 0), (1, 0), (0, 1), (1, 1))]
            x = np.concatenate(corners, axis=-1)
            x = reference.layer_norm(x, stage_p["merge"]["norm"], 1e-5)
            x = x @ stage_p["merge"]["reduction"]["kernel"]
    return reference.layer_norm(x, p["norm"], config.epsilon)


def windowed(x, p, config, shift):
    """Each token looks at those of its window: whose borders lie at `shift` and every size on."""
    size, height, width = config.window, *x.shape[1:3]
    x = fill(reference.layer_norm(x, p["norm"], config.epsilon), size, size)
    place = np.indices(x.shape[1:3]).reshape(2, -1).T
    window = (place - shift) // size
    x = x.reshape(len(x), -1, x.shape[-1])
    out = np.zeros_like(x)
    projections = {
        name: np.einsum("bnd,dhk->bhnk", x, p["attention"][name]["kernel"])
        + np.expand_dims(p["attention"][name].get("bias", np.zeros((1, 1))), 1)
        for name in ("query", "key", "value")
    }
    for n, (row, column) in enumerate(place):
        seen = np.flatnonzero((window == window[n]).all(axis=1))
        distance = np.array([row, column]) - place[seen] + size - 1
        bias = p["relative_position_bias"][distance[:, 0] * (2 * size - 1) + distance[:, 1]]
        query = projections["query"][:, :, n] / np.sqrt(projections["query"].shape[-1])
        scores = np.einsum("bhk,bhnk->bhn", query, projections["key"][:, :, seen]) + bias.T
        heads = np.einsum(
            "bhn,bhnk->bhk", reference.softmax(scores), projections["value"][:, :, seen]
        )
        out[:, n] = np.einsum("bhk,hkd->bd", heads, p["attention"]["out"]["kernel"])
    out = (out + p["attention"]["out"]["bias"]).reshape(
        len(x), -1, -(-width // size) * size, x.shape[-1]
    )
    return out[:, :height, :width]


@pytest.mark.parametrize("name", CONFIGS)
def test_agrees_with_the_paper(name):
    config, size = CONFIGS[name]
    _, params = reference.split(lambda: Swin(config, nnx.Rngs(0)))
    expected = swin(params, pictures(*size), config)
    encoded = compiled(config)(pictures(*size))
    tokens = expected.reshape(2, -1, config.width)
    np.testing.assert_allclose(encoded.tokens, tokens, atol=1e-5)
    np.testing.assert_allclose(encoded.pooled, tokens.mean(axis=1), atol=1e-5)
    assert encoded.mask is None
    assert replace(config, image_size=size).grid == expected.shape[1:3]


def test_pixels_are_normalised_on_the_way_in():
    pixels = np.random.default_rng(0).integers(0, 256, (2, 16, 16, 3)).astype(np.uint8)
    found = compiled(SMALL)(jnp.array(pixels))
    exact = normalise(jnp.array(pixels), SMALL.mean, SMALL.std)
    np.testing.assert_allclose(found.tokens, compiled(SMALL)(exact).tokens, atol=1e-4)


def gradient_of(config, key):
    graph, params = reference.split(lambda: Swin(config, nnx.Rngs(0)))

    def loss(params):
        encoded = nnx.merge(graph, params)(pictures(), key)
        return jnp.square(encoded.tokens).mean() + encoded.pooled.sum()

    return jax.jit(jax.grad(loss))(params)


DROPPED = replace(SMALL, dropout=0.2, drop_path=0.5)


@pytest.fixture(scope="module")
def dropped():
    return gradient_of(DROPPED, jax.random.key(1))


@pytest.mark.parametrize("change", [{"unroll": True}, {"remat": "full"}], ids=str)
def test_how_it_computes_changes_nothing(change, dropped):
    reference.assert_close(gradient_of(replace(DROPPED, **change), jax.random.key(1)), dropped)


def test_half_precision_stays_near():
    exact = compiled(SMALL)(pictures())
    half = compiled(replace(SMALL, dtype="bfloat16"))(pictures())
    assert half.tokens.dtype == jnp.bfloat16
    error = np.abs(half.tokens.astype(np.float32) - exact.tokens)
    assert error.max() < 0.1
    assert error.mean() < 0.01


@pytest.mark.parametrize("rate", ["dropout", "drop_path"])
def test_what_is_dropped_is_drawn_by_the_key(rate):
    config = replace(SMALL, **{rate: 0.5})
    once, again, other = (compiled(config)(pictures(), jax.random.key(n)).tokens for n in (1, 1, 2))
    np.testing.assert_array_equal(once, again)
    assert np.abs(once - other).max() > 0.1
    np.testing.assert_array_equal(
        compiled(config)(pictures()).tokens, compiled(SMALL)(pictures()).tokens
    )


@pytest.mark.parametrize(
    ("size", "parameters"),
    # The published counts, less the classifier of 1000 classes.
    [
        ("T", 28_288_354 - 769_000),
        ("S", 49_606_258 - 769_000),
        ("B", 87_768_224 - 1_025_000),
        ("L", 196_532_476 - 1_537_000),
    ],
)
def test_named_sizes(size, parameters):
    config = SwinConfig(size=size)
    model = nnx.eval_shape(lambda: Swin(config, nnx.Rngs(0)))
    assert sum(x.size for x in jax.tree.leaves(nnx.state(model))) == parameters
    assert config.grid == (7, 7)
    assert SwinConfig(size=size, window=12, image_size=384).grid == (12, 12)


def test_a_map_smaller_than_its_window_is_one_window():
    """The last stage of 8 × 8 patches is 4 × 4, less than the window of 6 that was asked for."""
    config = replace(SMALL, window=6)
    encoder = nnx.eval_shape(lambda: Swin(config, nnx.Rngs(0)))
    tables = [
        stage.blocks.layers.window_attention.relative_position_bias for stage in encoder.stages
    ]
    assert [table.shape for table in tables] == [(2, 11**2, 2), (2, 7**2, 4)]
    assert np.isfinite(compiled(config)(pictures()).tokens).all()


def test_pictures_that_do_not_fit_are_refused():
    with pytest.raises(InputError, match=r"windows of 4×4 tokens do not fit a map of 3×6"):
        compiled(SMALL)(pictures(12, 24))
    fixed = replace(SMALL, absolute_positions=True)
    with pytest.raises(InputError, match=r"positions for 8×8 patches .* have 9×8.*image_size"):
        compiled(fixed)(pictures(18, 16))


@pytest.mark.parametrize(
    ("fields", "words"),
    [
        ({"size": "XL"}, ["'XL'", "L"]),
        ({}, ["depths ()", "named size"]),
        ({"size": "T", "heads": (3, 6, 12)}, ["(3, 6, 12)"]),
        ({"size": "T", "heads": (3, 6, 12, 23)}, ["width 768", "23 heads"]),
        ({"size": "T", "window": 0}, ["window 0"]),
        ({"size": "T", "image_size": 0}, ["image_size 0"]),
        ({"size": "T", "activation": "gelu_tan"}, ["gelu_tanh"]),
        ({"size": "T", "dtype": "float16"}, ["'float16'", "bfloat16"]),
    ],
    ids=str,
)
def test_what_cannot_be_built_is_refused(fields, words):
    with pytest.raises(InputError) as error:
        SwinConfig(**fields)
    assert all(word in str(error.value) for word in words), str(error.value)


# ---- attention with a bias


@pytest.mark.parametrize("rows", [1, 2])
@pytest.mark.parametrize("implementation", ["einsum", "head_major", "auto"])
def test_attention_adds_the_bias_to_the_scores(implementation, rows):
    rng = np.random.default_rng(0)
    query = rng.normal(size=(2, 5, 3, 4))
    key, value = rng.normal(size=(2, 2, 7, 3, 4))
    bias = 2 * rng.normal(size=(rows, 3, 5, 7))
    mask = rng.random((2, 5, 7)) < 0.6
    scores = np.einsum("bqhd,bkhd->bhqk", query, key) / 2 + bias
    weights = reference.softmax(np.where(mask[:, None], scores, -np.inf))
    qkv = [jnp.array(x, jnp.float32) for x in (query, key, value)]
    mask, bias = jnp.array(mask), jnp.array(bias, jnp.float32)
    np.testing.assert_allclose(
        attention(*qkv, mask, implementation, bias),
        np.einsum("bhqk,bkhd->bqhd", weights, value),
        atol=2e-6,
    )
    np.testing.assert_allclose(attention_weights(*qkv[:2], mask, bias), weights, atol=2e-6)
