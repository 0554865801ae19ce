"""EfficientNet, beside the paper in plain numpy."""

from dataclasses import replace
from functools import cache

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from mmjax.errors import InputError
from mmjax.layers import drop_path
from mmjax.models.efficientnet import EfficientNet, EfficientNetConfig
from mmjax.models.vit import normalise
from tests.models import reference
from tests.models.convolutions import ACTIVATIONS, layer, normed_convolution, split

SMALL = EfficientNetConfig(
    width_coefficient=0.25,
    depth_coefficient=1.0,
    base_widths=(16, 24, 40),
    base_depths=(1, 3, 2),
    kernels=(3, 5, 3),
    strides=(1, 2, 2),
    expansions=(1, 3, 2),
)
CONFIGS = {
    "small": SMALL,
    # 27 and 41 pixels leave odd maps: block 0 pads them alike on both sides, block 2 does not.
    "padding": replace(SMALL, strides=(2, 2, 1), symmetric_blocks=(0,), base_depths=(2, 2, 1)),
    "maximum": replace(SMALL, pool="max", activation="relu", epsilon=1e-2, squeeze=0.4),
}


def pictures(height=27, width=41, rows=2):
    shape = (rows, height, width, 3)
    return jnp.array(np.random.default_rng(0).normal(size=shape), jnp.float32)


@cache
def compiled(config):
    graph, params = split(lambda: EfficientNet(config, nnx.Rngs(0)))
    return jax.jit(lambda image, key=None: nnx.merge(graph, params)(image, key))


def efficientnet(params, image, config):
    """Tan and Le 2019, table 1, of blocks as in Sandler et al. 2018, figure 4d."""
    p, epsilon, activation = reference.in_float64(params), config.epsilon, config.activation
    x = normed_convolution(np.float64(image), p["stem"], epsilon, activation, 2, padding=(0, 1))
    block = 0
    for stage, depth in enumerate(config.depths):
        for i in range(depth):
            block_p = layer(p["stages"][stage], i)
            stride, half = config.strides[stage] if i == 0 else 1, config.kernels[stage] // 2
            before = half - 1 if stride == 2 and block not in config.symmetric_blocks else half
            branch = x
            if config.expansions[stage] != 1:
                branch = normed_convolution(x, block_p["expand"], epsilon, activation)
            branch = normed_convolution(
                branch, block_p["depthwise"], epsilon, activation, stride, (before, half)
            )
            excitation = jax.tree.map(np.squeeze, block_p["excitation"])
            squeezed = ACTIVATIONS[activation](
                reference.dense(branch.mean(axis=(1, 2)), excitation["reduce"])
            )
            weights = 1 / (1 + np.exp(-reference.dense(squeezed, excitation["expand"])))
            branch = branch * weights[:, None, None]
            branch = normed_convolution(branch, block_p["project"], epsilon)
            x = branch if i == 0 else x + branch
            block += 1
    return x


@pytest.mark.parametrize("name", CONFIGS)
def test_agrees_with_the_paper(name):
    config = CONFIGS[name]
    _, params = split(lambda: EfficientNet(config, nnx.Rngs(0)))
    expected = efficientnet(params, pictures(), config)
    encoded = compiled(config)(pictures())
    tokens = expected.reshape(2, -1, config.width)
    pooled = tokens.max(axis=1) if config.pool == "max" else tokens.mean(axis=1)
    tolerance = 2e-6 * max(1, np.abs(tokens).max())
    np.testing.assert_allclose(encoded.tokens, tokens, atol=tolerance)
    np.testing.assert_allclose(encoded.pooled, pooled, atol=tolerance)
    assert encoded.mask is None
    assert replace(config, image_size=(27, 41)).grid == expected.shape[1:3]


def test_pixels_are_normalised_on_the_way_in():
    pixels = np.random.default_rng(0).integers(0, 256, (2, 20, 24, 3)).astype(np.uint8)
    found = compiled(SMALL)(jnp.array(pixels))
    exact = normalise(jnp.array(pixels), (0.5,) * 3, (0.5,) * 3)
    np.testing.assert_allclose(found.tokens, compiled(SMALL)(exact).tokens, atol=1e-5)


def gradient_of(config, key=None):
    graph, params = split(lambda: EfficientNet(config, nnx.Rngs(0)))

    def loss(params):
        encoded = nnx.merge(graph, params)(pictures(), key)
        return jnp.square(encoded.tokens).mean() + encoded.pooled.sum()

    return jax.jit(jax.grad(loss))(params)


