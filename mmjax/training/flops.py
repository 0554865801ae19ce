"""Model FLOPs, counted from the program itself, and the share of the device's peak they reach.

Counted are the matrix products and convolutions of the forward pass, 2·m·n·k each, loop bodies
times their trip counts, plus twice that for the backward pass: 3 × forward. What rematerialisation
computes again is not counted, nor is anything elementwise: the usual definition of MFU (Chowdhery
et al. 2022, PaLM, appendix B).
"""

from collections.abc import Callable
from math import prod
from typing import Any

import jax
from jax.interpreters import partial_eval

from mmjax.chips import CHIPS

# Dense bf16 peak in FLOP/s per device, from the vendors' data sheets. A name that is not here gets
# no MFU rather than a wrong one.
PEAK_FLOPS = {
    kind: chip.peak_flops / chip.devices for chip in CHIPS.values() for kind in chip.device_kinds
} | {
    "NVIDIA A100-SXM4-40GB": 312e12,
    "NVIDIA A100-SXM4-80GB": 312e12,
    "NVIDIA H100 80GB HBM3": 989e12,
    "NVIDIA H200": 989e12,
}


def train_flops(loss: Callable[..., Any], *args: Any) -> float:
    """Model FLOPs of one training step with this (forward) loss: 3 × its matrix products."""
    return 3.0 * forward_flops(loss, *args)


def forward_flops(function: Callable[..., Any], *args: Any) -> float:
    """FLOPs of the matrix products of `function(*args)`; the arguments may be abstract."""
    jaxpr = jax.make_jaxpr(function)(*args).jaxpr
    needed, _ = partial_eval.dce_jaxpr(jaxpr, [True] * len(jaxpr.outvars))
    return _count(needed)


def utilisation(flops: float, seconds: float) -> float | None:
    """MFU as a fraction of all devices' peak, or None where the device's peak is unknown."""
    peak = PEAK_FLOPS.get(jax.devices()[0].device_kind)
    return None if peak is None else flops / seconds / (peak * jax.device_count())


def _count(jaxpr: Any) -> float:
    total = 0.0
    for equation in jaxpr.eqns:
        name, parameters = equation.primitive.name, equation.params
        if name == "dot_general":
            total += _dot_flops(equation)
        elif name == "conv_general_dilated":
            kernel = equation.invars[1].aval.shape
            layout = parameters["dimension_numbers"].rhs_spec
            total += 2.0 * prod(equation.outvars[0].aval.shape) * prod(kernel) / kernel[layout[0]]
        elif name == "pallas_call":
            total += parameters["cost_estimate"].flops
        elif name == "cond":
            total += max(_count(branch.jaxpr) for branch in parameters["branches"])
        else:
            # The trip count of a `while` is known to the program alone; ours are all `scan`s.
            trips = parameters["length"] if name == "scan" else 1
            if name == "shard_map":  # (its program is that of one device, for its part)
                trips = _parts(parameters)
            total += trips * sum(_count(inner) for inner in _inner_jaxprs(parameters))
    return total


def _dot_flops(equation: Any) -> float:
    (contracted, _), _ = equation.params["dimension_numbers"]
    left = equation.invars[0].aval.shape
    return 2.0 * prod(equation.outvars[0].aval.shape) * prod(left[axis] for axis in contracted)


def _parts(parameters: dict[str, Any]) -> int:
    """In how many parts a `shard_map` splits its work: by the axes that any input is split over."""
    axes: set[str] = set()
    for spec in parameters["in_specs"]:
        for names in spec:
            axes |= set() if names is None else {names} if isinstance(names, str) else set(names)
    return prod(parameters["mesh"].shape[axis] for axis in axes)


def _inner_jaxprs(parameters: dict[str, Any]) -> list[Any]:
    """The programs inside a call, a loop, a checkpoint or a custom gradient (its forward alone)."""
    inner = []
    for key, value in parameters.items():
        if key in ("jaxpr", "call_jaxpr", "body_jaxpr", "fun_jaxpr"):
            inner.append(getattr(value, "jaxpr", value))
    return inner
