"""Adversarial training beside VILLA's own, and beside plain numpy on a linear model."""

from functools import cache, partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from mmjax.errors import InputError
from mmjax.models import VisionLanguageModel
from mmjax.objectives import Features
from mmjax.objectives.adversarial import (
    PASSES,
    Adversarial,
    adversarial_gradients,
    adversarial_loss,
    ascend,
    scores_of,
    symmetric_kl,
    zero_shifts,
)
from mmjax.objectives.answering import Answering
from mmjax.objectives.loss import Loss
from mmjax.sharding import make_mesh, to_device, tree_shardings
from tests.models import reference
from tests.models.test_shifts import CASES as CASES_OF_MODELS
from tests.models.test_shifts import built
from tests.weights.families.recorded import (
    GRADIENTS,
    OUTPUTS,
    Recorded,
    assert_close,
    load,
    original_names,
)
from tests.weights.families.test_uniter import ANSWERS, config_of, inputs_of

OBJECTIVES = {"answering": Answering(weight=1.0)}


def answering_loss(graph, batch, params, shifts, objectives=OBJECTIVES):
    """What `adversarial_gradients` asks for; the accuracy is whatever else is wanted."""
    features = Features(nnx.merge(graph, params), batch, shifts=shifts)
    losses = {name: each(features, jax.random.key(0)) for name, each in objectives.items()}
    weights = {name: loss.weight for name, loss in losses.items()}
    total = sum(objectives[name].weight * loss.total / loss.weight for name, loss in losses.items())
    scores = scores_of(objectives, losses, weights)
    return total, (scores, losses["answering"].metrics["answering/accuracy"])


# ---- beside recorded runs of VILLA


class Villa:
    """The recorded model, batch and loss."""

    def __init__(self, recorded, folder):
        self.recorded = recorded
        self.model = load(folder, "villa", config_of(recorded, ANSWERS), recorded.under("w/"))
        graph, state = nnx.split(self.model)
        self.params = nnx.to_pure_dict(state)
        self.batch = {name: jnp.array(array) for name, array in inputs_of(recorded, "in/").items()}
        self.batch |= {
            "answer": jnp.array(recorded["in/targets"]),
            "valid": jnp.ones(len(recorded["in/targets"]), bool),
        }
        self.loss_of = partial(answering_loss, graph, self.batch)

    def options(self, variant):
        """Those of a recorded variant."""
        theirs = self.recorded.config["variants"][variant]
        modality = theirs["adv_modality"]
        return Adversarial(
            steps=theirs["adv_steps"],
            modality=("alternate" if "alter" in modality else "both")
            if len(modality) > 1
            else modality[0],
            norm=theirs["norm_type"],
            text_step_size=theirs["adv_lr_txt"],
            image_step_size=theirs["adv_lr_img"],
            max_norm=theirs["adv_max_norm"],
            kl_weight=theirs["adv_kl_weight"],
        )

    def start(self, variant, options):
        """The recorded draws where there are some, else zeros."""
        draws = self.recorded.under(f"draw/{variant}/")
        if draws:
            return {
                "text_shift": jnp.array(draws["init_txt_delta"]),
                "image_shift": jnp.array(draws["init_img_delta"]),
            }
        return zero_shifts(options, self.model, self.batch)


VARIANTS = (
    "text_l2",
    "image_l2_clip",
    "text_linf_clip",
    "both_l2",
    "alter_l2",
    "text_l2_released",
    "both_l2_randinit",
)
THEIR_NAMES = {"text_shift": "txt_delta", "image_shift": "img_delta"}


@pytest.fixture(scope="module")
def villa(shared, tmp_path_factory):
    recorded = Recorded(shared / "goldens" / "villa_dev.npz")
    return Villa(recorded, tmp_path_factory.mktemp("villa"))


@pytest.mark.parametrize("variant", VARIANTS)
def test_steps_are_villas(variant, villa):
    """Perturbations, losses, divergences and the perturbations' gradients of every step."""
    options, recorded = villa.options(variant), villa.recorded
    shifts = villa.start(variant, options)
    slopes = jax.jit(
        jax.value_and_grad(
            partial(adversarial_loss, villa.loss_of, options=options), argnums=1, has_aux=True
        )
    )
    for step in range(options.steps):
        at = f"{variant}/step{step}"
        for name, shift in shifts.items():
            used = f"out/{at}/{THEIR_NAMES[name]}_used"
            assert_close(shift, recorded[used], GRADIENTS, used)
        (loss, ((losses, divergences), _)), gradients = slopes(villa.params, shifts)
        recorded.check(f"loss/{at}/loss", loss)
        for i, (found, kl) in enumerate(zip(losses, divergences, strict=True)):
            ending = f"_{i + 1}" if len(losses) > 1 else ""
            recorded.check(f"loss/{at}/bce_loss{ending}", found)
            expected = recorded[f"loss/{at}/kl_loss{ending}"]
            np.testing.assert_allclose(kl, expected, rtol=2e-5, atol=3e-7)
        for name, gradient in gradients.items():
            expected = f"out/{at}/{THEIR_NAMES[name]}_grad"
            assert_close(gradient, recorded[expected], GRADIENTS, expected)
            shifts[name] = ascend(shifts[name], gradient, options.step_sizes[name], options)


