"""The residual network, beside the paper in plain numpy."""

from dataclasses import replace
from functools import cache

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from mmjax.errors import InputError
from mmjax.models.resnet import ResNet, ResNetConfig
from mmjax.models.vit import normalise
from mmjax.rules import leaf_paths
from tests.models import reference
from tests.models.convolutions import ACTIVATIONS, layer, normed_convolution, split

BOTTLENECK = ResNetConfig(layer="bottleneck", stem_width=6, widths=(8, 12), depths=(1, 3))
CONFIGS = {
    "bottleneck": BOTTLENECK,
    "basic": ResNetConfig(layer="basic", stem_width=4, widths=(4, 6, 8), depths=(2, 1, 2)),
    "strides": replace(BOTTLENECK, stride_in_first_stage=True, stride_in_reduction=True),
    "activation": replace(BOTTLENECK, activation="gelu", epsilon=1e-2),
}


def pictures(height=21, width=34, rows=2):
    shape = (rows, height, width, 3)
    return jnp.array(np.random.default_rng(0).normal(size=shape), jnp.float32)


@cache
def compiled(config):
    graph, params = split(lambda: ResNet(config, nnx.Rngs(0)))
    return jax.jit(lambda image: nnx.merge(graph, params)(image))


def resnet(params, image, config):
    """He et al. 2016, section 3.3 and figure 5; max-pooling by hand."""
    p, epsilon = reference.in_float64(params), config.epsilon
    x = normed_convolution(np.float64(image), p["stem"], epsilon, config.activation, stride=2)
    x = np.pad(x, ((0, 0), (1, 1), (1, 1), (0, 0)), constant_values=-np.inf)
    rows, columns = ((side - 3) // 2 + 1 for side in x.shape[1:3])
    x = np.stack(
        [
            [x[:, 2 * i : 2 * i + 3, 2 * j : 2 * j + 3].max(axis=(1, 2)) for j in range(columns)]
            for i in range(rows)
        ]
    ).transpose(2, 0, 1, 3)
    for stage, (width, depth) in enumerate(zip(config.widths, config.depths, strict=True)):
        for i in range(depth):
            layer_p = layer(p["stages"][stage], i)
            halved = i == 0 and (stage > 0 or config.stride_in_first_stage)
            strides = [1] * len(layer_p["convolutions"])
            early = config.layer == "basic" or config.stride_in_reduction
            strides[0 if early else 1] = 2 if halved else 1
            branch = x
            for j, stride in enumerate(strides):
                activation = "" if j == len(strides) - 1 else "relu"
                branch = normed_convolution(
                    branch, layer_p["convolutions"][j], epsilon, activation, stride
                )
            if halved or x.shape[-1] != width:
                x = normed_convolution(x, layer_p["shortcut"], epsilon, stride=2 if halved else 1)
            x = ACTIVATIONS[config.activation](x + branch)
    return x


@pytest.mark.parametrize("name", CONFIGS)
def test_agrees_with_the_paper(name):
    config = CONFIGS[name]
    _, params = split(lambda: ResNet(config, nnx.Rngs(0)))
    expected = resnet(params, pictures(), config)
    encoded = compiled(config)(pictures())
    tokens = expected.reshape(2, -1, config.width)
    tolerance = 1e-6 * np.abs(tokens).max()
    np.testing.assert_allclose(encoded.tokens, tokens, atol=tolerance)
    np.testing.assert_allclose(encoded.pooled, tokens.mean(axis=1), atol=tolerance)
    assert encoded.mask is None
    assert replace(config, image_size=(21, 34)).grid == expected.shape[1:3]


def test_pixels_are_normalised_on_the_way_in():
    pixels = np.random.default_rng(0).integers(0, 256, (2, 20, 24, 3)).astype(np.uint8)
    found = compiled(BOTTLENECK)(pixels)
    exact = normalise(jnp.array(pixels), BOTTLENECK.mean, BOTTLENECK.std)
    np.testing.assert_allclose(found.tokens, compiled(BOTTLENECK)(exact).tokens, atol=1e-5)
    assert BOTTLENECK.mean == (0.485, 0.456, 0.406)


def gradient_of(config):
    graph, params = split(lambda: ResNet(config, nnx.Rngs(0)))

    def loss(params):
        encoded = nnx.merge(graph, params)(pictures())
        return jnp.square(encoded.tokens).mean() + encoded.pooled.sum()

    return jax.jit(jax.grad(loss))(params)


@pytest.fixture(scope="module")
def gradient():
    return gradient_of(BOTTLENECK)


@pytest.mark.parametrize("change", [{"unroll": True}, {"remat": "full"}], ids=str)
def test_how_it_computes_changes_nothing(change, gradient):
    reference.assert_close(gradient_of(replace(BOTTLENECK, **change)), gradient)


def test_stored_statistics_have_no_gradient_and_all_else_has(gradient):
    for path, leaf in zip(leaf_paths(gradient), jax.tree.leaves(gradient), strict=True):
        assert bool(np.any(leaf)) != path.endswith(("/mean", "/var")), path
    model = ResNet(BOTTLENECK, nnx.Rngs(0))
    trained = nnx.to_pure_dict(nnx.state(model, nnx.Param))
    assert not [path for path in leaf_paths(trained) if path.endswith(("/mean", "/var"))]


def test_half_precision_stays_near():
    exact = compiled(BOTTLENECK)(pictures())
    half = compiled(replace(BOTTLENECK, dtype="bfloat16"))(pictures())
    assert half.tokens.dtype == jnp.bfloat16
    scale = np.abs(exact.tokens).max()
    assert np.abs(half.tokens.astype(np.float32) - exact.tokens).max() < 0.03 * scale


@pytest.mark.parametrize(
    ("size", "parameters"),
    # torchvision's published counts, less the classifier of 1000 classes
    [
        ("18", 11_689_512 - 513_000),
        ("34", 21_797_672 - 513_000),
        ("50", 25_557_032 - 2_049_000),
        ("101", 44_549_160 - 2_049_000),
        ("152", 60_192_808 - 2_049_000),
    ],
)
def test_named_sizes(size, parameters):
    config = ResNetConfig(size=size)
    model = nnx.eval_shape(lambda: ResNet(config, nnx.Rngs(0)))
    assert sum(x.size for x in jax.tree.leaves(nnx.state(model, nnx.Param))) == parameters
    assert config.grid == (7, 7)
    assert ResNetConfig(size=size, depths=(1, 1, 1, 1)).depths == (1, 1, 1, 1)


@pytest.mark.parametrize(
    ("fields", "words"),
    [
        ({"size": "51"}, ["'51'", "50"]),
        ({}, ["widths ()", "named size"]),
        ({"widths": (8, 16), "depths": (1,)}, ["(8, 16)", "(1,)"]),
        ({"widths": (8, 18), "depths": (1, 1)}, ["multiples of 4"]),
        ({"widths": (8, 16), "depths": (1, 0)}, ["positive"]),
        ({"size": "50", "layer": "botleneck"}, ["'botleneck'", "bottleneck"]),
        ({"size": "50", "activation": "rely"}, ["'rely'", "relu"]),
        ({"size": "50", "dtype": "float16"}, ["'float16'", "bfloat16"]),
        ({"size": "50", "remat": "ful"}, ["'ful'", "full"]),
    ],
    ids=str,
)
def test_what_cannot_be_built_is_refused(fields, words):
    with pytest.raises(InputError) as error:
        ResNetConfig(**fields)
    assert all(word in str(error.value) for word in words), str(error.value)
