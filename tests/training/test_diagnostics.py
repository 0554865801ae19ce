"""Warnings about runs that go nowhere: each is provoked, and healthy runs raise none."""

import json
import re
from math import log
from pathlib import Path

import jax.numpy as jnp
import numpy as np
import pytest

import train
from mmjax.data import SOURCES
from mmjax.training.diagnostics import SYMPTOMS, Diagnosis, prior_loss
from mmjax.training.optimizer import at_bounds

TROUBLESHOOTING = Path(__file__).resolve().parents[2] / "docs" / "troubleshooting.md"
THIRD = log(3) - 2 / 3 * log(2)  # the entropy of one in three

# Metrics of a run that is well, and what each symptom looks like.
HEALTHY = {
    "loss": 1.0,
    "matching/cross_entropy": 0.3,
    "matching/positives": 1 / 3,
    "pairing/cross_entropy": 0.4,
    "pairing/loss": 0.8,  # with a term that is not its cross-entropy
    "pairing/positives": 1 / 2,
    "masked_language/loss": 2.0,
    "masked_language/accuracy": 0.4,
    "masked_language/unigram_accuracy": 0.1,
    "embeddings/effective_rank": 0.4,
    "embeddings/uniformity": -2.0,
    "embeddings/alignment": 0.6,
    "contrastive/logit_scale/at_lower_bound": 0.0,
    "contrastive/logit_scale/at_upper_bound": 0.1,
    "average/distance": 1e-3,
    "reference/distance": 0.5,
    "momentum_contrastive/queue_filled": 1.0,
    "transport/distance": 0.0,  # of objectives: no teacher's
}
SICK = [
    ("matching_prior", {"matching/cross_entropy": THIRD}, "0.6365 for 500 steps"),
    ("matching_prior", {"pairing/cross_entropy": log(2)}, "The pairing loss has stood at 0.6931"),
    ("masked_language_unigram", {"masked_language/accuracy": 0.1}, "10.0% of the guesses"),
    ("masked_language_unigram", {"masked_language/accuracy": 0.0}, "0.0% of the guesses"),
    ("collapsed", {"embeddings/uniformity": -0.01}, "collapsed to a point"),
    ("collapsed", {"embeddings/effective_rank": 0.03}, "collapsed to few directions"),
    (
        "logit_scale_bound",
        {"contrastive/logit_scale/at_upper_bound": 0.9},
        "contrastive/logit_scale sat at its upper bound in 90% of the last 500 steps",
    ),
    (
        "logit_scale_bound",
        {"contrastive/logit_scale/at_lower_bound": 1.0},
        "at its lower bound in 100%",
    ),
    ("teacher_identical", {"average/distance": 0.0}, r"The teacher \(average\)"),
    ("teacher_identical", {"reference/distance": 2e-7}, r"The teacher \(reference\)"),
    (
        "queue_initial",
        {"momentum_contrastive/queue_filled": 0.25},
        "25.0% of the queue of momentum_contrastive .* takes about 2,0[0-9]{2} steps",
    ),
    ("queue_initial", {"momentum_contrastive/queue_filled": 0.0}, "takes no number of steps"),
]
IDS = [f"{name}-{next(iter(metrics))}-{number}" for number, (name, metrics, _) in enumerate(SICK)]


def watch(rows, every=10, window=500, warmup_steps=0):
    """[(step, warning)] of the warnings over logged metrics, and `warnings/…` of every step."""
    diagnosis = Diagnosis(window, warmup_steps)
    told, logged = [], {}
    for number, row in enumerate(rows):
        step = (number + 1) * every
        told += [(step, message) for message in diagnosis.observe(step, HEALTHY | row)]
        logged[step] = dict(diagnosis.metrics)
    return told, logged


def matching(losses, positives=1 / 3):
    return [{"matching/cross_entropy": loss, "matching/positives": positives} for loss in losses]


# --- Every symptom --------------------------------------------------------------------------------


