"""Rows of the global batch, brought to the devices that ask for them.

Hard negatives are drawn from everywhere, and what is fused with them are token features, which are
large. Indexing would gather those of the whole batch on every device. Here each row travels only to
the devices that asked for it.
"""

from types import ModuleType
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec
from jaxtyping import Array, Int

from mmjax.chips import CHIPS
from mmjax.objectives import pairwise_exchange, ragged_exchange
from mmjax.sharding import BATCH_AXES, batch_devices

# Kinds of devices without the collective that `ragged_exchange` takes (v5e: on more than 16 chips).
WITHOUT_RAGGED = ("cpu", *CHIPS["v5e"].device_kinds)


def fetch(tree: Any, rows: Int[Array, " batch"]) -> Any:
    """`tree` with the rows of its arrays `[batch, ...]` picked anew, as by `x[rows]`.

    Where devices split the batch, each one holds besides, on the way, up to five times its share of
    the rows and 16 bytes for every row of the global batch; where rows travel pair by pair, two
    rows for every device (`docs/performance.md` has both measured).
    """
    if batch_devices() == 1:
        return jax.tree.map(lambda x: x[rows], tree)

    def bring(x):
        if jnp.issubdtype(x.dtype, jnp.inexact):
            return _fetched(x, rows)
        return _by_device(_exchange().bring, x.astype(jnp.int32), rows).astype(x.dtype)

    return jax.tree.map(bring, tree)


@jax.custom_vjp
def _fetched(x, rows):
    return _by_device(_exchange().bring, x, rows)


def _forward(x, rows):
    return _fetched(x, rows), rows


def _backward(rows, of_fetched):
    return _by_device(_exchange().give_back, of_fetched, rows), None


_fetched.defvjp(_forward, _backward)


def _exchange() -> ModuleType:
    """How rows travel between the devices of the mesh in force."""
    kind = jax.sharding.get_abstract_mesh().abstract_device.device_kind
    return pairwise_exchange if kind in WITHOUT_RAGGED else ragged_exchange


def _by_device(function, x, rows):
    split = PartitionSpec(BATCH_AXES)
    return jax.shard_map(function, in_specs=(split, split), out_specs=split, check_vma=False)(
        x, rows
    )