@pytest.mark.slow
@pytest.mark.parametrize("variant", VARIANTS)
def test_accumulated_gradients_are_villas(variant, villa):
    options, recorded = villa.options(variant), villa.recorded
    start = villa.start(variant, options)
    result = jax.jit(partial(adversarial_gradients, villa.loss_of, options=options))(
        villa.params, start
    )
    recorded.check_gradients(variant, original_names(villa.model, result.gradients))
    total = sum(recorded[f"loss/{variant}/step{step}/loss"] for step in range(options.steps))
    assert_close(result.loss + options.kl_weight * result.divergence, total, OUTPUTS)
    # What else the loss says is of the clean pass.
    np.testing.assert_array_equal(result.aux, villa.loss_of(villa.params, {})[1][1])


def test_perturbed_scores_are_villas(villa):
    """Both ways into the model, one by one."""
    model, recorded = villa.model, villa.recorded
    for i, (name, theirs) in enumerate(THEIR_NAMES.items()):
        shifts = {name: jnp.array(recorded[f"out/alter_l2/step2/{theirs}_used"])}
        scores = model.score_answers(Features(model, villa.batch, shifts=shifts).fused)
        recorded.check(f"out/alter_l2/step2/scores{i}", scores)


# ---- beside plain numpy


ROWS, LENGTH, WIDTH, CLASSES = 8, 3, 4, 5


def linear_case():
    """Texts and pictures are tokens already; a softmax of their weighted sum is to be learnt."""
    rng = np.random.default_rng(0)
    inputs = {
        "text_shift": rng.normal(size=(ROWS, LENGTH, WIDTH)),
        "image_shift": rng.normal(size=(ROWS, LENGTH - 1, WIDTH)),
    }
    kernels = {name: rng.normal(size=(*x.shape[1:], CLASSES)) for name, x in inputs.items()}
    labels = np.eye(CLASSES)[rng.integers(CLASSES, size=ROWS)]
    share = rng.uniform(size=ROWS)
    share[3] = 0  # a row that does not count
    return inputs, kernels, labels, share / share.sum()


def linear_loss(inputs, labels, share, kernels, shifts):
    logits = 0
    for name, kernel in kernels.items():
        x = inputs[name] + shifts[name] if name in shifts else inputs[name]
        logits = logits + jnp.einsum(
            "blw,blwc->bc", x, jnp.broadcast_to(kernel, (*x.shape, CLASSES))
        )
    losses = -(labels * jax.nn.log_softmax(logits)).sum(axis=-1)
    return (share * losses).sum(), ({"linear": (logits, share)}, logits)


def softmax(x):
    exponentials = np.exp(x - x.max(axis=-1, keepdims=True))
    return exponentials / exponentials.sum(axis=-1, keepdims=True)


