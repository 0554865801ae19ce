"""The mesh, and the rules that lay a tree of arrays over it.

Three axes: the batch is split over `data` and `fsdp`, parameters over `fsdp` and `tensor`. Models
carry no annotations: parameters get their layout from path patterns here, activations from
`constrain_batch` at every block's boundary, and XLA's partitioner derives the rest.
"""

from typing import Any

import jax
import numpy as np
from jax.sharding import AbstractMesh, AxisType, Mesh, NamedSharding, PartitionSpec

from mmjax.errors import InputError
from mmjax.rules import apply_rules

BATCH_AXES = ("data", "fsdp")

# Where the axes of a parameter go, counted from its last: stacked layers have one axis more in
# front. Attention and the MLP split by heads and hidden units over `tensor` (Megatron-LM, Shoeybi
# et al. 2019, section 3), and what is left over `fsdp`. The optimizer's moments and the EMA lie
# under paths that end alike, so the same patterns place them.
PARAMETER_RULES = (
    (r".*/(query|key|value)/kernel", ("fsdp", "tensor", None)),
    (r".*/(query|key|value)/bias", ("tensor", None)),
    (r".*/attention/out/kernel", ("tensor", None, "fsdp")),
    (r".*mlp/up/kernel", ("fsdp", "tensor")),
    (r".*mlp/up/bias", ("tensor",)),
    (r".*mlp/down/kernel", ("tensor", "fsdp")),
    (r".*/token_embedding/embedding", ("tensor", "fsdp")),
    (r".*/kernel", (None, "fsdp")),
    (r".*", ()),
)


def make_mesh(data: int = -1, fsdp: int = 1, tensor: int = 1) -> Mesh:
    """A mesh over all devices of all processes; -1 for one axis takes what the others leave."""
    sizes = {"data": data, "fsdp": fsdp, "tensor": tensor}
    devices = jax.device_count()
    free = [name for name, size in sizes.items() if size == -1]
    if len(free) > 1 or any(size < 1 and size != -1 for size in sizes.values()):
        raise InputError(f"mesh: sizes are positive, at most one of them -1; found {sizes}.")
    taken = int(np.prod([size for size in sizes.values() if size != -1]))
    if free:
        sizes[free[0]] = max(devices // taken, 1)
    if (product := int(np.prod(list(sizes.values())))) != devices:
        raise InputError(
            f"mesh: {' × '.join(f'{name} {size}' for name, size in sizes.items())} is {product} "
            f"devices, but there are {devices}. Make the product equal, or leave mesh.data at -1."
        )
    if sizes["data"] * sizes["fsdp"] % jax.process_count():
        raise InputError(
            f"mesh: data × fsdp = {sizes['data'] * sizes['fsdp']} is no multiple of the "
            f"{jax.process_count()} processes, so they could not share out the batch; lower "
            "mesh.tensor."
        )
    return jax.make_mesh(
        tuple(sizes.values()), tuple(sizes), axis_types=(AxisType.Auto,) * len(sizes)
    )


def check_batch_size(
    batch_size: int, mesh: Mesh, *, accumulate: int = 1, key: str = "batch_size"
) -> None:
    """Refuse a global batch that the batch axes (and slices of accumulation) do not divide."""
    ways = int(np.prod([mesh.shape[axis] for axis in BATCH_AXES])) * accumulate
    if batch_size < 1 or batch_size % ways:
        lower = max(batch_size // ways, 0) * ways
        upper = max(-(-batch_size // ways), 1) * ways
        slices = f" × optimizer.accumulate = {accumulate} slices" if accumulate > 1 else ""
        raise InputError(
            f"{key} = {batch_size} does not split over mesh.data × mesh.fsdp = "
            f"{ways // accumulate} devices{slices}; "
            f"take {f'{lower} or {upper}' if lower else upper}."
        )


def batch_sharding(mesh: Mesh) -> NamedSharding:
    """Rows over both batch axes, everything else whole."""
    return NamedSharding(mesh, PartitionSpec(BATCH_AXES))


def replicated(mesh: Mesh) -> NamedSharding:
    """A whole copy on every device."""
    return NamedSharding(mesh, PartitionSpec())


def tree_shardings(tree: Any, mesh: Mesh, rules=PARAMETER_RULES) -> Any:
    """The sharding of every leaf of an abstract tree.

    A dimension that its mesh axis does not divide stays whole: 3 heads do not split in two.
    """
    specs = apply_rules(rules, tree, key="sharding rules")
    return jax.tree.map(
        lambda leaf, spec: NamedSharding(mesh, _fitting(spec, leaf.shape, mesh)), tree, specs
    )


def _fitting(
    axes: tuple[str | None, ...], shape: tuple[int, ...], mesh: Mesh | AbstractMesh
) -> PartitionSpec:
    axes = axes[len(axes) - min(len(axes), len(shape)) :]
    axes = (None,) * (len(shape) - len(axes)) + axes
    return PartitionSpec(
        *(
            axis if axis is not None and size % mesh.shape[axis] == 0 else None
            for axis, size in zip(axes, shape, strict=True)
        )
    )


def constrain_batch(x: jax.Array) -> jax.Array:
    """Split the leading axis of an activation over the batch axes of the mesh in force, if any."""
    mesh = jax.sharding.get_abstract_mesh()
    if mesh.empty or x.ndim == 0:
        return x
    return jax.lax.with_sharding_constraint(x, PartitionSpec(BATCH_AXES))


def gather_table(table: jax.Array) -> jax.Array:
    """An embedding table at the moment of its use: whole but for its rows over `tensor`.

    Split by width over `fsdp`, as it is stored, it would meet a batch that is split over the same
    devices, and the partitioner would replicate the activations to bring the two together.
    """
    mesh = jax.sharding.get_abstract_mesh()
    if mesh.empty:
        return table
    return jax.lax.with_sharding_constraint(table, _fitting(("tensor", None), table.shape, mesh))


def to_device(batch: Any, mesh: Mesh) -> Any:
    """This process's rows of a batch, as its part of global arrays split over the batch axes."""
    sharding = batch_sharding(mesh)
    return jax.tree.map(
        lambda array: jax.make_array_from_process_local_data(sharding, array), batch
    )
