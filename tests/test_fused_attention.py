"""The kernels against the einsum, interpreted on the CPU; and compiled for TPUs without one."""

import importlib.util
import os
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from mmjax import fused_attention_kernels as kernels
from mmjax import platform
from mmjax.attention import attention
from mmjax.errors import InputError
from mmjax.fused_attention import fused_attention
from mmjax.sharding import make_mesh

# (batch, queries, keys, heads, head width, mask rows; 0: no mask)
SHAPES = [
    (2, 16, 16, 2, 64, 0),
    (1, 196, 196, 2, 64, 0),  # a picture's patches: no multiple of any tile
    (2, 20, 49, 3, 64, 2),  # a tile of two heads and half a tile
    (2, 300, 24, 4, 32, 2),  # two blocks of queries
    (3, 24, 300, 1, 128, 1),  # one mask for all rows
    (2, 9, 10, 1, 256, 2),
    (4, 1, 17, 4, 16, 4),  # as an attention pool asks
]


def draw(batch, queries, keys, heads, width, mask_rows, dtype=jnp.float32, seed=0):
    """Query, key, value, the output's gradient, and a mask whose first row is empty."""
    draws = jax.random.split(jax.random.key(seed), 5)
    arrays = [
        jax.random.normal(draw, (batch, length, heads, width)).astype(dtype)
        for draw, length in zip(draws, (queries, keys, keys, queries), strict=False)
    ]
    if not mask_rows:
        return *arrays, None
    mask = jax.random.bernoulli(draws[4], 0.6, (mask_rows, 1, keys)).at[:, :, 0].set(True)
    return *arrays, mask.at[0].set(False) if mask_rows > 1 else mask


def fused(query, key, value, mask=None):
    return fused_attention(query, key, value, mask, interpret=True)


def einsum(query, key, value, mask=None):
    return attention(query, key, value, mask, "einsum")


def with_gradients(function):
    def outputs(query, key, value, gradient, mask):
        output, back = jax.vjp(lambda *inputs: function(*inputs, mask), query, key, value)
        return output, back(gradient)

    return jax.jit(outputs)


def assert_equal(found, expected, tolerance=1e-5):
    for a, b in zip(jax.tree.leaves(found), jax.tree.leaves(expected), strict=True):
        np.testing.assert_allclose(a, b, rtol=0, atol=tolerance * max(float(np.abs(b).max()), 1))


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_values_and_gradients_are_the_einsums(shape):
    arrays = draw(*shape)
    assert_equal(with_gradients(fused)(*arrays), with_gradients(einsum)(*arrays))


@pytest.mark.parametrize(
    ("limit", "grid"),
    [("_UNROLLED_SCORES", (1, 3)), ("_BLOCK_SIZE", (4, 1)), ("_QUERIES", (1, 1))],
)
def test_how_the_work_is_cut_changes_nothing(limit, grid, monkeypatch):
    shape = (4, 24, 20, 6, 64)
    arrays = draw(*shape, 4)
    monkeypatch.setattr(kernels, limit, 8)
    sequences = (jax.ShapeDtypeStruct((4, length, 6 * 64), jnp.float32) for length in (24, 20))
    assert kernels._Steps.over(*sequences, heads=6).grid == grid
    assert_equal(with_gradients(fused)(*arrays), with_gradients(einsum)(*arrays))


def test_half_precision_is_as_near_as_the_einsums():
    """To the exact result for the same rounded inputs."""
    arrays = draw(2, 49, 49, 2, 64, 0, dtype=jnp.bfloat16)
    exact = with_gradients(einsum)(*(x.astype(jnp.float32) for x in arrays[:4]), None)
    errors = []
    for function in (fused, einsum):
        found = with_gradients(function)(*arrays)
        assert all(leaf.dtype == jnp.bfloat16 for leaf in jax.tree.leaves(found))
        errors.append(jax.tree.map(lambda a, b: float(jnp.abs(a - b).max()), found, exact))
    for of_fused, of_einsum in zip(*map(jax.tree.leaves, errors), strict=True):
        assert of_fused < 1.5 * of_einsum


def test_a_row_that_may_look_nowhere_attends_uniformly():
    query, key, value, gradient, mask = draw(2, 5, 7, 2, 64, 2)
    output, (to_query, to_key, to_value) = with_gradients(fused)(query, key, value, gradient, mask)
    mean = value[0].mean(axis=0)
    np.testing.assert_allclose(output[0], np.broadcast_to(mean, output[0].shape), atol=1e-6)
    assert not np.any(to_query[0])
    assert not np.any(to_key[0])
    expected = np.broadcast_to(gradient[0].sum(axis=0) / 7, value[0].shape)
    np.testing.assert_allclose(to_value[0], expected, atol=1e-6)


def test_scores_in_the_thousands_do_not_overflow():
    query, *rest = draw(1, 8, 8, 2, 64, 0)
    query = 1000 * query
    arrays = (query, *rest)
    found, expected = (with_gradients(function)(*arrays) for function in (fused, einsum))
    assert_equal(found[0], expected[0])
    # (probabilities are found again to the last digit of such a log-sum-exp, about 3e-4)
    for of_fused, of_einsum in zip(found[1], expected[1], strict=True):
        np.testing.assert_allclose(of_fused, of_einsum, rtol=0, atol=1e-3 * jnp.abs(query).max())


