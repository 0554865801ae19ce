"""Programs of known cost, compiled for TPUs: a process of its own, which prints JSON.

`python -m tests.plan.tpu_programs` asks about every chip; with a FOLDER, where the schedules are
dumped, about a program.
"""

import functools
import json
import re
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
from jax.sharding import NamedSharding, PartitionSpec, SingleDeviceSharding

from mmjax.chips import CHIPS
from mmjax.plan.hlo import Module
from mmjax.plan.schedules import floor_of, read_schedules, record_schedules
from mmjax.plan.topology import find_topology
from mmjax.plan.totals import add_up
from mmjax.sharding import make_mesh

LAYERS, ROWS, WIDTH = 6, 4096, 1024
SIDE = 4096
SMALLEST = {"v4": "2x2x1", "v5e": "2x2", "v5p": "2x2x1", "v6e": "2x2", "tpu7x": "2x2x1"}


def matrix_product(generation: str) -> int:
    """The compiler's estimate of one large product on a device, in cycles."""
    device = find_topology(f"{generation}:{SMALLEST[generation]}").devices[0]
    matrix = jax.ShapeDtypeStruct((SIDE, SIDE), jnp.bfloat16, sharding=SingleDeviceSharding(device))
    compiled = jax.jit(jnp.matmul).lower(matrix, matrix).compile()
    return add_up(Module.parse(compiled.as_text())).cycles.total()


def available_hbm(generation: str) -> float:
    """GiB of a device that libtpu names when a program asks for more."""
    device = find_topology(f"{generation}:{SMALLEST[generation]}").devices[0]
    vast = jax.ShapeDtypeStruct((2**38,), jnp.float32, sharding=SingleDeviceSharding(device))
    product = jax.jit(lambda x: x.reshape(2**19, -1) @ jnp.ones((2**19, 2**10)))
    try:
        product.lower(vast).compile()
    except jax.errors.JaxRuntimeError as error:
        return float(re.findall(r"([\d.]+)G\b", str(error))[-1])
    raise AssertionError("a terabyte fits")


def scanned_product(folder: Path) -> dict[str, object]:
    """A product with layer after layer of weights, each gathered from four chips for it."""
    topology = find_topology("v5e:2x2")
    mesh = make_mesh(over=topology.devices)

    @functools.partial(
        jax.shard_map,
        mesh=mesh,
        in_specs=(PartitionSpec("data"), PartitionSpec(None, "data")),
        out_specs=PartitionSpec("data"),
    )
    def products(x, weights):
        def layer(x, weight):
            whole = jax.lax.all_gather(weight, "data", axis=0, tiled=True)
            with jax.named_scope("product"):
                return x @ whole, None

        return jax.lax.scan(layer, x, weights)[0]

    def abstract(shape, spec):
        return jax.ShapeDtypeStruct(shape, jnp.bfloat16, sharding=NamedSharding(mesh, spec))

    x = abstract((4 * ROWS, WIDTH), PartitionSpec("data"))
    weights = abstract((LAYERS, WIDTH, WIDTH), PartitionSpec(None, "data"))
    module = Module.parse(jax.jit(products).lower(x, weights).compile().as_text())
    estimate = add_up(module)
    floor = add_up(module, floor_of(module, read_schedules(folder), topology.chip))
    return {
        "all_gather": estimate.collective_bytes["all-gather"],
        "collectives": dict(estimate.collective_runs),
        "estimate": estimate.cycles[("product",)],
        "floor": floor.cycles[("product",)],
        "unread_loops": sorted(estimate.unread_loops),
    }


if __name__ == "__main__":
    jax.config.update("jax_enable_compilation_cache", False)
    if len(sys.argv) > 1:
        record_schedules(Path(sys.argv[1]))
        found = scanned_product(Path(sys.argv[1]))
    else:
        found = {
            "matrix_product": {name: matrix_product(name) for name in CHIPS},
            "available_hbm": {name: available_hbm(name) for name in CHIPS},
        }
    print(json.dumps(found))