@pytest.mark.parametrize(("name", "metrics", "message"), SICK, ids=IDS)
def test_a_symptom_that_lasts_is_told_once(name, metrics, message):
    told, logged = watch([metrics] * 150)
    assert len(told) == 1
    step, warning = told[0]
    assert 500 <= step <= 520
    assert re.search(message, warning)
    assert warning.endswith(f" See docs/troubleshooting.md#{name}.")
    assert logged[500] == {}
    assert logged[step] == logged[1500] == {f"warnings/{name}": 1.0}


@pytest.mark.parametrize(("name", "metrics", "message"), SICK, ids=IDS)
def test_a_symptom_that_passes_is_not_told(name, metrics, message):
    assert watch([metrics] * 40 + [{}] * 200) == ([], {step: {} for step in range(10, 2401, 10)})


def test_every_symptom_is_provoked_above():
    assert {name for name, _, _ in SICK} == {symptom.name for symptom in SYMPTOMS}


def test_a_healthy_run_is_told_nothing():
    assert watch([{}] * 200)[0] == []


def test_runs_without_such_metrics_are_left_alone():
    diagnosis = Diagnosis(20)
    assert [diagnosis.observe(step, {"answering/loss": 3.0}) for step in range(50)] == [[]] * 50


def test_each_cause_is_told_for_itself():
    both = {"matching/cross_entropy": THIRD, "pairing/cross_entropy": log(2)}
    told, logged = watch([{"matching/cross_entropy": THIRD}] * 60 + [both] * 60)
    assert [re.search("The (\\w+) loss", message)[1] for _, message in told] == [
        "matching",
        "pairing",
    ]
    assert set(logged[1200]) == {"warnings/matching_prior"}


def test_the_metric_says_when_it_is_over_and_when_it_is_back():
    sick = {"average/distance": 0.0}
    told, logged = watch([sick] * 60 + [{}] * 60 + [sick] * 60)
    assert len(told) == 1
    name = "warnings/teacher_identical"
    assert [logged[step].get(name) for step in (500, 520, 600, 700, 1200, 1800)] == [
        None,
        1.0,
        1.0,
        0.0,
        0.0,
        1.0,
    ]


def test_the_warm_up_does_not_count():
    told, _ = watch([{"average/distance": 0.0}] * 100 + [{}] * 100, warmup_steps=700)
    assert told == []
    told, _ = watch([{"average/distance": 0.0}] * 200, warmup_steps=700)
    assert [step for step, _ in told] == [1210]


def test_a_run_that_logs_seldom_is_watched_too():
    told, _ = watch([{"average/distance": 0.0}] * 3, every=1000)
    assert [step for step, _ in told] == [2000]


def test_every_warning_has_its_section():
    headings = re.findall(r"^#+ (.*)$", TROUBLESHOOTING.read_text(), re.MULTILINE)
    # As GitHub makes anchors of headings.
    anchors = {re.sub(r"[^\w\- ]", "", title.lower()).replace(" ", "-") for title in headings}
    assert {symptom.name for symptom in SYMPTOMS} <= anchors


# --- Matching at its prior ------------------------------------------------------------------------


def test_the_prior_of_one_true_pair_in_three():
    np.testing.assert_allclose(prior_loss(1 / 3), 0.6365, atol=5e-5)
    np.testing.assert_allclose(prior_loss(0.5), log(2))
    assert prior_loss(0.0) == prior_loss(1.0) == 0.0


def test_a_loss_at_its_prior_is_told_through_noise():
    noise = np.random.default_rng(0).normal(scale=0.005, size=300)
    assert len(watch(matching(0.6365 + noise))[0]) == 1


@pytest.mark.parametrize(
    "losses",
    [
        np.linspace(0.7, 0.2, 300),  # learns
        np.concatenate([np.full(40, 0.6365), np.linspace(0.63, 0.3, 260)]),  # after a while
        np.full(49, 0.6365),  # too short to tell
        np.full(300, 0.55),
    ],
    ids=["learns", "learns_late", "short", "below"],
)
def test_a_loss_that_falls_is_not(losses):
    assert watch(matching(losses))[0] == []


def test_a_loss_that_falls_and_comes_back_is_told():
    told, _ = watch(matching(np.concatenate([np.full(60, 0.5), np.full(200, 0.637)])))
    assert len(told) == 1
    assert told[0][0] > 1000


