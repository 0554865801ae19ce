"""Time every attention implementation on this machine, forward and forward + backward.

    python benchmarks/attention.py --batch=32 --length=196 --heads=4 --head_width=64

Implementations take turns, run by run, so that a machine that slows down slows all of them alike.
Medians in milliseconds.
"""

import argparse
import statistics
import time

import jax
import jax.numpy as jnp

from mmjax.attention import IMPLEMENTATIONS, attention


def main() -> None:
    """Parse the shapes, time, print a table."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    for name, default in (("batch", 32), ("length", 196), ("heads", 4), ("head_width", 64)):
        parser.add_argument(f"--{name}", type=int, default=default)
    parser.add_argument("--dtype", default="float32")
    parser.add_argument("--runs", type=int, default=20)
    arguments = parser.parse_args()
    shape = (arguments.batch, arguments.length, arguments.heads, arguments.head_width)
    inputs = [
        jax.random.normal(key, shape, arguments.dtype)
        for key in jax.random.split(jax.random.key(0), 3)
    ]
    names = [name for name in IMPLEMENTATIONS if _runs(name, inputs)]
    functions = {}
    for name in names:
        forward = jax.jit(lambda q, k, v, name=name: attention(q, k, v, implementation=name))
        backward = jax.jit(
            jax.grad(lambda q, k, v, f=forward: jnp.square(f(q, k, v)).sum(), argnums=(0, 1, 2))
        )
        functions[name] = (forward, backward)
    times: dict[tuple[str, int], list[float]] = {}
    for run in range(arguments.runs + 2):  # the first two compile and warm up
        for name, pair in functions.items():
            for which, function in enumerate(pair):
                start = time.perf_counter()
                jax.block_until_ready(function(*inputs))
                if run >= 2:
                    times.setdefault((name, which), []).append(time.perf_counter() - start)
    print(f"{jax.devices()[0].device_kind}, jax {jax.__version__}, {shape} {arguments.dtype}")
    print("| implementation | forward, ms | forward + backward, ms |\n|---|---|---|")
    for name in names:
        forward, backward = (1e3 * statistics.median(times[name, which]) for which in (0, 1))
        print(f"| `{name}` | {forward:.1f} | {backward:.1f} |")


def _runs(name: str, inputs: list[jax.Array]) -> bool:
    try:
        attention(*inputs, implementation=name)
    except (RuntimeError, ValueError, NotImplementedError):
        return False  # cuDNN without a GPU
    return True


if __name__ == "__main__":
    main()
