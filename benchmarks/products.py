"""Time the matrix products of a training step on the CPU, in XLA and in torch.

    python benchmarks/products.py --rows=6272 --width=256

A dense layer's three products: its outputs, the gradient of its inputs and that of its kernel, for
the layers of a Transformer block. The two take turns, product by product, with as many threads as
there are cores. Medians in GFLOP/s.
"""

import argparse
import statistics
import sys
import time
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

try:
    import torch
except ImportError:
    print("error: no torch to compare with: pip install -e '.[parity]'.", file=sys.stderr)
    sys.exit(2)


def main() -> None:
    """Parse the shapes, time, print a table."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    for name, default in (("rows", 6272), ("width", 256), ("runs", 20)):
        parser.add_argument(f"--{name}", type=int, default=default)
    arguments = parser.parse_args()
    width = arguments.width
    print(f"jax {jax.__version__}, torch {torch.__version__}, {arguments.rows} rows, float32")
    print(
        "| layer | product | XLA, GFLOP/s | torch, GFLOP/s | torch / XLA |\n|---|---|---|---|---|"
    )
    for shape in ((width, width), (width, 4 * width), (4 * width, width)):
        flops = 2 * arguments.rows * shape[0] * shape[1]
        for name, ours, theirs in products(arguments.rows, *shape):
            rates = [flops / seconds / 1e9 for seconds in in_turns(ours, theirs, arguments.runs)]
            cells = f"{rates[0]:.0f} | {rates[1]:.0f} | {rates[1] / rates[0]:.2f}"
            print(f"| {shape[0]} → {shape[1]} | {name} | {cells} |", flush=True)


def products(
    rows: int, inputs: int, outputs: int
) -> list[tuple[str, Callable[[], Any], Callable[[], Any]]]:
    """The three of a layer without bias, by name: in XLA and in torch.

    Each side has the kernel as its own layers keep it, (inputs, outputs) or (outputs, inputs).
    """
    rng = np.random.default_rng(0)
    arrays = [
        rng.standard_normal(shape, np.float32)
        for shape in ((rows, inputs), (inputs, outputs), (rows, outputs))
    ]
    x, kernel, g = map(jnp.asarray, arrays)
    tx, tg = (torch.from_numpy(arrays[index]) for index in (0, 2))
    weight = torch.from_numpy(arrays[1].T.copy())
    forward, back, of_kernel = map(
        jax.jit, (lambda x, w: x @ w, lambda g, w: g @ w.T, lambda x, g: x.T @ g)
    )
    return [
        ("outputs", lambda: forward(x, kernel), lambda: tx @ weight.T),
        ("inputs' gradient", lambda: back(g, kernel), lambda: tg @ weight),
        ("kernel's gradient", lambda: of_kernel(x, g), lambda: tg.T @ tx),
    ]


def in_turns(ours: Callable[[], Any], theirs: Callable[[], Any], runs: int) -> tuple[float, float]:
    """Median seconds of each."""
    times: dict[Callable[[], Any], list[float]] = {ours: [], theirs: []}
    for run in range(runs + 2):  # the first two compile and warm up
        for product in times:
            start = time.perf_counter()
            jax.block_until_ready(product())
            if run >= 2:
                times[product].append(time.perf_counter() - start)
    return statistics.median(times[ours]), statistics.median(times[theirs])


if __name__ == "__main__":
    main()
