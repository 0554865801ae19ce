"""Layouts change no numbers, and leave every device its own rows."""

import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from mmjax import layouts, platform
from mmjax.layers import linear
from mmjax.sharding import HEADS_SPLIT, MASK_SPLIT, make_mesh, per_device


@pytest.mark.parametrize("kept", [False, True])
@pytest.mark.parametrize("backend", ["cpu", "tpu"])
@pytest.mark.parametrize(
    ("shape", "inputs", "expected"),
    [
        ((3, 4, 5), 1, (3, 20)),  # of heads
        ((4, 5, 3), 2, (20, 3)),
        ((2, 2, 3, 6), 3, (12, 6)),  # of patches
        ((4, 5), 0, (20,)),  # a bias
        ((3, 4), 1, (3, 4)),
    ],
)
def test_a_kernel_as_a_matrix(shape, inputs, expected, backend, kept):
    kernel = jnp.arange(np.prod(shape), dtype=jnp.float32).reshape(shape)
    with platform.assume(backend):
        found = layouts.matrix(kernel, inputs, kept)
        gradient = jax.grad(lambda x: (layouts.matrix(x, inputs, kept) ** 2).sum())(kernel)
        program = str(jax.make_jaxpr(lambda x: layouts.matrix(x, inputs, kept))(kernel))
    np.testing.assert_array_equal(found, np.reshape(kernel, expected))
    np.testing.assert_array_equal(gradient, 2 * kernel)
    barrier = kept and backend == "tpu" and shape != expected
    assert ("optimization_barrier" in program) == barrier


def test_on_a_cpu_a_kernels_gradient_copies_no_activation():
    layer = linear(16, 64, "float32", nnx.Rngs(0))
    x = jnp.ones((8, 12, 16))

    def gradient(layer, gradient):
        return jax.vjp(lambda layer: layer(x), layer)[1](gradient)

    program = jax.jit(gradient).lower(layer, jnp.ones((8, 12, 64))).compile().as_text()
    copied = re.findall(r"f32\[([\d,]+)\]\S* (?:copy|transpose)\(", program)
    sizes = [np.prod([int(size) for size in shape.split(",")]) for shape in copied]
    assert 8 * 12 * 64 not in sizes


def test_on_a_tpu_each_device_lays_out_its_own_rows():
    """(A constraint on the whole array would gather the rows of all devices.)"""
    mesh = make_mesh(data=4, fsdp=2)
    x = jax.ShapeDtypeStruct((16, 6, 4), jnp.float32)
    with platform.assume("tpu"), jax.sharding.use_abstract_mesh(mesh.abstract_mesh):
        program = str(jax.make_jaxpr(layouts.rows_first)(x))
    inside = program[program.index("shard_map") :]
    assert "layout_constraint" in inside
    assert "f32[2,6,4]" in inside


def seen(function, arrays, axes, **mesh):
    """The shapes that the function is given on a device, and its result."""
    shapes = []

    def noting(*parts):
        shapes.extend(None if part is None else part.shape for part in parts)
        return function(*parts)

    with jax.set_mesh(make_mesh(**mesh)):
        result = jax.jit(lambda *arrays: per_device(noting, arrays, axes))(*arrays)
    return shapes, result


def test_every_device_has_its_rows_and_its_heads():
    query, mask = np.random.default_rng(0).normal(size=(8, 5, 4, 3)), np.ones((1, 1, 5), bool)
    shapes, result = seen(
        lambda query, mask, none: query * 2,
        (query, mask, None),
        (HEADS_SPLIT, MASK_SPLIT, MASK_SPLIT),
        **{"data": 2, "fsdp": 2, "tensor": 2},
    )
    assert shapes == [(2, 5, 2, 3), (1, 1, 5), None]
    np.testing.assert_allclose(result, query * 2, rtol=1e-6)


def test_what_the_mesh_does_not_divide_stays_whole():
    query = np.ones((6, 5, 3, 2), np.float32)
    shapes, _ = seen(lambda x: x, (query,), (HEADS_SPLIT,), data=4, tensor=2)
    assert shapes == [(6, 5, 3, 2)]
