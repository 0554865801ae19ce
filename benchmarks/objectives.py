"""Memory of the objectives that compare a global batch with itself, by its size.

    python benchmarks/objectives.py                             # on 8 simulated devices
    python benchmarks/objectives.py --batches=4096,8192 --naive_up_to=8192

Compiles the loss with its gradient, and hard negatives beside it, and reads from the compiled
program what a device needs: beside the matrix of all similarities, which grows with the square of
the batch.
With --topology it compiles for TPUs, at as many pairs a chip on more and more chips (extra `plan`):

    python benchmarks/objectives.py --topology=v5p:4x4x4,v5p:4x8x8,v5p:8x8x16
"""

import json
import os
from functools import partial
from pathlib import Path

from absl import app, flags

_BATCHES = flags.DEFINE_list(
    "batches", ["4096", "8192", "16384", "32768", "65536", "131072"], "Global batches."
)
_NAIVE = flags.DEFINE_integer("naive_up_to", 16384, "The largest batch to make the matrix of.")
_WIDTH = flags.DEFINE_integer("width", 256, "Of the embeddings.")
_DEVICES = flags.DEFINE_integer("devices", 8, "Simulated devices.")
_TOPOLOGY = flags.DEFINE_list("topology", [], "TPU slices instead, as v5e:8x8 or v5p:8x16x16.")
_PAIRS = flags.DEFINE_integer("pairs_per_chip", 64, "With --topology.")
_TOKENS = flags.DEFINE_integer("tokens", 256, "With --topology: of the partners that are fetched.")
_OUTPUT = flags.DEFINE_string("output", "", "A JSON file to write as well.")


def main(_) -> None:
    """Print a table, and write it down if asked."""
    os.environ["JAX_PLATFORMS"] = "cpu"
    os.environ.setdefault("XLA_FLAGS", f"--xla_force_host_platform_device_count={_DEVICES.value}")
    found = on_chips() if _TOPOLOGY.value else on_devices()
    if _OUTPUT.value:
        Path(_OUTPUT.value).write_text(json.dumps(found, indent=1) + "\n")


def on_devices() -> list[dict]:
    """Ever larger batches on the same devices."""
    import jax

    from mmjax.sharding import make_mesh

    mesh, found = make_mesh(), []
    print(f"{jax.device_count()} CPU devices, width {_WIDTH.value}; temporary MiB a device\n")
    print("| pairs | softmax and hard negatives | sigmoid | softmax by the matrix |")
    print("|---|---|---|---|")
    for batch in map(int, _BATCHES.value):
        row: dict = {"pairs": batch, "devices": jax.device_count()}
        for name in ("softmax", "sigmoid", "matrix"):
            if name != "matrix" or batch <= _NAIVE.value:
                row[name] = temporary(mesh, batch, name) / 2**20
        found.append(row)
        cells = (f"{row[n]:.1f}" if n in row else "" for n in ("softmax", "sigmoid", "matrix"))
        print(f"| {batch:,} | {' | '.join(cells)} |", flush=True)
    return found


def on_chips() -> list[dict]:
    """As many pairs a chip on ever more chips."""
    from mmjax.plan.topology import find_topology
    from mmjax.sharding import make_mesh

    print(f"{_PAIRS.value} pairs a chip, width {_WIDTH.value}; temporary MiB a device\n")
    print("| slice | pairs | softmax and hard negatives | sigmoid | fetching the partners |")
    print("|---|---|---|---|---|")
    found = []
    for name in _TOPOLOGY.value:
        devices = find_topology(name).devices
        batch, mesh = _PAIRS.value * len(devices), make_mesh(over=devices)
        row: dict = {"topology": name, "pairs": batch}
        for kind in ("softmax", "sigmoid", "fetch"):
            row[kind] = temporary(mesh, batch, kind) / 2**20
        found.append(row)
        cells = (f"{row[kind]:.1f}" for kind in ("softmax", "sigmoid", "fetch"))
        print(f"| {name} | {batch:,} | {' | '.join(cells)} |", flush=True)
    return found


def temporary(mesh, batch: int, name: str) -> int:
    """Bytes of temporary memory a device."""
    import jax
    import jax.numpy as jnp

    from mmjax.sharding import batch_sharding, replicated

    rows, whole = batch_sharding(mesh), replicated(mesh)

    def array(*shape, dtype=jnp.float32):
        return jax.ShapeDtypeStruct(shape, dtype, sharding=rows if shape else whole)

    if name == "fetch":
        tokens = array(batch, _TOKENS.value, 768, dtype=jnp.bfloat16)
        arguments = tokens, array(batch, dtype=jnp.int32)
    else:
        vectors = array(batch, _WIDTH.value)
        arguments = array(), array(), vectors, vectors, array(batch, dtype=jnp.int32)
    learnt = range(max(len(arguments) - 1, 1))
    function = jax.value_and_grad(partial(losses, name), learnt, has_aux=True)

    def under_mesh(*arguments):
        with jax.sharding.use_abstract_mesh(mesh.abstract_mesh):
            return function(*arguments)

    compiled = jax.jit(under_mesh).lower(*arguments).compile()
    return compiled.memory_analysis().temp_size_in_bytes


def losses(name: str, *arguments):
    """The mean loss, and what else comes of the same walk: the draws of hard negatives."""
    import jax
    import jax.numpy as jnp

    from mmjax.objectives.contrastive import info_nce, same_image
    from mmjax.objectives.folds import Draw, InfoNce, Sigmoid
    from mmjax.objectives.partners import fetch
    from mmjax.objectives.walk import Scale, Side, walk

    if name == "fetch":
        tokens, rows = arguments
        return jnp.square(fetch(tokens, rows).astype(jnp.float32)).sum(), ()
    factor, offset, images, texts, image_id = arguments
    valid = jnp.ones(len(images), bool)
    if name == "matrix":
        logits = factor * jnp.matmul(images, texts.T, precision="highest") + offset
        positives = same_image(image_id)
        both = (info_nce(x, positives, valid) for x in (logits, logits.T))
        return sum(each.mean() for each in both), ()
    marks = image_id, valid, image_id, jnp.arange(len(images))
    sides = Side(images, *marks), Side(texts, *marks)
    key, scale = jax.random.key(0), Scale(factor, offset)
    if name == "sigmoid":
        return walk(scale, sides[0], (sides[1],), (Sigmoid(),))[0].mean(), ()
    folds = InfoNce(), Draw(key)
    ways = [walk(scale, a, (b,), folds) for a, b in (sides, sides[::-1])]
    return sum(loss.mean() for loss, _ in ways), [drawn for _, drawn in ways]


if __name__ == "__main__":
    app.run(main)
