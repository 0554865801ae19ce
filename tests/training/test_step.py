"""The training step: what it computes does not depend on the mesh, the slices or the run."""

import re
from contextlib import contextmanager
from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.experimental.compilation_cache import compilation_cache

from mmjax.errors import InputError
from mmjax.objectives import Masking, Task
from mmjax.objectives.answering import Answering
from mmjax.objectives.contrastive import Contrastive, SigmoidContrastive
from mmjax.objectives.masked_language import MaskedLanguage
from mmjax.objectives.matching import Matching
from mmjax.objectives.momentum import MomentumContrastive
from mmjax.rules import leaf_paths
from mmjax.sharding import make_mesh, to_device, tree_shardings
from mmjax.training.optimizer import learning_rates, make_optimizer
from mmjax.training.state import (
    StateConfig,
    abstract_model,
    graph_of,
    init_params,
    init_state,
    state_from_params,
)
from mmjax.training.step import compile_train_step, make_train_step
from tests.models.reference import (
    assert_close,
    random_params,
    tiny_batch,
    tiny_model,
    tiny_tokenizer,
)
from tests.runs import one_device

MODEL = tiny_model()
ANSWERING = tiny_model(answers=("yes", "no", "red", "two"))
ROWS = 56  # 3 × 56, 56 / 8 and 56 / 4 are no other size of the model: shapes tell what they are

PRETRAINING = {
    "contrastive": Contrastive(weight=1.0),
    "matching": Matching(weight=0.5),
    "masked_language": MaskedLanguage(weight=1.0),
}
QUESTIONS = {"masked_language": MaskedLanguage(weight=1.0), "answering": Answering(weight=1.0)}


def task_of(model, objectives):
    return Task(graph_of(model), objectives, tiny_tokenizer(), Masking(words=0.3))


def recording_sgd(rate=0.02, momentum=0.9):
    """SGD whose state begins with the last gradient, for the tests to look at."""
    record = optax.GradientTransformation(
        lambda params: jax.tree.map(jnp.zeros_like, params), lambda g, state, params=None: (g, g)
    )
    return optax.chain(record, optax.sgd(rate, momentum))


def params_of(model, seed=0):
    return random_params(jax.eval_shape(lambda: init_params(model, jax.random.key(0))), seed)


class Run:
    """A compiled step on a mesh, from fixed parameters."""

    def __init__(
        self,
        mesh,
        *,
        model=MODEL,
        objectives=PRETRAINING,
        optimizer=None,
        ema_decay=0.0,
        rates=None,
        accumulate=1,
        sharded=True,
    ):
        self.mesh, params = mesh, params_of(model)
        optimizer = optimizer or recording_sgd()
        step = make_train_step(
            task_of(model, objectives),
            optimizer,
            seed=7,
            rates=jax.tree.map(lambda _: 1.0, params) if rates is None else rates,
            accumulate=accumulate,
            ema_decay=ema_decay,
            sharded=sharded,
        )
        with jax.set_mesh(mesh):
            contents = StateConfig(
                model,
                optimizer,
                ema=ema_decay > 0,
                sharded=sharded,
                memory=lambda: task_of(model, objectives).memory(abstract_model(model), ROWS),
            )
            self.start = state_from_params(contents, params, mesh)
            jitted = compile_train_step(step, self.start, mesh)
            lowered = jitted.lower(self.start, to_device(tiny_batch(model, ROWS), mesh), None)
            self.compiled = lowered.compile()
        self.model = model

    def steps(self, count):
        """[(state, metrics)] of the first steps, each on its own batch, on the host."""
        state, seen = jax.tree.map(jnp.copy, self.start), []
        with jax.set_mesh(self.mesh):
            for number in range(count):
                batch = to_device(tiny_batch(self.model, ROWS, seed=number), self.mesh)
                state, metrics = self.compiled(state, batch, None)
                seen.append(jax.device_get((state, metrics)))
        self.last = state
        return seen


@pytest.fixture(scope="module")
def alone():
    run = Run(one_device(), ema_decay=0.75)
    return run, run.steps(3)


@contextmanager
def compiled_afresh():
    """Without the compilation cache: a program that comes from it brings no compiler's warnings."""
    before = jax.config.jax_enable_compilation_cache
    jax.config.update("jax_enable_compilation_cache", False)
    compilation_cache.reset_cache()  # it remembers whether it was enabled
    try:
        yield
    finally:
        jax.config.update("jax_enable_compilation_cache", before)
        compilation_cache.reset_cache()


