"""The mesh, and the rules that lay a tree of arrays over it.

Three axes: the batch is split over `data` and `fsdp`, parameters over `fsdp` and `tensor`. Models
carry no annotations: parameters get their layout from path patterns here, activations from
`constrain_batch` at every block's boundary, and XLA's partitioner derives the rest.
"""

from collections.abc import Callable, Sequence
from typing import Any

import jax
import numpy as np
from jax.experimental import mesh_utils
from jax.sharding import AbstractMesh, AxisType, Mesh, NamedSharding, PartitionSpec

from mmjax.errors import InputError
from mmjax.rules import Rules, apply_rules

BATCH_AXES = ("data", "fsdp")

# Of each dimension of an array the axis of the mesh that splits it, or several, or none.
Axes = tuple[str | tuple[str, ...] | None, ...]

# Queries, keys and values [batch, tokens, heads, head_width], and masks [batch, queries, keys].
HEADS_SPLIT: Axes = (BATCH_AXES, None, "tensor", None)
MASK_SPLIT: Axes = (BATCH_AXES, None, None)

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
    (r"memory/.*/image_id_queue", (BATCH_AXES,)),
    (r"memory/.*_queue", (BATCH_AXES, None)),
    (r".*", ()),
)


def make_mesh(
    data: int = -1, fsdp: int = 1, tensor: int = 1, *, over: Sequence[jax.Device] | None = None
) -> Mesh:
    """A mesh over all devices of all processes, or over those given.

    -1 for one axis takes what the others leave.
    """
    sizes = {"data": data, "fsdp": fsdp, "tensor": tensor}
    devices = jax.device_count() if over is None else len(over)
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
    # (`jax.make_mesh` refuses sizes that are no product of a TPU slice's own axes)
    laid_out = mesh_utils.create_device_mesh(
        tuple(sizes.values()),
        devices=jax.devices() if over is None else over,
        allow_split_physical_axes=True,
    )
    mesh = Mesh(laid_out, tuple(sizes), axis_types=(AxisType.Auto,) * len(sizes))
    for group in laid_out.reshape(-1, sizes["tensor"]):
        if len(hosts := {device.process_index for device in group}) > 1:
            raise InputError(
                f"mesh.tensor = {sizes['tensor']}: the devices that share rows of the batch belong "
                f"to {len(hosts)} processes, each of which would read its own; lower mesh.tensor, "
                "and take mesh.fsdp for what does not fit."
            )
    return mesh


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


def tree_shardings(
    tree: Any, mesh: Mesh | AbstractMesh, *, over_data: bool = False, rules: Rules = PARAMETER_RULES
) -> Any:
    """The sharding of every leaf of an abstract tree.

    A dimension that its mesh axis does not divide stays whole: 3 heads do not split in two. With
    `over_data` each leaf is split over the data axis as well, along the dimension of which most is
    left: what is read once a step need not lie on every device (ZeRO, Rajbhandari et al. 2020,
    section 5.1).
    """
    specs = apply_rules(rules, tree, key="sharding rules")

    def sharding(leaf: Any, axes: Axes) -> NamedSharding:
        spec = _fitting(axes, leaf.shape, mesh)
        return NamedSharding(mesh, _over_data(spec, leaf.shape, mesh) if over_data else spec)

    return jax.tree.map(sharding, tree, specs)


def _fitting(axes: Axes, shape: tuple[int, ...], mesh: Mesh | AbstractMesh) -> PartitionSpec:
    axes = axes[len(axes) - min(len(axes), len(shape)) :]
    axes = (None,) * (len(shape) - len(axes)) + axes
    return PartitionSpec(
        *(
            axis if axis is not None and size % _ways(axis, mesh) == 0 else None
            for axis, size in zip(axes, shape, strict=True)
        )
    )


def _ways(axis: str | tuple[str, ...], mesh: Mesh | AbstractMesh) -> int:
    """How many parts an axis of the mesh, or several together, split a dimension in."""
    return int(np.prod([mesh.shape[name] for name in _names(axis)]))


def _names(axis: str | tuple[str, ...] | None) -> set[str]:
    return set() if axis is None else {axis} if isinstance(axis, str) else set(axis)