class Numpy:
    """Algorithm 1 of the paper, by hand: the gradient of a linear softmax classifier."""

    def __init__(self, options):
        self.inputs, self.kernels, self.labels, self.share = linear_case()
        self.options = options
        self.gradients = {name: np.zeros_like(kernel) for name, kernel in self.kernels.items()}
        self.shifts = {name: np.zeros_like(self.inputs[name]) for name in options.step_sizes}
        self.losses, self.divergences = [], []

    def scores(self, x):
        return sum(np.einsum("blw,lwc->bc", x[name], self.kernels[name]) for name in x)

    def run(self):
        for _ in range(self.options.steps):
            passes = PASSES[self.options.modality]
            slopes = {name: np.zeros_like(shift) for name, shift in self.shifts.items()}
            for names in passes:
                self.add(names, slopes, 1 / (len(passes) * self.options.steps))
            for name, slope in slopes.items():
                self.move(name, slope)

    def add(self, names, slopes, factor):
        """One pass: its loss and divergence, and their gradients by kernels and by shifts."""
        clean = self.inputs
        moved = clean | {name: clean[name] + self.shifts[name] for name in names}
        p, q = softmax(self.scores(clean)), softmax(self.scores(moved))
        gap = np.log(p) - np.log(q)
        self.losses.append(-(self.share[:, None] * self.labels * np.log(q)).sum())
        self.divergences.append((self.share[:, None] * (p - q) * gap).sum())
        # d/dz of Σ (p − q)(log p − log q), through q's scores and through p's.
        weight = self.options.kl_weight
        by_q = q - p - q * (gap - (q * gap).sum(axis=-1, keepdims=True))
        by_p = p - q + p * (gap - (p * gap).sum(axis=-1, keepdims=True))
        by_moved = factor * self.share[:, None] * (q - self.labels + weight * by_q)
        by_clean = factor * self.share[:, None] * weight * by_p
        for name in self.kernels:
            self.gradients[name] += np.einsum("blw,bc->lwc", moved[name], by_moved)
            self.gradients[name] += np.einsum("blw,bc->lwc", clean[name], by_clean)
        for name in names:
            slopes[name] += np.einsum("bc,lwc->blw", by_moved, self.kernels[name])

    def move(self, name, slope):
        """Each example's perturbation, along its own gradient."""
        order = {"l2": 2, "linf": np.inf}[self.options.norm]
        for row, of_row in zip(self.shifts[name], slope, strict=True):
            length = np.linalg.norm(of_row.ravel(), order)
            if length > 0:
                row += self.options.step_sizes[name] * of_row / length
            if self.options.max_norm and order == 2:
                row *= min(1, self.options.max_norm / max(np.linalg.norm(row), 1e-30))
            elif self.options.max_norm:
                row.clip(-self.options.max_norm, self.options.max_norm, out=row)


CASES = {
    "text": Adversarial(steps=3, modality="text", text_step_size=0.4),
    "image, clipped": Adversarial(steps=3, modality="image", image_step_size=0.7, max_norm=0.9),
    "both, largest entry": Adversarial(
        steps=2, modality="both", norm="linf", text_step_size=0.3, image_step_size=0.2
    ),
    "largest entry, clipped": Adversarial(
        steps=4, modality="text", norm="linf", text_step_size=0.3, max_norm=0.5
    ),
    "alternate": Adversarial(
        steps=3, modality="alternate", text_step_size=0.5, image_step_size=0.3, kl_weight=0.7
    ),
    "no divergence": Adversarial(steps=2, text_step_size=0.5, kl_weight=0.0),
}


@cache
def both_ways(case):
    """What numpy and what we make of a case."""
    options = CASES[case]
    expected = Numpy(options)
    expected.run()
    inputs, kernels, labels, share = jax.tree.map(jnp.asarray, linear_case())
    shifts = {name: jnp.zeros(inputs[name].shape) for name in options.step_sizes}
    loss_of = partial(linear_loss, inputs, labels, share)
    found = jax.jit(partial(adversarial_gradients, loss_of, options=options))(kernels, shifts)
    return expected, found


@pytest.mark.parametrize("case", CASES)
def test_as_by_hand(case):
    expected, found = both_ways(case)
    for name, gradient in expected.gradients.items():
        np.testing.assert_allclose(found.gradients[name], gradient, rtol=2e-4, atol=2e-6)
    np.testing.assert_allclose(found.loss, np.mean(expected.losses), rtol=1e-5)
    np.testing.assert_allclose(found.divergence, np.mean(expected.divergences), rtol=1e-4)
    np.testing.assert_allclose(found.aux, expected.scores(expected.inputs), rtol=1e-4, atol=1e-5)


def test_divergence_of_far_scores_is_finite():
    logits = jnp.array([[0.0, 0.0], [3e4, -3e4], [1.0, 2.0]])
    found = symmetric_kl(logits, jnp.array([[0.0, 0.0], [-3e4, 3e4], [1.0, 3.0]]))
    p, q = softmax(np.array([1.0, 2.0])), softmax(np.array([1.0, 3.0]))
    expected = (p * np.log(p / q)).sum() + (q * np.log(q / p)).sum()
    np.testing.assert_allclose(found, [0, 1.2e5, expected], rtol=1e-5)


# ---- around a model of ours


MODEL = reference.tiny_model(
    image_depth=1, text_depth=1, fusion_depth=1, answers=("yes", "no", "red", "two"), matching=False
)
BOTH = Adversarial(steps=2, modality="both", text_step_size=0.3, image_step_size=0.3)