@pytest.mark.xdist_group("alone")
@pytest.mark.parametrize(
    ("axes", "sharded"),
    [
        pytest.param({"data": 8}, True, marks=pytest.mark.slow),
        pytest.param({"data": 8}, False, marks=pytest.mark.slow),
        ({"data": 4, "fsdp": 2}, True),
        pytest.param({"data": 2, "fsdp": 2, "tensor": 2}, True, marks=pytest.mark.slow),
    ],
    ids=["zero1", "data8", "data4_fsdp2", "data2_fsdp2_tensor2"],
)
def test_eight_devices_compute_what_one_does(axes, sharded, alone, capfd):
    with compiled_afresh():
        run = Run(make_mesh(**axes), ema_decay=0.75, sharded=sharded)
    assert "Involuntary full rematerialization" not in capfd.readouterr().err
    for (state, metrics), (expected, expected_metrics) in zip(run.steps(3), alone[1], strict=True):
        assert_close(metrics, expected_metrics)
        assert_close(state.opt_state[0], expected.opt_state[0])  # the recorded gradients
        assert_close(state.params, expected.params)
        assert_close(state.ema, expected.ema)
    _assert_laid_out_by_the_rules(run, sharded)
    _assert_activations_are_split(run)


def _assert_laid_out_by_the_rules(run, sharded):
    """Parameters by the rules; moments and average over the data axis as well, if `sharded`."""
    layout = tree_shardings(run.start, run.mesh)
    apart = tree_shardings(run.start, run.mesh, over_data=sharded)
    layout = replace(layout, opt_state=apart.opt_state, ema=apart.ema)
    pairs = zip(jax.tree.leaves(run.last), jax.tree.leaves(layout), strict=True)
    assert all(leaf.sharding.is_equivalent_to(sharding, leaf.ndim) for leaf, sharding in pairs)
    up = run.last.params["image"]["blocks"]["layers"]["mlp"]["up"]["kernel"]
    ways = run.mesh.shape
    assert up.shape == (2, 32, 64)
    assert up.addressable_shards[0].data.shape == (2, 32 // ways["fsdp"], 64 // ways["tensor"])
    average = run.last.ema["image"]["blocks"]["layers"]["mlp"]["up"]["kernel"]
    parts = run.mesh.size if sharded else ways["fsdp"] * ways["tensor"]
    assert average.addressable_shards[0].data.size == up.size // parts


def _assert_activations_are_split(run):
    """No device computes the hidden units, heads or words of the whole batch."""
    shapes = set(re.findall(r"f32\[([\d,]+)\]", run.compiled.as_text()))
    whole = {s for s in shapes if re.fullmatch(rf"({ROWS}|{3 * ROWS}),(10|11),(32|64|40|4,\d+)", s)}
    assert not whole


def test_the_step_is_a_pure_function_of_state_and_batch(alone):
    run, first = alone
    again = run.steps(3)
    jax.tree.map(np.testing.assert_array_equal, again, first)
    assert [int(state.step) for state, _ in first] == [1, 2, 3]


def test_metrics_and_average(alone):
    run, seen = alone
    ema = jax.device_get(run.start.params)
    for state, metrics in seen:
        ema = jax.tree.map(lambda old, new: 0.75 * old + 0.25 * new, ema, state.params)
        assert_close(state.ema, ema, 1e-6)
        gradients = jax.tree.leaves(state.opt_state[0])
        norm = np.sqrt(sum(np.square(g).sum() for g in gradients))
        np.testing.assert_allclose(metrics["gradient_norm"], norm, rtol=1e-5)
        weighted_sum = sum(o.weight * metrics[f"{name}/loss"] for name, o in PRETRAINING.items())
        np.testing.assert_allclose(metrics["loss"], weighted_sum, rtol=1e-6)
        assert metrics["bad_records"] == 0
    # (momentum 0.9 from rest: the first update is the gradient itself)
    first = jax.tree.map(lambda p, g: p - 0.02 * g, run.start.params, seen[0][0].opt_state[0])
    assert_close(seen[0][0].params, first, 1e-6)


SLICED = {
    "questions": (ANSWERING, QUESTIONS, 0.0),
    "contrastive": (
        MODEL,
        {
            "contrastive": Contrastive(weight=1.0, smoothing=0.1),
            "sigmoid_contrastive": SigmoidContrastive(weight=0.1),
            "masked_language": MaskedLanguage(weight=1.0),
        },
        0.0,
    ),
    "contrastive_alone": (MODEL, {"contrastive": Contrastive(weight=1.0)}, 0.0),
    "momentum": (
        MODEL,
        {
            "momentum_contrastive": MomentumContrastive(weight=1.0, queue_size=2 * ROWS),
            "masked_language": MaskedLanguage(weight=1.0, distill=0.4),
        },
        0.75,
    ),
}


@pytest.mark.slow
@pytest.mark.parametrize("case", SLICED)
def test_slices_add_up_to_the_whole_batch(case):
    """Also where the slices are walked by four devices and the whole batch by one."""
    model, objectives, ema_decay = SLICED[case]
    runs = [
        Run(mesh, model=model, objectives=objectives, accumulate=accumulate, ema_decay=ema_decay)
        for mesh, accumulate in ((one_device(), 1), (make_mesh(data=2, fsdp=2, tensor=2), 2))
    ]
    (whole, whole_metrics), (sliced, sliced_metrics) = (run.steps(2)[-1] for run in runs)
    for metrics in (sliced_metrics, whole_metrics):
        # (the most frequent word of a slice is not that of the batch)
        metrics.pop("masked_language/unigram_accuracy", None)
    assert_close(sliced_metrics, whole_metrics)
    assert_close(sliced.opt_state[0], whole.opt_state[0])
    assert_close(sliced.params, whole.params)
    assert_close(sliced.memory, whole.memory)


def test_slices_are_refused_where_tokens_of_examples_are_compared():
    rates = jax.tree.map(lambda _: 1.0, params_of(MODEL))
    with pytest.raises(InputError, match=r"= 4: matching compare .* fewer negatives"):
        make_train_step(
            task_of(MODEL, PRETRAINING), optax.sgd(1), seed=0, rates=rates, accumulate=4
        )


def test_an_average_from_which_nobody_learns_changes_no_step(alone):
    """It is for evaluation, and so does not draw the negatives either."""
    plain, averaged = Run(one_device()).steps(2), alone[1][:2]
    for (state, metrics), (other, others) in zip(plain, averaged, strict=True):
        jax.tree.map(np.testing.assert_array_equal, state.params, other.params)
        assert {name: others[name] for name in metrics} == metrics
        assert other.ema is not None


def test_frozen_parameters_stay_and_have_no_moments():
    config = {
        "name": "adamw", "learning_rate": 0.01, "b1": 0.9, "b2": 0.99, "epsilon": 1e-8,
        "first_moment": "float32",
        "weight_decay": 0.1, "clip_norm": 1.0, "rates": (("image/.*", 0.0),), "decays": (),
        "bounds": (),
        "schedule": {"kind": "constant", "warmup_steps": 0, "cooldown_steps": 0, "end_fraction": 0},
    }  # fmt: skip
    params = params_of(MODEL)
    optimizer = make_optimizer(config, params, total_steps=10)
    rates = learning_rates(config, params)
    run = Run(
        one_device(),
        objectives={"contrastive": Contrastive(weight=1.0)},
        optimizer=optimizer,
        rates=rates,
    )
    state, _ = run.steps(2)[-1]
    jax.tree.map(np.testing.assert_array_equal, state.params["image"], params["image"])
    assert not [path for path in leaf_paths(state.opt_state) if "/image/" in path]
    assert [path for path in leaf_paths(state.opt_state) if "/text/" in path]
    for path, before, after in zip(
        leaf_paths(params["text"]),
        jax.tree.leaves(params["text"]),
        jax.tree.leaves(state.params["text"]),
        strict=True,
    ):
        assert np.abs(after - before).max() > 1e-3, path


def test_a_state_is_born_sharded_and_depends_on_the_seed_alone():
    mesh = make_mesh(data=2, fsdp=2, tensor=2)
    eight, one = (
        init_state(StateConfig(MODEL, optax.adam(1e-3), ema=True), m, seed=3)
        for m in (mesh, one_device())
    )
    jax.tree.map(np.testing.assert_array_equal, jax.device_get(eight), jax.device_get(one))
    table = eight.params["text"]["embeddings"]["token_embedding"]["embedding"]
    moments = eight.opt_state[0].mu["text"]["embeddings"]["token_embedding"]["embedding"]
    average = eight.ema["text"]["embeddings"]["token_embedding"]["embedding"]
    assert table.addressable_shards[0].data.shape == (40 // 2, 32 // 2)
    for array in (moments, average):
        assert array.addressable_shards[0].data.shape == (40 // 4, 32 // 2)
    kernel = eight.params["text"]["blocks"]["layers"]["mlp"]["up"]["kernel"]
    assert not np.array_equal(kernel[0], kernel[1])  # layers differ
