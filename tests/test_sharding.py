"""The mesh, and where a tree's arrays lie on it (eight simulated devices)."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import PartitionSpec as P

from mmjax.errors import InputError
from mmjax.sharding import (
    batch_sharding,
    check_batch_size,
    constrain_batch,
    make_mesh,
    replicated,
    to_device,
    tree_shardings,
)
from mmjax.training.state import abstract_params
from tests.models.reference import tiny_model


@pytest.mark.parametrize(
    ("sizes", "shape"),
    [
        ({}, (8, 1, 1)),
        ({"fsdp": 2}, (4, 2, 1)),
        ({"data": 2, "fsdp": -1, "tensor": 2}, (2, 2, 2)),
        ({"data": 1, "fsdp": 8}, (1, 8, 1)),
    ],
    ids=str,
)
def test_one_axis_takes_what_the_others_leave(sizes, shape):
    mesh = make_mesh(**sizes)
    assert tuple(mesh.shape.items()) == tuple(zip(("data", "fsdp", "tensor"), shape, strict=True))


@pytest.mark.parametrize(
    ("sizes", "words"),
    [
        ({"data": 3}, ["data 3", "is 3 devices", "there are 8"]),
        ({"data": -1, "fsdp": 3}, ["fsdp 3", "there are 8"]),
        ({"data": 2, "fsdp": 8}, ["is 16 devices"]),
        ({"fsdp": 16}, ["fsdp 16", "there are 8"]),
        ({"data": -1, "fsdp": -1}, ["at most one"]),
        ({"data": 0}, ["positive"]),
        ({"tensor": -2}, ["positive"]),
    ],
    ids=str,
)
def test_meshes_that_do_not_fit_are_refused(sizes, words):
    with pytest.raises(InputError) as error:
        make_mesh(**sizes)
    assert all(word in str(error.value) for word in words), str(error.value)


def test_a_batch_that_does_not_split_is_refused_with_what_would():
    mesh = make_mesh(data=2, fsdp=2, tensor=2)
    check_batch_size(12, mesh)
    with pytest.raises(InputError, match=r"batch_size = 10 .* = 4 devices; take 8 or 12"):
        check_batch_size(10, mesh)
    for size in (3, 0, -4):
        with pytest.raises(InputError, match=r"eval\.batch_size = -?\d .* take 4\."):
            check_batch_size(size, mesh, key="eval.batch_size")


def test_slices_of_a_batch_must_split_as_well():
    mesh = make_mesh(data=4, fsdp=2)
    check_batch_size(32, mesh, accumulate=4)
    with pytest.raises(
        InputError, match=r"= 8 devices × optimizer\.accumulate = 3 .*take 24 or 48"
    ):
        check_batch_size(32, mesh, accumulate=3)


def spec(tree, *path):
    for key in path:
        tree = tree[key]
    return tree.spec


def test_parameters_are_laid_out_by_the_rules():
    mesh = make_mesh(data=2, fsdp=2, tensor=2)
    tree = abstract_params(tiny_model(), mesh)
    layout = jax.tree.map(lambda leaf: leaf.sharding, tree)
    for stack in (("image", "blocks", "layers"), ("text", "blocks", "layers")):
        attention = (*stack, "self_attention", "attention")
        assert spec(layout, *attention, "query", "kernel") == P(None, "fsdp", "tensor", None)
        assert spec(layout, *attention, "value", "bias") == P(None, "tensor", None)
        assert spec(layout, *attention, "out", "kernel") == P(None, "tensor", None, "fsdp")
        assert spec(layout, *stack, "mlp", "up", "kernel") == P(None, "fsdp", "tensor")
        assert spec(layout, *stack, "mlp", "up", "bias") == P(None, "tensor")
        assert spec(layout, *stack, "mlp", "down", "kernel") == P(None, "tensor", "fsdp")
        assert spec(layout, *stack, "mlp", "norm", "scale") == P(None, None)
    fusion = ("fusion", "blocks", "layers")
    assert spec(layout, *fusion, "text_mlp", "down", "kernel") == P(None, "tensor", "fsdp")
    assert spec(layout, *fusion, "image_cross", "attention", "key", "kernel") == P(
        None, "fsdp", "tensor", None
    )
    assert spec(layout, "text", "embeddings", "token_embedding", "embedding") == P("tensor", "fsdp")
    assert spec(layout, "image", "patch", "kernel") == P(None, None, None, "fsdp")
    assert spec(layout, "contrastive", "logit_scale") == P()
    # No device holds more than its part of the layers: a quarter.
    for leaf in jax.tree.leaves([tree[part]["blocks"] for part in ("image", "text", "fusion")]):
        if leaf.size >= 2 * 32 * 32:
            assert np.prod(leaf.sharding.shard_shape(leaf.shape)) * 4 == leaf.size


def test_what_does_not_divide_stays_whole():
    mesh = make_mesh(data=2, fsdp=2, tensor=2)
    tree = {"x": {"query": {"kernel": jax.ShapeDtypeStruct((30, 3, 10), jnp.float32)}}}
    assert spec(tree_shardings(tree, mesh), "x", "query", "kernel") == P("fsdp", None, None)
    tree = {"x": {"query": {"kernel": jax.ShapeDtypeStruct((7, 4, 10), jnp.float32)}}}
    assert spec(tree_shardings(tree, mesh), "x", "query", "kernel") == P(None, "tensor", None)


def test_what_is_read_once_a_step_is_split_over_data_too():
    """Along the dimension of which the rules leave most, if the axis divides it."""
    mesh = make_mesh(data=2, fsdp=2, tensor=2)
    tree = {
        "mlp": {"up": {"kernel": jax.ShapeDtypeStruct((3, 8, 32), jnp.float32)}},
        "norm": {"scale": jax.ShapeDtypeStruct((3, 8), jnp.float32)},
        "odd": jax.ShapeDtypeStruct((3, 5), jnp.float32),
        "step": jax.ShapeDtypeStruct((), jnp.int32),
        "memory": {"queues": {"image_queue": jax.ShapeDtypeStruct((3, 8, 4), jnp.float32)}},
    }
    layout = tree_shardings(tree, mesh, over_data=True)
    assert spec(layout, "mlp", "up", "kernel") == P(None, "fsdp", ("tensor", "data"))
    assert spec(layout, "norm", "scale") == P(None, "data")
    assert spec(layout, "odd") == P(None, None)
    assert spec(layout, "step") == P()
    assert spec(layout, "memory", "queues", "image_queue") == P(None, ("data", "fsdp"), None)
    assert spec(tree_shardings(tree, mesh), "norm", "scale") == P(None, None)


def test_a_batch_reaches_the_devices_row_by_row():
    mesh = make_mesh(data=4, fsdp=2)
    batch = {"text": np.arange(32).reshape(16, 2), "valid": np.ones(16, bool)}
    on_device = to_device(batch, mesh)
    for name, array in batch.items():
        assert on_device[name].sharding == batch_sharding(mesh)
        np.testing.assert_array_equal(on_device[name], array)
    shards = on_device["text"].addressable_shards
    assert {shard.data.shape for shard in shards} == {(2, 2)}
    assert replicated(mesh).is_fully_replicated


def test_activations_are_split_where_a_mesh_is_in_force():
    x = jnp.ones((16, 3))
    np.testing.assert_array_equal(constrain_batch(x), x)  # none: as it is
    mesh = make_mesh(data=4, fsdp=2)
    with jax.set_mesh(mesh):
        y = jax.jit(lambda: constrain_batch(jnp.ones((16, 3))))()
        scalar = jax.jit(lambda: constrain_batch(jnp.ones(())))()
    assert y.sharding.is_equivalent_to(batch_sharding(mesh), 2)
    assert scalar.shape == ()