def small_loss():
    """A model, its parameters, and the loss of a batch of questions, one of them invalid."""
    graph, params = reference.split(lambda: VisionLanguageModel(MODEL, nnx.Rngs(0)))
    return graph, params, reference.tiny_batch(MODEL, 16)


@partial(jax.jit, static_argnums=0)
def gradients_of(graph, params, batch):
    shifts = zero_shifts(BOTH, nnx.merge(graph, params), batch)
    return adversarial_gradients(partial(answering_loss, graph, batch), params, shifts, BOTH)


@pytest.fixture(scope="module")
def whole():
    graph, params, batch = small_loss()
    return gradients_of(graph, params, jax.tree.map(jnp.asarray, batch))


def assert_same(found, expected):
    reference.assert_close(found._asdict(), expected._asdict())


@pytest.mark.slow
def test_on_eight_devices_as_on_one(whole):
    graph, params, batch = small_loss()
    mesh = make_mesh(data=4, fsdp=2)
    params = jax.device_put(params, tree_shardings(params, mesh))
    with jax.set_mesh(mesh):
        found = gradients_of(graph, params, to_device(batch, mesh))
    assert len(found.loss.devices()) == 8
    assert_same(found, whole)


def test_padding_and_invalid_rows_change_nothing(whole):
    graph, params, batch = small_loss()
    last = np.flatnonzero(~batch["valid"])
    batch["text"][last] = 7
    batch["answer"][last] = 0.5
    for name, filling in (("text", 5), ("text_mask", False)):
        batch[name] = np.pad(batch[name], ((0, 0), (0, 3)), constant_values=filling)
    more = {name: np.concatenate([array, array[:8]]) for name, array in batch.items()}
    more["valid"][16:] = False
    assert_same(gradients_of(graph, params, jax.tree.map(jnp.asarray, more)), whole)


def test_perturbations_raise_the_loss(whole):
    """By more than the same steps at random, and clean inputs have the loss that they have."""
    graph, params, batch = small_loss()
    batch = jax.tree.map(jnp.asarray, batch)
    loss_of = jax.jit(partial(answering_loss, graph, batch))
    clean, (_, accuracy) = loss_of(params, {})
    noise = zero_shifts(BOTH, nnx.merge(graph, params), batch)
    rng = np.random.default_rng(0)
    for name, shift in noise.items():
        draws = rng.normal(size=shift.shape)
        lengths = np.linalg.norm(draws, axis=(1, 2), keepdims=True)
        noise[name] = jnp.array(0.3 * draws / lengths, jnp.float32)
    # Of two steps the first is at no perturbation.
    raised = 2 * whole.loss - clean
    assert raised - clean > 5 * abs(loss_of(params, noise)[0] - clean)
    assert whole.divergence > 0
    np.testing.assert_array_equal(whole.aux, accuracy)


def test_shares_are_of_the_whole_batch_and_of_the_sum():
    """Slices of a batch add up, and half a loss has half a divergence."""
    scores, rows = jnp.zeros((4, 3)), jnp.array([1.0, 0, 1, 1])
    some, none = (Loss(jnp.zeros(()), rows.sum(), scores=x) for x in ((scores, rows), None))
    objectives = {"some": Answering(weight=0.5), "none": Answering(weight=1.0)}
    whole_batch = {"some": jnp.array(6.0), "none": jnp.array(1.0)}
    found = scores_of(objectives, {"some": some, "none": none}, whole_batch)
    assert found.keys() == {"some"}
    np.testing.assert_allclose(found["some"][1], np.array([1, 0, 1, 1]) / 12)


@pytest.mark.parametrize("name", CASES_OF_MODELS)
def test_shifts_have_the_shape_of_what_they_are_added_to(name):
    model, batch, shapes = built(name)
    modality = "both" if "image" in shapes else "text"
    shifts = zero_shifts(Adversarial(modality=modality), model, batch)
    assert {key: shift.shape for key, shift in shifts.items()} == {
        f"{side}_shift": shape for side, shape in shapes.items()
    }


def test_unknown_options_are_refused():
    for wrong, hint in (({"modality": "texts"}, "text"), ({"norm": "l1"}, "l2")):
        with pytest.raises(InputError, match=f"adversarial.{next(iter(wrong))} is .*{hint}"):
            Adversarial(**wrong)


def test_a_model_without_the_way_in_is_refused():
    model = built("oscar")[0]
    Adversarial(modality="text").check(model)
    with pytest.raises(InputError, match="'alternate', and Oscar takes no image_shift"):
        Adversarial(modality="alternate").check(model)
