"""Schedules, and the update rule with its path patterns."""

from math import cos, log, pi, sqrt

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from mmjax.errors import InputError
from mmjax.training.optimizer import (
    learning_rates,
    make_optimizer,
    make_schedule,
    optimizer_table,
    weight_decays,
)

PEAK, TOTAL, WARMUP = 0.4, 100, 10


def config(**changes):
    schedule = {"kind": "constant", "warmup_steps": 0, "cooldown_steps": 0, "end_fraction": 0.0}
    schedule |= changes.pop("schedule", {})
    defaults = {
        "name": "adamw",
        "learning_rate": PEAK,
        "b1": 0.9,
        "b2": 0.98,
        "epsilon": 1e-6,
        "first_moment": "float32",
        "weight_decay": 0.1,
        "clip_norm": 0.0,
        "rates": (),
        "decays": (),
        "bounds": (),
    }
    return {**defaults, **changes, "schedule": schedule}


def cosine(step):
    return 0.1 * PEAK + 0.9 * PEAK * (1 + cos(pi * (step - WARMUP) / (TOTAL - WARMUP))) / 2


def linear(step):
    return PEAK + (0.1 * PEAK - PEAK) * (step - WARMUP) / (TOTAL - WARMUP)


def rsqrt(step):
    return PEAK * sqrt(WARMUP / step)


def cooled(plateau):
    """The last 20 steps go linearly from the plateau's height at step 80 to a tenth of the peak."""

    def at(step):
        if step <= 80:
            return plateau(step)
        return plateau(80) + (0.1 * PEAK - plateau(80)) * (step - 80) / 20

    return at


@pytest.mark.parametrize(
    ("kind", "cooldown", "closed_form"),
    [
        ("cosine", 0, cosine),
        ("linear", 0, linear),
        ("rsqrt", 0, rsqrt),
        ("rsqrt", 20, cooled(rsqrt)),
        ("constant", 0, lambda step: PEAK),
        ("constant", 20, cooled(lambda step: PEAK)),
    ],
)
def test_schedules_follow_their_closed_forms(kind, cooldown, closed_form):
    schedule = make_schedule(
        config(
            schedule={
                "kind": kind,
                "warmup_steps": WARMUP,
                "cooldown_steps": cooldown,
                "end_fraction": 0.1,
            }
        ),
        TOTAL,
    )
    for step in range(WARMUP):
        np.testing.assert_allclose(schedule(step), PEAK * step / WARMUP, rtol=1e-6)
    for step in (10, 11, 50, 79, 80, 81, 99, 100):
        np.testing.assert_allclose(schedule(jnp.array(step)), closed_form(step), rtol=1e-5)
    if kind in ("cosine", "linear") or cooldown:
        np.testing.assert_allclose(schedule(TOTAL + 50), 0.1 * PEAK, rtol=1e-5)


def test_without_warmup_the_first_step_is_at_the_peak():
    for kind in ("cosine", "linear", "rsqrt", "constant"):
        np.testing.assert_allclose(make_schedule(config(schedule={"kind": kind}), TOTAL)(0), PEAK)


@pytest.mark.parametrize(
    ("schedule", "words"),
    [
        ({"kind": "cosin"}, ["'cosin'", "Did you mean cosine?"]),
        ({"warmup_steps": 90, "cooldown_steps": 20}, ["90", "20", "100"]),
    ],
    ids=str,
)
def test_schedules_that_cannot_be_are_refused(schedule, words):
    with pytest.raises(InputError) as error:
        make_schedule(config(schedule=schedule), TOTAL)
    assert all(word in str(error.value) for word in words)


@pytest.mark.parametrize("kind", ["cosine", "linear"])
def test_a_cooldown_that_would_be_ignored_is_refused(kind):
    with pytest.raises(InputError, match="cooldown_steps"):
        make_schedule(config(schedule={"kind": kind, "cooldown_steps": 10}), TOTAL)


# ---- the update

SHAPES = {
    "image": {"layers": {"mlp": {"up": {"kernel": (3, 4), "bias": (4,)}, "norm": {"scale": (4,)}}}},
    "text": {"token_embedding": {"embedding": (5, 2)}, "position_embedding": {"embedding": (5, 2)}},
    "contrastive": {"logit_scale": ()},
    "pooling": {"class_token": (1, 3)},
}