@pytest.fixture(scope="module")
def dropped():
    return gradient_of(replace(SMALL, drop_path=0.5), jax.random.key(1))


@pytest.mark.parametrize("change", [{"unroll": True}, {"remat": "full"}], ids=str)
def test_how_it_computes_changes_nothing(change, dropped):
    config = replace(SMALL, drop_path=0.5, **change)
    reference.assert_close(gradient_of(config, jax.random.key(1)), dropped)


def test_gradient_of_the_maximum_is_finite():
    gradient = gradient_of(CONFIGS["maximum"])
    assert all(np.isfinite(leaf).all() for leaf in jax.tree.leaves(gradient))
    assert np.any(gradient["stages"][0]["first"]["project"]["norm"]["scale"])


def test_half_precision_stays_near():
    exact = compiled(SMALL)(pictures())
    half = compiled(replace(SMALL, dtype="bfloat16"))(pictures())
    assert half.tokens.dtype == jnp.bfloat16
    scale = np.abs(exact.tokens).max()
    assert np.abs(half.tokens.astype(np.float32) - exact.tokens).max() < 0.03 * scale


def test_branches_are_dropped_by_the_key():
    config = replace(SMALL, drop_path=0.9)
    once, again, other = (compiled(config)(pictures(), jax.random.key(n)).tokens for n in (1, 1, 2))
    np.testing.assert_array_equal(once, again)
    assert np.abs(once - other).max() > 0.1
    np.testing.assert_array_equal(
        compiled(config)(pictures()).tokens, compiled(SMALL)(pictures()).tokens
    )


def test_drop_path_keeps_or_zeroes_whole_rows():
    x = jnp.array(np.random.default_rng(0).normal(size=(4000, 2, 3)), jnp.float32)
    out = np.asarray(drop_path(x, 0.25, jax.random.key(0)))
    kept = (out != 0).any(axis=(1, 2))
    np.testing.assert_allclose(out[kept], np.asarray(x)[kept] / 0.75, rtol=1e-6)
    assert kept.mean() == pytest.approx(0.75, abs=0.03)
    np.testing.assert_array_equal(drop_path(x, 0.25, None), x)
    np.testing.assert_array_equal(drop_path(x, 0.0, jax.random.key(0)), x)


@pytest.mark.parametrize(
    ("size", "parameters", "grid"),
    # The authors' counts, less the last convolution of 4 × width and the classifier of 1000.
    [
        ("b0", 5_288_548 - 322 * 1280 - 1281 * 1000, (7, 7)),
        ("b7", 66_347_960 - 642 * 2560 - 2561 * 1000, (18, 18)),
    ],
)
def test_named_sizes(size, parameters, grid):
    config = EfficientNetConfig(size=size)
    model = nnx.eval_shape(lambda: EfficientNet(config, nnx.Rngs(0)))
    assert sum(x.size for x in jax.tree.leaves(nnx.state(model, nnx.Param))) == parameters
    assert config.grid == grid
    assert EfficientNetConfig(size=size, image_size=64).grid == (2, 2)


def test_a_picture_that_leaves_no_position_is_refused():
    with pytest.raises(InputError, match=r"7×40 pixels are too small .* by 8"):
        compiled(SMALL)(pictures(7, 40))
    assert compiled(SMALL)(pictures(8, 8)).tokens.shape == (2, 1, SMALL.width)


@pytest.mark.parametrize(
    ("fields", "words"),
    [
        ({"size": "b8"}, ["'b8'", "b7"]),
        ({"width_coefficient": -1.0}, ["width_coefficient -1.0", "positive"]),
        ({"pool": "avg"}, ["'avg'", "mean"]),
        ({"kernels": (3, 5)}, ["one number a stage", "(3, 5)"]),
        ({"base_depths": (1, 2, 2, 3, 3, 0, 1)}, ["below 1"]),
        ({"kernels": (3, 3, 4, 3, 5, 5, 3)}, ["odd"]),
        ({"strides": (1, 2, 2, 3, 1, 2, 1)}, ["1 or 2"]),
        ({"activation": "swish"}, ["'swish'", "silu"]),
    ],
    ids=str,
)
def test_what_cannot_be_built_is_refused(fields, words):
    with pytest.raises(InputError) as error:
        EfficientNetConfig(**fields)
    assert all(word in str(error.value) for word in words), str(error.value)
