"""AdamW (or SGD) with a schedule, and rules by path pattern for what differs between parameters.

The configuration's lists `rates`, `decays` and `bounds` all name parameters in one way: ordered
(pattern, value) pairs, see `mmjax.rules`. A rate of 0 freezes.
"""

import math
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import optax

from mmjax.errors import InputError, near_misses
from mmjax.rules import Rules, apply_rules, by_path, check_used, table
from mmjax.training.state import Parameters

# Weight decay is for matrices (as in ALBEF and CLIP): not for biases, LayerNorm, positions, tokens
# that are parameters themselves, or the temperature.
NO_DECAY = r".*(bias|scale|class_token|pooling/query|position_embedding.*)"
STATISTICS = r".*/(mean|var)"  # of batch norms, which are frozen: loaded, never updated
MOMENTS = ("float32", "bfloat16")
SCHEDULES = ("cosine", "linear", "rsqrt", "constant")


def make_schedule(config: Mapping[str, Any], total_steps: int) -> optax.Schedule:
    """Learning rate by step: linear warm-up to `learning_rate`, then one of SCHEDULES.

    `cosine` and `linear` fall to `end_fraction` × the peak at the last step; `rsqrt` falls with the
    square root of the step (Vaswani et al. 2017); `rsqrt` and `constant` end in a linear cool-down
    to `end_fraction` × the peak over `cooldown_steps` (Zhai et al. 2022).
    """
    peak, schedule = config["learning_rate"], config["schedule"]
    kind, warmup, cooldown = schedule["kind"], schedule["warmup_steps"], schedule["cooldown_steps"]
    end = schedule["end_fraction"] * peak
    if kind not in SCHEDULES:
        raise InputError(f"optimizer.schedule.kind is {kind!r}.{near_misses(kind, SCHEDULES)}")
    if warmup + cooldown > total_steps:
        raise InputError(
            f"optimizer.schedule: warmup_steps {warmup} + cooldown_steps {cooldown} exceed "
            f"total_steps {total_steps}."
        )
    if cooldown and kind in ("cosine", "linear"):
        raise InputError(
            f"optimizer.schedule.cooldown_steps is {cooldown}, but {kind} falls to its end anyway: "
            "set it to 0, or take rsqrt or constant."
        )
    decay_steps = max(total_steps - warmup, 1)
    after: optax.Schedule
    if kind == "cosine":
        after = optax.cosine_decay_schedule(peak, decay_steps, alpha=schedule["end_fraction"])
    elif kind == "linear":
        after = optax.linear_schedule(peak, end, decay_steps)
    else:
        plateau = _rsqrt(peak, max(warmup, 1)) if kind == "rsqrt" else lambda step: peak
        after = _cooled(plateau, decay_steps, cooldown, end)
    if not warmup:
        return after
    return optax.join_schedules([optax.linear_schedule(0.0, peak, warmup), after], [warmup])


def _rsqrt(peak: float, timescale: int) -> optax.Schedule:
    return lambda step: peak * jnp.sqrt(timescale / (jnp.maximum(step, 0) + timescale))


def _cooled(plateau: optax.Schedule, steps: int, cooldown: int, end: float) -> optax.Schedule:
    if not cooldown:
        return plateau
    start = steps - cooldown

    def schedule(step):
        level = plateau(jnp.minimum(step, start))
        fraction = jnp.clip((step - start) / cooldown, 0, 1)
        return level + (end - level) * fraction

    return schedule