def _over_data(
    spec: PartitionSpec, shape: tuple[int, ...], mesh: Mesh | AbstractMesh
) -> PartitionSpec:
    """`spec` with the data axis too, where it can split what the others leave of a dimension."""
    axes: list[tuple[str, ...]] = [
        () if axis is None else (axis,) if isinstance(axis, str) else axis for axis in spec
    ]
    left = [size // _ways(names, mesh) for size, names in zip(shape, axes, strict=True)]
    places = [place for place, size in enumerate(left) if size % mesh.shape["data"] == 0]
    if places and not any("data" in names for names in axes):
        axes[max(places, key=left.__getitem__)] += ("data",)
    return PartitionSpec(*(names or None for names in axes))


def constrain_over_data(tree: Any) -> Any:
    """Gradients laid out as the optimizer's state is, on the mesh in force, if any.

    First as parameters are, and then split: otherwise the split would reach back into the layers
    that they are summed over, and break up the products there.
    """
    mesh = jax.sharding.get_abstract_mesh()
    if mesh.empty:
        return tree
    for over_data in (False, True):
        layout = tree_shardings(tree, mesh, over_data=over_data)
        tree = jax.tree.map(
            lambda x, sharding: jax.lax.with_sharding_constraint(x, sharding.spec), tree, layout
        )
    return tree


def batch_devices() -> int:
    """How many devices the mesh in force, if any, splits the batch over."""
    mesh = jax.sharding.get_abstract_mesh()
    return 1 if mesh.empty else int(np.prod([mesh.shape[axis] for axis in BATCH_AXES]))


def constrain_batch(x: jax.Array) -> jax.Array:
    """Split the leading axis of an activation over the batch axes of the mesh in force, if any."""
    mesh = jax.sharding.get_abstract_mesh()
    if mesh.empty or x.ndim == 0:
        return x
    return jax.lax.with_sharding_constraint(x, PartitionSpec(BATCH_AXES))


def per_device(
    function: Callable[..., jax.Array], arrays: Sequence[jax.Array | None], axes: Sequence[Axes]
) -> jax.Array:
    """`function(*arrays)`, run by every device of the mesh in force, if any, on its part of them.

    For what XLA's partitioner cannot look into, kernels and layouts: it would gather the arrays of
    all devices. `axes` say how each array is split, as in `PARAMETER_RULES`; the result is split as
    the first one is. Where a function runs by device already, these axes are left as they are.
    """
    mesh = jax.sharding.get_abstract_mesh()
    if not mesh.auto_axes:
        return function(*arrays)
    split = set(mesh.auto_axes)
    free = [tuple(axis if _names(axis) <= split else None for axis in each) for each in axes]
    specs = tuple(
        PartitionSpec() if array is None else _fitting(each, array.shape, mesh)
        for array, each in zip(arrays, free, strict=True)
    )
    run = jax.shard_map(
        function, in_specs=specs, out_specs=specs[0], axis_names=split, check_vma=False
    )
    return run(*arrays)


def gather_table(table: jax.Array) -> jax.Array:
    """An embedding table at the moment of its use: whole but for its rows over `tensor`.

    Split by width over `fsdp`, as it is stored, it would meet a batch that is split over the same
    devices, and the partitioner would replicate the activations to bring the two together.
    """
    mesh = jax.sharding.get_abstract_mesh()
    if mesh.empty:
        return table
    return jax.lax.with_sharding_constraint(table, _fitting(("tensor", None), table.shape, mesh))


def gather_tables(params: Any) -> Any:
    """Parameters that lie over the data axis (`over_data`), ready to be used: all but the kernels.

    Kernels are gathered at their products, layer by layer. Looked up as they lie, tables would do
    to activations what `gather_table` says.
    """
    mesh = jax.sharding.get_abstract_mesh()
    if mesh.empty:
        return params

    def gather(path, x, sharding):
        is_kernel = path[-1].key == "kernel"
        return x if is_kernel else jax.lax.with_sharding_constraint(x, sharding.spec)

    return jax.tree_util.tree_map_with_path(gather, params, tree_shardings(params, mesh))


def to_device(batch: Any, mesh: Mesh) -> Any:
    """This process's rows of a batch, as its part of global arrays split over the batch axes."""
    sharding = batch_sharding(mesh)
    return jax.tree.map(
        lambda array: jax.make_array_from_process_local_data(sharding, array), batch
    )
