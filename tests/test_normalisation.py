"""LayerNorm against its formula in float64."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from mmjax.normalisation import layer_norm

WIDTH, EPSILON = 48, 1e-6


def made(dtype="float32"):
    norm = layer_norm(WIDTH, EPSILON, dtype, nnx.Rngs(0))
    draw = np.random.default_rng(1).normal
    norm.scale[...] = jnp.array(1 + 0.3 * draw(size=WIDTH), jnp.float32)
    norm.bias[...] = jnp.array(draw(size=WIDTH), jnp.float32)
    return norm


def drawn(mean=0.0):
    return np.random.default_rng(0).normal(mean, 2.0, size=(3, 5, WIDTH)).astype(np.float32)


def formula(x, scale, bias):
    x, scale, bias = (np.asarray(value, np.float64) for value in (x, scale, bias))
    deviation = np.sqrt(x.var(axis=-1, keepdims=True) + EPSILON)
    return (x - x.mean(axis=-1, keepdims=True)) / deviation * scale + bias


@pytest.mark.parametrize("mean", [0.0, 30.0, -1000.0])
def test_values_are_exact_far_from_zero_too(mean):
    norm, x = made(), drawn(mean)
    expected = formula(x, norm.scale[...], norm.bias[...])
    np.testing.assert_allclose(norm(x), expected, atol=4e-6 + 3e-7 * abs(mean))


def test_half_precision_is_rounded_once():
    norm, x = made("bfloat16"), jnp.array(drawn(), jnp.bfloat16)
    found = norm(x)
    assert found.dtype == jnp.bfloat16
    expected = formula(x, norm.scale[...], norm.bias[...])
    np.testing.assert_allclose(np.asarray(found, np.float64), expected, rtol=2**-8, atol=1e-6)


def test_gradients_are_the_formulas():
    norm, x = made(), drawn()
    graph, params = nnx.split(norm)
    params = nnx.to_pure_dict(params)
    weights = np.random.default_rng(2).normal(size=x.shape)

    def loss(params, x):
        return (weights * nnx.merge(graph, params)(x)).sum()

    of_params, of_x = jax.grad(loss, argnums=(0, 1))(params, x)
    found = {**of_params, "x": of_x}
    inputs = {"x": x, "scale": norm.scale[...], "bias": norm.bias[...]}
    inputs = {name: np.asarray(value, np.float64) for name, value in inputs.items()}
    for name, value in inputs.items():
        direction = np.random.default_rng(3).normal(size=value.shape)
        up, down = (
            (weights * formula(**{**inputs, name: value + step * direction})).sum()
            for step in (1e-5, -1e-5)
        )
        np.testing.assert_allclose((found[name] * direction).sum(), (up - down) / 2e-5, rtol=1e-4)
