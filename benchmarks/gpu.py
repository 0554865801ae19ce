"""Whole training steps on one GPU: pairs a second, MFU and memory, batch by batch.

    python benchmarks/gpu.py --output=gpu.json
    python benchmarks/gpu.py --models B/16 L/14 --attentions cudnn --remats none dots
    python benchmarks/gpu.py --tiny        # any device, toy sizes: does it run?

Two towers are configs/pretrain/clip_b16.py (224 px, 77 tokens) with a B/32, B/16 or L/14 in it,
the flagship is configs/pretrain/coattention_b16.py as it stands; both in bfloat16, on pictures and
texts of noise that lie on the device. For each model, attention and remat policy the batch is
doubled until the device's memory is out. Attention is XLA's (the einsum) or cuDNN's fused kernel.

MFU = model FLOPs of a step / (median seconds a step × the device's dense bf16 peak). Model FLOPs
are 3 × those of the forward pass's matrix products, counted in the traced program: nothing for what
rematerialisation computes again, nothing elementwise (mmjax/training/flops.py, where the peaks
stand too: 989 TFLOP/s for an H200). Memory is the compiler's account of the step (arguments,
temporary and output less what is donated) and the allocator's peak.
"""

import argparse
import json
import multiprocessing
import os
import statistics
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from mmjax.errors import InputError

FLAGSHIP = "flagship"
# Model: the recipe, and what changes in its model. Of L/14 the text tower is wider, as in CLIP.
MODELS: dict[str, tuple[str, dict[str, dict[str, Any]]]] = {
    "B/32": ("pretrain/clip_b16", {"image": {"size": "B/32"}}),
    "B/16": ("pretrain/clip_b16", {"image": {"size": "B/16"}}),
    "L/14": (
        "pretrain/clip_b16",
        {
            "image": {"size": "L/14"},
            "text": {"width": 768, "heads": 12},
            "contrastive": {"width": 768},
        },
    ),
    FLAGSHIP: ("pretrain/coattention_b16", {}),
}
ATTENTIONS = {"xla": "einsum", "cudnn": "cudnn"}
REMATS = ("none", "dots", "full")
GIB = 2**30
# The start of its error, where XLA finds no memory for a program or for what it computes.
OUT_OF_MEMORY = "RESOURCE_EXHAUSTED"


def main() -> None:
    """Run what the flags ask for, print the table, write the JSON."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--models", nargs="+", choices=MODELS, default=list(MODELS))
    parser.add_argument("--attentions", nargs="+", choices=ATTENTIONS, default=list(ATTENTIONS))
    parser.add_argument("--remats", nargs="+", choices=REMATS, default=list(REMATS))
    parser.add_argument("--first_batch", type=int, default=64, help="doubled from there (64)")
    parser.add_argument("--last_batch", type=int, default=2**20, help="if memory lasts (2²⁰)")
    parser.add_argument("--runs", type=int, default=10, help="steps timed a batch (10)")
    parser.add_argument("--tiny", action="store_true", help="toy models, on any device")
    parser.add_argument("--output", type=Path, help="a JSON file of all that was measured")
    options = parser.parse_args()
    rows: list[dict[str, Any]] = []
    try:
        for model in options.models:
            for attention in options.attentions:
                for remat in options.remats:
                    for row in series(model, attention, remat, options):
                        print(_told(row), flush=True)
                        rows.append(row)
                        if options.output:
                            options.output.write_text(json.dumps(rows, indent=1) + "\n")
    except InputError as error:
        parser.exit(2, f"error: {error}\n")
    print(table(rows))


def series(
    model: str, attention: str, remat: str, options: argparse.Namespace
) -> Iterator[dict[str, Any]]:
    """A row a batch size, in a process of its own: an allocator's peak and failures end with it."""
    os.environ.setdefault("CUDA_VISIBLE_DEVICES", "0")  # one of several
    # All of the memory but what CUDA's own libraries take; by default jax leaves a quarter.
    os.environ.setdefault("XLA_PYTHON_CLIENT_MEM_FRACTION", "0.95")
    context = multiprocessing.get_context("spawn")
    mine, theirs = context.Pipe()
    process = context.Process(
        target=_series, args=(theirs, model, attention, remat, options), daemon=True
    )
    process.start()
    theirs.close()
    kind = {"model": model, "attention": attention, "remat": remat}
    batch_size = options.first_batch
    while True:
        try:
            message = mine.recv()
        except EOFError:
            break
        if isinstance(message, InputError):
            raise message
        batch_size = 2 * message["batch"]
        yield {**kind, **message}
    process.join()
    if process.exitcode:
        ended = f"its process ended with status {process.exitcode}; what it said stands above"
        yield {**kind, "batch": batch_size, "refused": ended}


