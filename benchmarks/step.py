"""Our training step beside PyTorch's on the CPU: the same model, weights, batch and threads.

    python benchmarks/step.py --output=step.json
    python benchmarks/step.py --models=flagship --width=384 --batch=16 --compile

The two-tower is configs/pretrain/siglip_b16.py, the flagship configs/pretrain/coattention_b16.py,
both at the width, depth and resolution given here, in float32; theirs is
benchmarks/torch_models.py, fed the same weights, pictures, texts, masks and (in the first step)
false partners. That it is the same computation is held by the first step: losses that differ by
more than 1e-4, or norms of the gradient by more than a thousandth, end the comparison.

Ours scans over its layers and computes again what is cheap (`remat: dots`): on a CPU that is about
as fast as to unroll them (--unroll), and takes less memory.

Each side is a process of its own that holds its model and waits: steps alternate, so that a
machine that slows down slows both. Reported are medians of seconds by the clock and of processor
time (user and system, all threads), the median of the ratios of neighbouring steps, and the peak
of the process's resident memory while it steps: libraries, weights, moments and all.
Compilation is over before, and what its allocator kept of it is given back.
"""

import argparse
import json
import os
import statistics
import sys
from collections.abc import Mapping
from pathlib import Path
from types import SimpleNamespace
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from benchmarks.side import Side, serve
from mmjax.errors import InputError

RECIPES = {"two_tower": "pretrain/siglip_b16", "flagship": "pretrain/coattention_b16"}
CLIP_NORM = 1.0
LOSS_TOLERANCE, NORM_TOLERANCE = 1e-4, 1e-3  # of the loss itself; relative
WARM_UP = 2  # steps of each side that are not counted


