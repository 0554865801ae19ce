"""The choice of objectives by a config, and what is made of their losses."""

import jax.numpy as jnp
import pytest
from flax import nnx

from mmjax.errors import InputError
from mmjax.models import build_model
from mmjax.objectives import OBJECTIVES, Task, build_objectives
from mmjax.objectives.loss import Loss
from mmjax.schema import section
from tests.models.reference import tiny_model
from tests.objectives.fakes import FakeTokenizer

OFF = {name: section(cls) for name, cls in OBJECTIVES.items()}


def built(changes, **model):
    """Of the defaults, with some options changed, for a tiny model."""
    config = tiny_model(**model)
    model = nnx.eval_shape(lambda: build_model(config, nnx.Rngs(0)))
    options = {name: {**OFF.get(name, {}), **changes.get(name, {})} for name in {**OFF, **changes}}
    return build_objectives(options, model)


def test_objectives_with_a_weight_are_built():
    changes = {
        "contrastive": {"weight": 2.0},
        "matching": {"weight": 0.5, "negatives": "random"},
        "answering": {"weight": 1.0},
    }
    objectives = built(changes, answers=("yes",))
    assert {name: objective.weight for name, objective in objectives.items()} == {
        "contrastive": 2.0,
        "matching": 0.5,
        "answering": 1.0,
    }
    assert objectives["matching"].negatives == "random"


@pytest.mark.parametrize(
    ("changes", "model", "words"),
    [
        ({}, {}, "nothing to train"),
        ({"contrastiv": {"weight": 1.0}}, {}, "objectives.contrastiv is unknown"),
        ({"contrastive": {"wieght": 1.0}}, {}, "objectives.contrastive.wieght"),
        (
            {"contrastive": {"weight": 1.0}},
            {"embedding_width": 0, "matching": False},
            "model.embedding_width",
        ),
        ({"matching": {"weight": 1.0}}, {"embedding_width": 0}, "model.embedding_width"),
        ({"matching": {"weight": 1.0}}, {"matching": False}, "model.matching"),
        ({"matching": {"weight": 1.0, "negatives": "hrd"}}, {}, "'hrd'"),
        (
            {"masked_language": {"weight": 1.0}},
            {"masked_language": False},
            "model.masked_language",
        ),
        ({"answering": {"weight": 1.0}}, {}, "model.answers"),
    ],
    ids=str,
)
def test_objectives_that_cannot_be_are_refused(changes, model, words):
    with pytest.raises(InputError) as error:
        built(changes, **model)
    assert words in str(error.value)


def test_the_total_is_the_weighted_sum_of_means():
    objectives = built({"contrastive": {"weight": 2.0}, "masked_language": {"weight": 3.0}})
    losses = {
        "contrastive": Loss(jnp.array(8.0), jnp.array(4.0)),
        "masked_language": Loss(jnp.array(6.0), jnp.array(12.0)),
    }
    weights = {name: loss.weight for name, loss in losses.items()}
    graph = nnx.split(nnx.eval_shape(lambda: build_model(tiny_model(), nnx.Rngs(0))))[0]
    task = Task(graph, objectives, FakeTokenizer())
    assert task.total(losses, weights) == 2 * 8 / 4 + 3 * 6 / 12


@pytest.mark.parametrize("name", OBJECTIVES)
def test_every_objective_says_what_it_is(name):
    assert OBJECTIVES[name].formula
    assert OBJECTIVES[name].source
    assert OBJECTIVES[name]().weight == 0


def test_a_field_that_the_data_do_not_give_is_told_with_its_key():
    batch = {"image": 0, "text": 0, "regions": 0, "boxes": 0, "region_mask": 0}
    labels = OBJECTIVES["region_labels"](weight=1.0)
    with pytest.raises(InputError, match=r"reads 'region_labels', .* set data\.regions"):
        labels.check_batch("region_labels", batch)
    labels.check_batch("region_labels", batch | {"region_labels": 0})
    with pytest.raises(InputError, match=r"data\.task='questions'"):
        OBJECTIVES["answering"](weight=1.0).check_batch("answering", batch)