def test_the_prior_follows_the_share_of_true_pairs():
    assert watch(matching(np.full(100, 0.6365), positives=0.5))[0] == []
    assert len(watch(matching(np.full(100, log(2)), positives=0.5))[0]) == 1


# --- What the step measures for it ----------------------------------------------------------------


def test_parameters_at_their_bounds():
    params = {
        "head": {"logit_scale": jnp.array(log(100.0)), "gate": jnp.array([0.0, 0.5, 1.0, 1.0])},
        "kernel": jnp.zeros(3),
    }
    rules = ((".*/logit_scale", (0.0, log(100.0))), (".*/gate", (-np.inf, 1.0)))
    assert at_bounds(rules, params) == {
        "head/logit_scale/at_lower_bound": 0.0,
        "head/logit_scale/at_upper_bound": 1.0,
        "head/gate/at_upper_bound": 0.5,
    }
    params["head"]["logit_scale"] = jnp.array(4.5)
    assert at_bounds(rules, params)["head/logit_scale/at_upper_bound"] == 0.0


# --- Provoked by training -------------------------------------------------------------------------

WORDS = ("red", "green", "blue", "black", "white", "pink", "gold", "cyan")


class Colours:
    """Eight plain pictures, each with its colour's name for a caption, four times over."""

    def __len__(self):
        return len(WORDS)

    def texts(self):
        return WORDS * 2

    def __getitem__(self, row):
        colour = np.random.default_rng(row).integers(0, 256, 3, np.uint8)
        return self.record(row, colour, " ".join([WORDS[row]] * 4))

    def record(self, row, colour, caption):
        image = np.tile(colour, (64, 64, 1)).astype(np.uint8)
        return {"image": image, "image_id": row, "name": str(row), "captions": [caption]}


class Grey(Colours):
    """The same grey picture eight times, with a word that nothing tells: 'red', mostly 'blue'."""

    def __getitem__(self, row):
        return self.record(row, (128, 128, 128), "blue" if row % 3 else "red")


@pytest.fixture
def raised(tiny_config, tmp_path, monkeypatch, caplog):
    """Trains the tiny recipe with changes; the names in `train/warnings/…`, each told as well."""

    def run(**changes):
        for source in (Colours, Grey):
            monkeypatch.setitem(SOURCES, source.__name__, lambda data, source=source: source())
        tiny_config.update_from_flattened_dict(
            {
                "total_steps": 60,
                "data.source": "Colours",
                "data.size": 0,
                "data.text_length": 6,
                "masking.words": 0.3,
                "optimizer.learning_rate": 1e-2,
                "optimizer.schedule.warmup_steps": 20,
                "log.warn_after": 20,
            }
            | changes
        )
        train.train(tiny_config, tmp_path)
        lines = map(json.loads, (tmp_path / "metrics.jsonl").read_text().splitlines())
        names = {name for line in lines for name, value in line.items() if "/warnings/" in name}
        names = {name.removeprefix("train/warnings/") for name in names}
        told = re.findall(r"troubleshooting\.md#(\w+)", caplog.text)
        assert sorted(told) == sorted(names)
        return names

    return run


@pytest.mark.slow
def test_a_run_that_learns_is_told_nothing(raised):
    assert raised() == set()


@pytest.mark.slow
def test_pictures_that_are_all_the_same(raised):
    found = raised(**{"data.source": "Grey", "masking.words": 1.0})
    assert found == {"matching_prior", "masked_language_unigram", "collapsed"}


@pytest.mark.slow
def test_settings_that_hold_a_run_back(raised):
    """A scale that can hardly move, a queue for a thousand batches, an average of one step."""
    found = raised(
        **{
            "optimizer.bounds": ((".*/logit_scale", (2.64, 2.68)),),  # it starts at 2.66
            "objectives.contrastive.weight": 0.0,
            "objectives.momentum_contrastive.weight": 1.0,
            "objectives.momentum_contrastive.distill": 0.0,
            "objectives.momentum_contrastive.queue_size": 8000,
            "optimizer.ema_decay": 1e-6,
        }
    )
    assert found == {"logit_scale_bound", "queue_initial", "teacher_identical"}