def is_shape(x):
    return isinstance(x, tuple)


def values(seed, scale=1.0):
    rng = np.random.default_rng(seed)
    return jax.tree.map(
        lambda shape: (scale * rng.normal(size=shape)).astype(np.float32), SHAPES, is_leaf=is_shape
    )


def run(config, steps=5, params=None):
    params = values(0) if params is None else params
    optimizer = make_optimizer(config, params, TOTAL)
    state = optimizer.init(params)

    @jax.jit
    def step(params, state, gradients):
        updates, state = optimizer.update(gradients, state, params)
        return optax.apply_updates(params, updates), state

    for number in range(steps):
        params, state = step(params, state, values(number + 1))
    return params


def adamw(
    parameter, gradients, rates, decay, b1=0.9, b2=0.98, epsilon=1e-6, stored=lambda moment: moment
):
    """Loshchilov and Hutter 2019, algorithm 2, in float64; `stored` keeps the first moment."""
    p = np.asarray(parameter, np.float64)
    m, v = np.zeros_like(p), np.zeros_like(p)
    for t, (g, rate) in enumerate(zip(gradients, rates, strict=True), 1):
        g = np.asarray(g, np.float64)
        m, v = b1 * stored(m) + (1 - b1) * g, b2 * v + (1 - b2) * g**2
        direction = (m / (1 - b1**t)) / (np.sqrt(v / (1 - b2**t)) + epsilon)
        p = p - rate * (direction + decay * p)
    return p


def test_statistics_of_batch_norms_are_never_updated():
    norm = {"mean": jnp.ones(3), "var": jnp.ones(3), "scale": jnp.ones(3)}
    rates = learning_rates(config(rates=((".*", 2.0),)), {"stem": {"norm": norm}})
    assert rates == {"stem": {"norm": {"mean": 0.0, "var": 0.0, "scale": 2.0}}}


def test_adamw_with_rates_and_decays_by_path():
    settings = config(
        learning_rate=0.05,
        schedule={"kind": "linear", "warmup_steps": 2},
        rates=((r"image/.*", 0.1), (r".*/token_embedding/.*", 3)),
        decays=((r"pooling/.*", 0.7),),
    )
    found = run(settings)
    schedule = [0, 0.025, 0.05, 0.05 * 97 / 98, 0.05 * 96 / 98]
    gradients = [values(n + 1) for n in range(5)]

    def expected(parameter, decay, factor, *gradients):
        return adamw(parameter, gradients, [factor * rate for rate in schedule], decay)

    layer = {"up": {"kernel": 0.1, "bias": 0.0}, "norm": {"scale": 0.0}}
    decays = {
        "image": {"layers": {"mlp": layer}},
        "text": {
            "token_embedding": {"embedding": 0.1},
            "position_embedding": {"embedding": 0.0},
        },
        "contrastive": {"logit_scale": 0.0},
        "pooling": {"class_token": 0.7},
    }
    factors = jax.tree.map(lambda _: 1.0, decays)
    factors["image"] = jax.tree.map(lambda _: 0.1, factors["image"])
    factors["text"]["token_embedding"]["embedding"] = 3.0
    assert weight_decays(settings, values(0)) == decays
    assert learning_rates(settings, values(0)) == factors
    wanted = jax.tree.map(expected, values(0), decays, factors, *gradients)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=2e-5, atol=2e-6), found, wanted)
    table = optimizer_table(settings, values(0))
    assert "pooling/class_token" in table
    assert "0.7" in table