@pytest.mark.parametrize("axes", [{"data": 8}, {"data": 2, "fsdp": 2, "tensor": 2}], ids=str)
@pytest.mark.parametrize("shape", [(8, 10, 12, 4, 64, 8), (8, 10, 12, 3, 64, 1)], ids=str)
def test_every_device_of_a_mesh_takes_its_rows_and_heads(axes, shape):
    """In a loop of rematerialised layers, as a stack runs it; three heads stay whole."""

    def stacked(function):
        def layers(query, key, value, mask):
            def layer(carry, _):
                return carry + function(carry, key, value, mask), None

            body = jax.checkpoint(layer, policy=jax.checkpoint_policies.nothing_saveable)
            return jax.lax.scan(body, query, length=2)[0]

        return with_gradients(layers)

    arrays = draw(*shape)
    expected = stacked(einsum)(*arrays)
    mesh = make_mesh(**axes)
    rows = jax.NamedSharding(mesh, jax.P(("data", "fsdp")))
    whole = jax.NamedSharding(mesh, jax.P())
    placed = [jax.device_put(x, rows if len(x) == 8 else whole) for x in arrays]
    with jax.set_mesh(mesh):
        compiled = stacked(fused).lower(*placed).compile()
        found = compiled(*placed)
    assert_equal(found, expected)
    batch = shape[0] // (8 // axes.get("tensor", 1))
    heads = shape[3] // (axes.get("tensor", 1) if shape[3] % 2 == 0 else 1)
    # (the interpreter's loop over the grid holds what one device works on)
    assert f"f32[{batch},10,{heads * 64}]" in compiled.as_text()
    assert "all-gather" not in compiled.as_text()


def test_a_batch_that_the_mesh_does_not_divide_is_computed_whole():
    arrays = draw(3, 10, 12, 2, 64, 3)
    with jax.set_mesh(make_mesh(data=8)):
        found = with_gradients(fused)(*arrays)
    assert_equal(found, with_gradients(einsum)(*arrays))


def test_what_the_kernel_cannot_do_is_refused_by_name():
    query, key, value, *_ = draw(2, 8, 8, 2, 64, 0)
    with pytest.raises(InputError, match=r"made for a cpu.*model\.\*\.attention"):
        fused_attention(query, key, value)
    with pytest.raises(InputError, match=r"found 8 rows.*causal"):
        fused(query, key, value, jnp.tril(jnp.ones((1, 8, 8), bool)))
    with pytest.raises(InputError, match=r"found 48.*model\.\*\.heads"):
        fused(*(x[..., :48] for x in (query, key, value)))
    with platform.assume("tpu"), pytest.raises(ValueError, match="interpret"):
        jax.jit(fused_attention).lower(query, key, value)


AHEAD_OF_TIME = """
import jax, jax.numpy as jnp, numpy as np
from jax.experimental.topologies import get_topology_desc
from mmjax import platform
from mmjax.fused_attention import fused_attention
from mmjax.remat import REMAT_POLICIES, named

def outputs(query, key, value, mask):
    output, back = jax.vjp(lambda *x: fused_attention(*x, mask), query, key, value)
    return back(output)

for name in ("v5e:2x2", "v5p:2x2x1", "v6e:2x2"):
    devices = get_topology_desc(platform="tpu", topology_name=name).devices
    mesh = jax.sharding.Mesh(np.array(devices).reshape(2, 1, 2), ("data", "fsdp", "tensor"))
    sharding = jax.NamedSharding(mesh, jax.P(("data", "fsdp")))
    def abstract(*shape, dtype=jnp.bfloat16):
        return jax.ShapeDtypeStruct(shape, dtype, sharding=sharding)
    for queries, keys, dtype in ((196, 196, "bfloat16"), (1, 49, "bfloat16"), (32, 64, "float32")):
        arguments = [abstract(4, n, 6, 64, dtype=dtype) for n in (queries, keys, keys)]
        arguments.append(abstract(4, 1, keys, dtype=bool))
        with jax.set_mesh(mesh), platform.assume("tpu"):
            text = jax.jit(outputs).lower(*arguments).compile().as_text()
        assert text.count('custom_call_target="tpu_custom_call"') == 2, text
        assert "all-gather" not in text, text
    print("compiled for", name)

# Where what attention takes and gives is stored, so are the log sums: it is not computed again.
def layer(query, key, value):
    query, key, value = (named("projected", jnp.sin(x)) for x in (query, key, value))
    return jnp.sin(named("heads", fused_attention(query, key, value)))

def gradients(policy, *x):
    output, back = jax.vjp(jax.checkpoint(layer, policy=REMAT_POLICIES[policy]), *x)
    return back(output)

for policy, runs in (("products", 2), ("full", 3)):
    x = jax.ShapeDtypeStruct((8, 64, 2, 64), jnp.bfloat16, sharding=sharding)
    with jax.set_mesh(mesh), platform.assume("tpu"):
        text = jax.jit(gradients, static_argnums=0).lower(policy, x, x, x).compile().as_text()
    assert text.count('custom_call_target="tpu_custom_call"') == runs, (policy, text)
"""


@pytest.mark.slow
@pytest.mark.skipif(importlib.util.find_spec("libtpu") is None, reason="the libtpu wheel is absent")
def test_the_kernels_compile_for_tpus():
    # The variables keep the compiler from looking for a TPU, and another process from its lock.
    environment = os.environ | {
        "JAX_PLATFORMS": "cpu", "TPU_SKIP_MDS_QUERY": "1", "ALLOW_MULTIPLE_LIBTPU_LOAD": "1",
        "TPU_ACCELERATOR_TYPE": "v5litepod-256", "TPU_WORKER_HOSTNAMES": "localhost",
    }  # fmt: skip
    command = [sys.executable, "-c", AHEAD_OF_TIME]
    run = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert run.returncode == 0, run.stderr[-3000:]
    assert run.stdout.count("compiled for") == 3