def make_optimizer(
    config: Mapping[str, Any], params: Parameters, total_steps: int
) -> optax.GradientTransformation:
    """The update rule for a parameter tree (abstract or not), by `config.optimizer`.

    Raises InputError for a pattern that matches nothing, an unknown name or a bad schedule.
    """
    for key in ("rates", "decays"):
        check_used(config[key], params, key=f"optimizer.{key}")
    rates, decays = learning_rates(config, params), weight_decays(config, params)
    # A frozen parameter has no moments (and, in the step, no gradient).
    trainable = jax.tree.map(lambda rate: rate != 0, rates)
    return optax.chain(
        optax.clip_by_global_norm(config["clip_norm"]) if config["clip_norm"] else optax.identity(),
        optax.masked(_direction(config), trainable),
        _per_leaf(lambda update, param, decay: update + decay * param, decays),
        _per_leaf(lambda update, param, rate: rate * update, rates),
        optax.scale_by_learning_rate(make_schedule(config, total_steps)),
        _bounded(config["bounds"], params),
    )


def learning_rates(config: Mapping[str, Any], params: Parameters) -> Parameters:
    """What the schedule is multiplied by for each parameter; 0 is frozen."""
    rules = [(STATISTICS, 0.0), *config["rates"], (".*", 1.0)]
    return apply_rules(rules, params, key="optimizer.rates")


def weight_decays(config: Mapping[str, Any], params: Parameters) -> Parameters:
    """Each parameter's decoupled weight decay (Loshchilov and Hutter 2019), times its rate."""
    rules = [*config["decays"], (NO_DECAY, 0.0), (".*", config["weight_decay"])]
    return apply_rules(rules, params, key="optimizer.decays")


def optimizer_table(config: Mapping[str, Any], params: Parameters) -> str:
    """What every parameter gets, for people."""
    columns = {"rate ×": learning_rates(config, params), "decay": weight_decays(config, params)}
    return table(params, columns)


def _direction(config: Mapping[str, Any]) -> optax.GradientTransformation:
    if (stored := config["first_moment"]) not in MOMENTS:
        raise InputError(f"optimizer.first_moment is {stored!r}.{near_misses(stored, MOMENTS)}")
    if config["name"] == "adamw":
        return optax.scale_by_adam(
            config["b1"], config["b2"], config["epsilon"], mu_dtype=jnp.dtype(stored)
        )
    if config["name"] == "sgd":
        return optax.trace(config["b1"]) if config["b1"] else optax.identity()
    raise InputError(
        f"optimizer.name is {config['name']!r}.{near_misses(config['name'], ['adamw', 'sgd'])}"
    )


def _per_leaf(function: Callable[..., Any], values: Parameters) -> optax.GradientTransformation:
    """Update -> function(update, parameter, value) with a constant value for every parameter."""
    return optax.stateless(lambda updates, params: jax.tree.map(function, updates, params, values))


def at_bounds(rules: Rules, params: Parameters) -> dict[str, jax.Array]:
    """`PATH/at_lower_bound` and `PATH/at_upper_bound`: the share of a parameter's elements there.

    Of the parameters that have such a bound.
    """
    values, shares = by_path(params), {}
    for side, bounds in zip(("lower", "upper"), _bounds(rules, params), strict=True):
        for path, bound in by_path(bounds).items():
            if math.isfinite(bound):
                near = jnp.isclose(values[path], bound, rtol=1e-3, atol=1e-6)
                shares[f"{path}/at_{side}_bound"] = near.mean()
    return shares


def _bounded(rules: Rules, params: Parameters) -> optax.GradientTransformation:
    """Cut an update short where it would carry its parameter over a bound, as CLIP clamps."""
    lower, upper = _bounds(rules, params)
    return optax.stateless(
        lambda updates, params: jax.tree.map(
            lambda update, param, low, high: (
                update
                if low == -math.inf and high == math.inf
                else jnp.clip(param + update, low, high) - param
            ),
            updates,
            params,
            lower,
            upper,
        )
    )


def _bounds(rules: Rules, params: Parameters) -> tuple[Parameters, Parameters]:
    """The lower and the upper bound of every parameter."""
    bounds = apply_rules([*rules, (".*", (-math.inf, math.inf))], params, key="optimizer.bounds")
    lower, upper = (
        jax.tree.map(lambda _, bound, side=side: bound[side], params, bounds) for side in (0, 1)
    )
    return lower, upper