def test_a_first_moment_in_half_precision_is_rounded_between_steps_alone():
    settings = config(first_moment="bfloat16")
    moments = make_optimizer(settings, values(0), TOTAL).init(values(0))
    assert {x.dtype.name for x in jax.tree.leaves(moments) if x.ndim} == {"bfloat16", "float32"}

    def rounded(moment):
        return np.asarray(jnp.array(moment, jnp.bfloat16), np.float64)

    kernel = values(0)["image"]["layers"]["mlp"]["up"]["kernel"]
    gradients = [values(n + 1)["image"]["layers"]["mlp"]["up"]["kernel"] for n in range(5)]
    wanted, exact = (
        adamw(kernel, gradients, [PEAK] * 5, 0.1, stored=stored) for stored in (rounded, np.array)
    )
    found = run(settings)["image"]["layers"]["mlp"]["up"]["kernel"]
    # b1 times the stored moment is rounded too, to 8 bits.
    np.testing.assert_allclose(found, wanted, rtol=0.02, atol=0.02)
    assert np.abs(found - exact).max() > 1e-4


@pytest.mark.parametrize("momentum", [0.0, 0.9])
def test_sgd(momentum):
    found = run(config(name="sgd", b1=momentum, weight_decay=0.0, learning_rate=0.1))

    def expected(parameter, *gradients):
        velocity = 0.0
        for gradient in gradients:
            velocity = gradient + momentum * velocity
            parameter = parameter - 0.1 * velocity
        return parameter

    wanted = jax.tree.map(expected, values(0), *[values(n + 1) for n in range(5)])
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-5), found, wanted)


def test_the_whole_gradient_is_clipped():
    settings = config(name="sgd", b1=0.0, weight_decay=0.0, learning_rate=1.0, clip_norm=0.5)
    gradients = values(1)
    norm = sqrt(sum(np.square(g).sum() for g in jax.tree.leaves(gradients)))
    wanted = jax.tree.map(lambda p, g: p - g * 0.5 / norm, values(0), gradients)
    found = run(settings, steps=1)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-6), found, wanted)
    mild = run({**settings, "clip_norm": 100.0}, steps=1)
    wanted = jax.tree.map(np.subtract, values(0), gradients)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-6), mild, wanted)


def test_the_scale_stays_within_its_bounds():
    bounds = ((".*/logit_scale", (0.0, log(100))),)
    settings = config(name="sgd", b1=0.0, weight_decay=0.0, learning_rate=1.0, bounds=bounds)
    params = values(0)
    optimizer = make_optimizer(settings, params, TOTAL)
    for start, gradient, end in (
        (4.5, -1.0, log(100)),
        (0.3, 1.0, 0.0),
        (2.0, 0.5, 1.5),
        (7.0, 0.0, log(100)),
    ):
        params["contrastive"]["logit_scale"] = np.float32(start)
        gradients = jax.tree.map(np.zeros_like, params)
        gradients["contrastive"]["logit_scale"] = np.float32(gradient)
        gradients["pooling"]["class_token"] += 1000.0
        updates, _ = optimizer.update(gradients, optimizer.init(params), params)
        new = optax.apply_updates(params, updates)
        np.testing.assert_allclose(new["contrastive"]["logit_scale"], end, atol=1e-6)
        np.testing.assert_allclose(
            new["pooling"]["class_token"], params["pooling"]["class_token"] - 1000, rtol=1e-5
        )


def test_a_rate_of_zero_freezes():
    found = run(config(rates=(("text/.*", 0),)))
    jax.tree.map(np.testing.assert_array_equal, found["text"], values(0)["text"])
    assert np.abs(found["pooling"]["class_token"] - values(0)["pooling"]["class_token"]).max() > 0.1


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"name": "adam"}, ["'adam'", "adamw"]),
        ({"first_moment": "float16"}, ["optimizer.first_moment", "'float16'", "bfloat16"]),
        (
            {"rates": (("imgae/.*", 0.0),)},
            ["optimizer.rates", "'imgae/.*'", "matches no parameter"],
        ),
        ({"decays": (("bias", 0.0),)}, ["optimizer.decays", "'bias'", "whole path"]),
        ({"rates": (("(image", 0.0),)}, ["optimizer.rates", "'(image'", "regular expression"]),
        ({"bounds": (("[", (0, 1)),)}, ["optimizer.bounds", "regular expression"]),
    ],
    ids=str,
)
def test_rules_that_cannot_be_are_refused(changes, words):
    with pytest.raises(InputError) as error:
        make_optimizer(config(**changes), values(0), TOTAL)
    assert all(word in str(error.value) for word in words), str(error.value)