def main() -> None:
    """Run what the flags ask for, print the table, write the JSON."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--models", nargs="+", choices=RECIPES, default=list(RECIPES))
    for name, default, meaning in (
        ("width", 256, "of every layer; heads are 64 wide"),
        ("depth", 6, "of each encoder; the flagship's fusion has half of it"),
        ("pixels", 224, "a side, in patches of 16"),
        ("batch", 32, "pairs"),
        ("words", 32_000, "of the vocabulary"),
        ("threads", 2, "of each side, on as many cores"),
        ("runs", 12, "steps of each side, after the first ones"),
    ):
        parser.add_argument(f"--{name}", type=int, default=default, help=f"{meaning} ({default})")
    parser.add_argument("--remat", default="dots", help="our model.*.remat (dots)")
    parser.add_argument("--unroll", action="store_true", help="our model.*.unroll")
    parser.add_argument("--compile", action="store_true", help="a third side: torch.compile")
    parser.add_argument("--output", type=Path, help="a JSON file of all that was measured")
    options = parser.parse_args()
    try:
        _check(options)
        results = [compare(model, options) for model in options.models]
    except InputError as error:
        parser.exit(2, f"error: {error}\n")
    print(table(results))
    if options.output:
        options.output.write_text(json.dumps(results, indent=1) + "\n")


def _check(options: argparse.Namespace) -> None:
    try:
        import torch  # noqa: F401
    except ImportError:
        raise InputError(
            "benchmarks/step.py runs PyTorch beside us, which is not installed: "
            "pip install -e '.[parity]'."
        ) from None
    cores = len(os.sched_getaffinity(0))
    if not 1 <= options.threads <= cores:
        raise InputError(f"--threads is {options.threads}, and there are {cores} cores to use.")
    if options.width % 64 or options.pixels % 16 or min(options.width, options.pixels) < 1:
        raise InputError(
            f"--width is {options.width} and --pixels {options.pixels}: take multiples of 64 and "
            "of 16."
        )


def compare(model: str, options: argparse.Namespace) -> dict[str, Any]:
    """Times, memory and agreement of both sides for one of RECIPES."""
    ours = Side("ours", _our_side, options, model)
    shared = ours.receive()
    sides = [ours, Side("torch", _their_side, options, model, shared, False)]
    if options.compile:
        sides.append(Side("torch.compile", _their_side, options, model, shared, True))
    first = {side.name: side.step() for side in sides}
    _check_agreement(model, first)
    for _ in range(WARM_UP - 1):
        for side in sides:
            side.step()
    for side in sides:
        side.ask("watch memory")
    steps: dict[str, list[Mapping[str, float]]] = {side.name: [] for side in sides}
    for _ in range(options.runs):
        for side in sides:
            steps[side.name].append(side.step())
    peaks = {side.name: side.ask("peak") for side in sides}
    for side in sides:
        side.close()
    return {
        "model": model,
        "options": {k: v for k, v in vars(options).items() if k not in ("models", "output")},
        "model_gflops": shared["flops"] / 1e9,
        "first_loss": {name: step["loss"] for name, step in first.items()},
        "first_gradient_norm": {name: step["gradient_norm"] for name, step in first.items()},
        "seconds": {name: [step["seconds"] for step in taken] for name, taken in steps.items()},
        "cpu_seconds": {
            name: [step["cpu_seconds"] for step in taken] for name, taken in steps.items()
        },
        "peak_gib": peaks,
    }


def _check_agreement(model: str, first: Mapping[str, Mapping[str, float]]) -> None:
    ours = first["ours"]
    for name, theirs in first.items():
        loss = abs(theirs["loss"] - ours["loss"])
        norm = abs(theirs["gradient_norm"] / ours["gradient_norm"] - 1)
        if not (loss <= LOSS_TOLERANCE and norm <= NORM_TOLERANCE):  # nor is NaN the same
            raise InputError(
                f"{model}: the first loss is {ours['loss']:.6f} here and {theirs['loss']:.6f} by "
                f"{name}, the gradient's norm {ours['gradient_norm']:.6f} and "
                f"{theirs['gradient_norm']:.6f}: not the same computation, so nothing to time. "
                "benchmarks/torch_models.py no longer follows the recipe."
            )


def table(results: list[dict[str, Any]]) -> str:
    """Medians, a row a side."""
    lines = [
        "| model | side | s a step | of torch | CPU s a step | of torch | peak GiB | of torch |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for result in results:
        for side in result["seconds"]:
            cells = [result["model"], side]
            for key in ("seconds", "cpu_seconds"):
                cells.append(f"{statistics.median(result[key][side]):.2f}")
                pairs = zip(result[key][side], result[key]["torch"], strict=True)
                cells.append(f"{statistics.median(x / y for x, y in pairs):.2f}")
            peak = result["peak_gib"]
            cells += [f"{peak[side]:.2f}", f"{peak[side] / peak['torch']:.2f}"]
            lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines)


def _our_side(pipe: Any, options: argparse.Namespace, model: str) -> None:
    os.environ["JAX_PLATFORMS"] = "cpu"
    import dataclasses

    import jax
    import numpy as np

    from benchmarks.recipes import noise
    from mmjax.plan.assembly import assemble
    from mmjax.sharding import make_mesh, to_device
    from mmjax.training.state import init_state

    ours, abstract_batch = assemble(_config(model, options), make_mesh())
    with jax.set_mesh(ours.mesh):
        state = init_state(ours.contents, ours.mesh, seed=ours.config.seed)
        host_batch = noise(ours, abstract_batch)
        batch = to_device(host_batch, ours.mesh)
        train_step, flops = ours.compile_step(state, batch)
        shared = {
            "config": json.dumps(dataclasses.asdict(ours.model)),
            "params": jax.tree.map(np.asarray, state.params),
            "batch": {**host_batch, **_drawn(ours, state, batch)},
            "optimizer": ours.config.optimizer.to_dict(),
            "flops": flops,
        }
        pipe.send(shared)
        del shared

        def step() -> tuple[float, float]:
            nonlocal state
            state, metrics = train_step(state, batch)
            jax.block_until_ready(state)
            return float(metrics["loss"]), float(metrics["gradient_norm"])

        serve(pipe, step)


def _config(model: str, options: argparse.Namespace) -> Any:
    """The recipe at the size of the options, in float32."""
    from benchmarks.recipes import recipe

    config = recipe(RECIPES[model])
    config.batch_size, config.data.image_size = options.batch, options.pixels
    config.data.vocabulary_size = options.words
    layers = {"width": options.width, "heads": options.width // 64, "mlp_width": 4 * options.width}
    layers |= {
        "depth": options.depth,
        "dtype": "float32",
        "remat": options.remat,
        "unroll": options.unroll,
    }
    config.model.image.update(
        {**layers, "size": "", "patch_size": 16, "image_size": options.pixels}
    )
    config.model.text.update(layers)
    if model == "flagship":
        config.model.text.size = ""
        config.model.fusion.update({**layers, "depth": max(options.depth // 2, 1)})
    else:
        config.model.contrastive.width = options.width
    # The same rate from the first step on; clipping, which SigLIP has and the flagship as well.
    config.optimizer.schedule.update(kind="constant", warmup_steps=0, cooldown_steps=0)
    config.optimizer.update(name="adamw", clip_norm=CLIP_NORM)
    return config


def _drawn(ours: Any, state: Any, batch: Any) -> dict[str, Any]:
    """What our first step leaves to chance: hidden words, false partners."""
    import jax
    from flax import nnx

    from mmjax.objectives.features import Features
    from mmjax.objectives.loss import purpose_key

    matching = ours.task.objectives.get("matching")
    if matching is None:
        return {}

    @jax.jit
    def draw(params, batch):
        key = jax.random.fold_in(jax.random.key(ours.config.seed), 0)
        features = Features(
            nnx.merge(ours.task.graph, params),
            batch,
            draws=key,
            tokenizer=ours.task.tokenizer,
            masking=ours.task.masking,
        )
        masked = features.words_masked
        negatives = matching.draw(features, purpose_key(key, "matching"))
        return {
            "masked_text": masked.text,
            "hidden": masked.chosen,
            "false_text": negatives.text,
            "false_image": negatives.image,
        }

    return jax.device_get(draw(state.params, batch))


def _their_side(
    pipe: Any,
    options: argparse.Namespace,
    model: str,
    shared: Mapping[str, Any],
    compiled: bool,
) -> None:
    import torch

    from benchmarks import torch_models

    torch.set_num_threads(options.threads)
    torch.manual_seed(0)
    config = json.loads(shared["config"], object_hook=lambda values: SimpleNamespace(**values))
    classes = {"two_tower": torch_models.TwoTower, "flagship": torch_models.CoAttentionModel}
    module = classes[model](config)
    torch_models.load(module, shared["params"])
    batch = {name: torch.from_numpy(array.copy()) for name, array in shared["batch"].items()}
    optimizer = _their_optimizer(module, shared["optimizer"])
    forward = torch.compile(module) if compiled else module

    def step() -> tuple[float, float]:
        optimizer.zero_grad(set_to_none=True)
        loss = forward(batch)
        loss.backward()
        norm = torch.nn.utils.clip_grad_norm_(module.parameters(), CLIP_NORM)
        optimizer.step()
        # The first step's false partners were ours; from here on they are drawn.
        batch.pop("false_text", None), batch.pop("false_image", None)
        return loss.item(), norm.item()

    serve(pipe, step)


def _their_optimizer(module: Any, config: Mapping[str, Any]) -> Any:
    """AdamW in torch's fused form; decay on matrices alone."""
    import torch

    decayed = [p for p in module.parameters() if p.ndim >= 2]
    others = [p for p in module.parameters() if p.ndim < 2]
    rate, decay = config["learning_rate"], config["weight_decay"]
    return torch.optim.AdamW(
        [{"params": decayed, "weight_decay": decay}, {"params": others, "weight_decay": 0.0}],
        lr=rate,
        betas=(config["b1"], config["b2"]),
        eps=config["epsilon"],
        fused=True,
    )


if __name__ == "__main__":
    main()
