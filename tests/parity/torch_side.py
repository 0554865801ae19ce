"""The other side of a comparison: models of `transformers` with random weights, run by torch."""

from pathlib import Path
from typing import Any

import numpy as np
import torch
import transformers

from tests.cases.case import Case
from tests.cases.compare import cotangent, flat


def build(case: Case, seed: int = 0) -> torch.nn.Module:
    """The model with weights of which none is 0 or 1, in float32.

    Of a seed above 0 the configuration is drawn as well, as far as other parts do not depend on it.
    """
    transformers.logging.set_verbosity_error()
    config = case.config(transformers)
    if seed:
        _vary(config, np.random.default_rng(seed))
    model = getattr(transformers, case.kind)(config).eval()
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.ndim:
                noise = torch.randn(parameter.shape, generator=generator)
                parameter.copy_(_scaled(name, noise))
        for name, buffer in model.named_buffers():
            if name.endswith(("running_mean", "running_var")):
                noise = torch.randn(buffer.shape, generator=generator)
                buffer.copy_(0.2 * noise if name.endswith("mean") else 1 + 0.3 * noise.abs())
    return model


def _vary(config: Any, rng: np.random.Generator) -> None:
    """Other heads, hidden units, epsilons and activations in all parts of a config."""
    for part in vars(config).values():
        if isinstance(part, transformers.PretrainedConfig):
            _vary(part, rng)
    width = getattr(config, "hidden_size", None)
    if not isinstance(width, int):
        return
    divisors = [heads for heads in range(1, width + 1) if width % heads == 0]
    drawn = {
        "num_attention_heads": int(rng.choice(divisors)),
        "n_head": int(rng.choice(divisors)),
        "intermediate_size": int(rng.integers(5, 40)),
        "n_inner": int(rng.integers(5, 40)),
        "layer_norm_eps": float(10 ** -rng.uniform(3, 9)),
        "layer_norm_epsilon": float(10 ** -rng.uniform(3, 9)),
        "hidden_act": str(rng.choice(["gelu", "relu", "gelu_new", "quick_gelu"])),
        "activation_function": str(rng.choice(["gelu", "relu", "gelu_new"])),
    }
    for name, value in drawn.items():
        if name in vars(config):
            setattr(config, name, value)


def _scaled(name: str, noise: torch.Tensor) -> torch.Tensor:
    if noise.ndim == 1:
        is_scale = name.endswith("weight")  # of a normalisation
        return 1 + 0.2 * noise if is_scale else 0.2 * noise
    if "embed" in name and noise.ndim < 4:
        return 0.4 * noise
    return noise / np.sqrt(np.prod(noise.shape[1:]))


def outputs(
    case: Case, model: torch.nn.Module, inputs: dict[str, np.ndarray]
) -> dict[str, torch.Tensor]:
    """What the class returns by default, by dotted name."""
    arguments = {name: torch.tensor(array) for name, array in case.theirs(inputs).items()}
    answer = case.outputs(dict(case.call(model, **arguments, return_dict=True).items()))
    return {name: x for name, x in flat(answer).items() if isinstance(x, torch.Tensor)}


def gradients(found: dict[str, torch.Tensor], model: torch.nn.Module) -> dict[str, np.ndarray]:
    """Of the randomly weighted outputs, by the names that the model has in memory."""
    scalar: Any = sum(
        (value * torch.tensor(cotangent(name, tuple(value.shape)))).sum()
        for name, value in found.items()
    )
    scalar.backward()
    return {n: p.grad.numpy() for n, p in model.named_parameters() if p.grad is not None}


def load(case: Case, folder: Path) -> torch.nn.Module:
    """A folder as `transformers` reads it; every tensor must be there and expected."""
    kind = getattr(transformers, case.kind)
    model, report = kind.from_pretrained(folder, output_loading_info=True)
    assert not report["missing_keys"], report
    assert not report["unexpected_keys"], report
    return model.eval()