def _series(pipe: Any, model: str, attention: str, remat: str, options: Any) -> None:
    import jax

    if jax.default_backend() != "gpu" and not options.tiny:
        pipe.send(
            InputError(
                f"benchmarks/gpu.py is for a GPU, and jax has a {jax.default_backend()} here "
                "(pip install 'jax[cuda12]' brings it one); --tiny runs toy models on any device."
            )
        )
        return
    batch_size = options.first_batch
    while batch_size <= options.last_batch:
        try:
            row = measure(model, attention, remat, batch_size, options)
        except (NotImplementedError, RuntimeError, ValueError) as error:
            # Out of memory is how a series ends, unless it is how it begins; all else is told, as
            # cuDNN off a GPU, or a length that it does not take.
            if OUT_OF_MEMORY not in str(error) or batch_size == options.first_batch:
                pipe.send({"batch": batch_size, "refused": str(error).splitlines()[0]})
            return
        pipe.send(row)
        batch_size *= 2


def measure(
    model: str, attention: str, remat: str, batch_size: int, options: argparse.Namespace
) -> dict[str, Any]:
    """One row: the real step, compiled, warmed up and timed."""
    import jax

    from benchmarks.recipes import noise
    from mmjax.plan.assembly import assemble
    from mmjax.sharding import make_mesh, to_device
    from mmjax.training.flops import utilisation
    from mmjax.training.state import init_state

    config = _config(model, attention, remat, batch_size, tiny=options.tiny)
    program, abstract_batch = assemble(config, make_mesh())
    with jax.set_mesh(program.mesh):
        state = init_state(program.contents, program.mesh, seed=config.seed)
        batch = to_device(noise(program, abstract_batch), program.mesh)
        flops = program.step_flops(state, batch)
        step = program.lower_step(state, batch).compile()
        seconds = []
        for _ in range(2 + options.runs):  # the first two warm up
            start = time.perf_counter()
            state, metrics = step(state, batch, None)
            jax.block_until_ready((state, metrics))
            seconds.append(time.perf_counter() - start)
        taken = statistics.median(seconds[2:])
        memory: Any = step.memory_analysis()
        allocator = jax.local_devices()[0].memory_stats() or {}
        return {
            "device": jax.devices()[0].device_kind,
            "jax": jax.__version__,
            "batch": batch_size,
            "loss": float(metrics["loss"]),
            "model_tflops": flops / 1e12,
            "seconds": taken,
            "all_seconds": seconds[2:],
            "pairs_per_second": batch_size / taken,
            "mfu": utilisation(flops, taken),
            "compiler_gib": (
                memory.argument_size_in_bytes
                + memory.temp_size_in_bytes
                + memory.output_size_in_bytes
                - memory.alias_size_in_bytes
            )
            / GIB,
            "allocator_peak_gib": allocator.get("peak_bytes_in_use", 0) / GIB,
        }


def _config(model: str, attention: str, remat: str, batch_size: int, tiny: bool) -> Any:
    from benchmarks.recipes import recipe

    name, changes = MODELS[model]
    config = recipe(name, "tiny" if tiny else None)
    config.batch_size = batch_size
    for part, values in changes.items():
        config.model[part].update({} if tiny else values)
    for part in config.model.values():
        if hasattr(part, "keys") and "attention" in part:
            part.update(attention=ATTENTIONS[attention], remat=remat, dtype="bfloat16")
    return config


def _told(row: dict[str, Any]) -> str:
    """A row as it comes."""
    head = f"{row['model']} {row['attention']} remat={row['remat']} batch {row['batch']}"
    if "refused" in row:
        return f"{head}: refused: {row['refused']}"
    return f"{head}: {1e3 * row['seconds']:.1f} ms, {row['pairs_per_second']:.0f} pairs/s"


def table(rows: list[dict[str, Any]]) -> str:
    """A row a model, attention and remat policy: the batch of most pairs a second, and the last."""
    lines = [
        "| model | attention | remat | best batch | pairs/s | MFU | GiB by compiler | by allocator "
        "| largest batch |",
        "|---|---|---|---|---|---|---|---|---|",
    ]
    kinds = dict.fromkeys((row["model"], row["attention"], row["remat"]) for row in rows)
    for kind in kinds:
        ran = [
            row
            for row in rows
            if (row["model"], row["attention"], row["remat"]) == kind and "refused" not in row
        ]
        if not ran:
            lines.append(f"| {' | '.join(kind)} | refused | | | | | |")
            continue
        best = max(ran, key=lambda row: row["pairs_per_second"])
        mfu = "" if best["mfu"] is None else f"{best['mfu']:.1%}"
        cells = [*kind, str(best["batch"]), f"{best['pairs_per_second']:.0f}", mfu]
        cells += [f"{best['compiler_gib']:.1f}", f"{best['allocator_peak_gib']:.1f}"]
        lines.append("| " + " | ".join([*cells, str(ran[-1]["batch"])]) + " |")
    return "\n".join(lines)


if __name__ == "__main__":
    main()
