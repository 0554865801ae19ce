"""Masked region modelling, and the models that do it."""

from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from mmjax.errors import InputError
from mmjax.models.lxmert import Lxmert
from mmjax.objectives.masked_regions import (
    RegionAttributes,
    RegionDistributions,
    RegionFeatures,
    RegionLabels,
    kl_divergence,
    smooth_l1,
    squared_error,
)
from tests.objectives.region_models import FAMILIES, batch, features, parts_of

KEY = jax.random.key(0)

# ---- the formulas


def regions(width=7, seed=0):
    return 2 * np.random.default_rng(seed).normal(size=(2, 3, 4, width)).astype(np.float32)


def plain_smooth_l1(found, target):
    """Girshick 2015, equation 3, number by number."""
    parts = [
        0.5 * d * d if abs(d) < 1 else abs(d) - 0.5
        for d in (found - target).astype(np.float64).ravel()
    ]
    return np.reshape(parts, found.shape).mean(axis=-1)


def log_softmax(x):
    x = x.astype(np.float64)
    return x - np.log(np.exp(x).sum(axis=-1, keepdims=True))


def plain_kl(logits, target):
    log_p, target = log_softmax(logits), target.astype(np.float64)
    terms = np.where(target > 0, target * (np.log(np.maximum(target, 1e-300)) - log_p), 0)
    return terms.sum(axis=-1)


def test_distances_of_features():
    found, target = regions()
    expected = ((found - target).astype(np.float64) ** 2).mean(axis=-1)
    given = jnp.array(found), jnp.array(target)
    np.testing.assert_allclose(squared_error(*given), expected, rtol=1e-5)
    np.testing.assert_allclose(smooth_l1(*given), plain_smooth_l1(found, target), rtol=1e-5)


def test_divergence_of_classes():
    logits, target = regions()
    target = np.exp(log_softmax(target)).astype(np.float32)
    target[0, 0] = np.eye(7)[3]
    x, q = jnp.array(logits), jnp.array(target)
    np.testing.assert_allclose(kl_divergence(x, q), plain_kl(logits, target), rtol=1e-5)
    np.testing.assert_allclose(kl_divergence(x, jax.nn.softmax(x)), 0, atol=1e-6)
    gradient = jax.grad(lambda x: kl_divergence(x, q).sum())(x)
    np.testing.assert_allclose(gradient, np.exp(log_softmax(logits)) - target, atol=1e-6)


# ---- the objectives

TASKS = {
    "uniter-features": ("uniter", RegionFeatures(), "region_features"),
    "uniter-labels": ("uniter", RegionLabels(), "region_logits"),
    "uniter-distributions": ("uniter", RegionDistributions(), "region_logits"),
    "lxmert-features": ("lxmert", RegionFeatures(distance="smooth_l1"), "region_features"),
    "lxmert-labels": ("lxmert", RegionLabels(hidden=False), "object_logits"),
    "lxmert-attributes": ("lxmert", RegionAttributes(), "attribute_logits"),
    "vl_bert-distributions": ("vl_bert", RegionDistributions(), "region_logits"),
}


def plain_loss(objective, said, given):
    """Of every region, in plain numpy."""
    if isinstance(objective, RegionFeatures):
        if objective.distance == "smooth_l1":
            return plain_smooth_l1(said, given["regions"])
        return ((said - given["regions"]).astype(np.float64) ** 2).mean(axis=-1)
    if isinstance(objective, RegionDistributions):
        return plain_kl(said, given["region_distributions"])
    labels = given[objective.target]
    return -np.take_along_axis(log_softmax(said), labels[..., None], axis=-1)[..., 0]


@pytest.mark.parametrize("task", TASKS)
def test_is_the_mean_over_hidden_regions(task):
    family, objective, output = TASKS[task]
    given = batch()
    seen = features(family, given)
    loss, chosen = objective(seen, KEY), np.asarray(seen.regions_masked.chosen)
    present = given["region_mask"] & given["valid"][:, None]
    assert 0 < chosen.sum() < present.sum()
    assert not chosen[~present].any()
    # The whole model, called from outside.
    inputs = {name: given[name] for name in ("text", "text_mask", "boxes", "region_mask")}
    hidden = {"regions": np.where(chosen[..., None], 0, given["regions"])}
    masked = {} if family == "lxmert" else {"region_masked": chosen}
    said = np.asarray(seen.model(**inputs, **hidden, **masked)[output])
    asked = present if task == "lxmert-labels" else chosen
    assert loss.weight == asked.sum()
    np.testing.assert_allclose(
        loss.total, plain_loss(objective, said, given)[asked].sum(), rtol=2e-5
    )
    if not isinstance(objective, RegionFeatures):
        target = objective.fields[-1]
        best = given[target].argmax(axis=-1) if target.endswith("ons") else given[target]
        total, weight = loss.metrics[f"{target}/accuracy"]
        assert (total, weight) == ((said.argmax(axis=-1) == best)[asked].sum(), asked.sum())
        assert loss.scores[0].shape == said.shape
        np.testing.assert_array_equal(loss.scores[1], asked)


@pytest.mark.parametrize("task", TASKS)
def test_padding_and_invalid_rows_change_nothing(task):
    family, objective, _ = TASKS[task]
    given, noisy = batch(), batch()
    absent = ~(given["region_mask"] & given["valid"][:, None])
    for name in ("regions", "boxes", "region_labels", "region_attributes", "region_distributions"):
        noisy[name][absent] = 1
    noisy["text"][~(given["text_mask"] & given["valid"][:, None])] = 9
    loss, again = (objective(features(family, b), KEY) for b in (given, noisy))
    np.testing.assert_allclose(again.total, loss.total, rtol=1e-5)
    assert again.weight == loss.weight
    nothing = objective(features(family, given | {"valid": np.zeros(6, bool)}), KEY)
    assert (nothing.total, nothing.weight) == (0, 0)


def test_confidences_weight_labels():
    """The sum, and not what it is divided by."""
    given = batch()
    confidence = np.random.default_rng(1).random((6, 5)).astype(np.float32)
    for cls, family, output in (
        (RegionLabels, "lxmert", "object_logits"),
        (RegionAttributes, "lxmert", "attribute_logits"),
    ):
        objective = cls()
        seen = features(family, given | {f"{cls.target}_confidence": confidence})
        loss, chosen = objective(seen, KEY), np.asarray(seen.regions_masked.chosen)
        said = seen.model.score_regions(seen.regions_masked.fused.image_tokens)[output]
        expected = (confidence * plain_loss(objective, np.asarray(said), given))[chosen].sum()
        np.testing.assert_allclose(loss.total, expected, rtol=1e-5)
        assert loss.weight == chosen.sum()


def test_regions_without_a_target_are_not_asked_for():
    given = batch()
    seen = features("uniter", given)
    chosen = np.array(seen.regions_masked.chosen)
    row, region = np.argwhere(chosen)[0]
    given["region_labels"][row, region] = -1
    given["region_distributions"][row, region] = 0
    chosen[row, region] = False
    for objective in (RegionLabels(), RegionDistributions()):
        loss, gradient = _loss_and_gradient(objective, "uniter", given)
        said = seen.model.score_regions(seen.regions_masked.fused.image_tokens)["region_logits"]
        assert loss.weight == chosen.sum()
        expected = plain_loss(objective, np.asarray(said), given)[chosen].sum()
        np.testing.assert_allclose(loss.total, expected, rtol=1e-5)
        assert all(np.isfinite(leaf).all() for leaf in jax.tree.leaves(gradient))


def _loss_and_gradient(objective, family, given):
    def total(params):
        loss = objective(features(family, given, params=params), KEY)
        return loss.total, loss

    gradient, loss = jax.jit(jax.grad(total, has_aux=True))(parts_of(family)[1])
    return loss, gradient


def test_words_and_regions_may_be_hidden_at_once():
    """Regions are then told from what is left of the text."""
    given = batch()
    seen = features("uniter", given, {"regions": 0.5, "conditional": False})
    words = jnp.where(jnp.arange(7) == 1, 4, jnp.array(given["text"]))
    seen.__dict__["_masked_text"] = words, words == 4
    alone = features("uniter", given | {"text": np.asarray(words)})
    expected = RegionLabels()(alone, KEY).total
    np.testing.assert_allclose(RegionLabels()(seen, KEY).total, expected, rtol=1e-5)
    assert expected != RegionLabels()(features("uniter", given), KEY).total


def test_regions_are_hidden_beside_codes_of_patches():
    """A model of regions has no use for the codes, and must not see what it is to guess."""
    given = batch()
    expected = RegionLabels()(features("uniter", given), KEY).total
    codes = given | {"image_codes": np.zeros((len(given["index"]), 4), np.int32)}
    np.testing.assert_allclose(RegionLabels()(features("uniter", codes), KEY).total, expected)


@pytest.mark.parametrize(
    ("family", "objective", "words"),
    [
        (
            "oscar",
            RegionLabels(),
            r"objectives\.mine needs region_logits or object_logits.*nothing",
        ),
        ("vl_bert", RegionFeatures(), "needs region_features.*is: region_logits"),
        ("uniter", RegionAttributes(), "needs attribute_logits.*region_features, region_logits"),
        ("uniter", RegionFeatures(distance="l1"), "distance is 'l1'.*smooth_l1"),
    ],
)
def test_a_model_must_have_the_head(family, objective, words):
    with pytest.raises(InputError, match=words):
        objective.check("mine", nnx.merge(*parts_of(family)))


def test_heads_that_are_there_will_do():
    for family, objective, _ in TASKS.values():
        objective.check("mine", nnx.merge(*parts_of(family)))
    config = replace(FAMILIES["lxmert"][1], region_features=False, region_attributes=0)
    model = nnx.eval_shape(lambda: Lxmert(config, nnx.Rngs(0)))
    RegionLabels().check("mine", model)
    for objective in (RegionFeatures(), RegionAttributes()):
        with pytest.raises(InputError, match="is: object_logits"):
            objective.check("mine", model)


# ---- the models


@pytest.mark.parametrize("family", FAMILIES)
def test_what_is_hidden_is_not_seen(family):
    given = batch()
    seen = features(family, given)
    chosen = np.asarray(seen.regions_masked.chosen)
    moved = given | {"regions": given["regions"] + 3 * chosen[..., None].astype(np.float32)}
    again = features(family, moved)
    np.testing.assert_array_equal(again.regions_masked.chosen, chosen)
    for found, expected in zip(
        jax.tree.leaves(again.regions_masked.fused),
        jax.tree.leaves(seen.regions_masked.fused),
        strict=True,
    ):
        np.testing.assert_array_equal(found, expected)
    plain = seen.fused.text_tokens[given["text_mask"]]
    assert np.abs(again.fused.text_tokens[given["text_mask"]] - plain).max() > 1e-2
    assert np.abs(seen.regions_masked.fused.pooled - seen.fused.pooled).max() > 1e-3


@pytest.mark.parametrize("family", FAMILIES)
def test_phases_and_scores_are_those_of_the_whole_model(family):
    given = batch()
    seen = features(family, given)
    model, fused = seen.model, seen.fused
    boxes = {} if family == "visualbert" else {"boxes": given["boxes"]}
    inputs = {name: given[name] for name in ("text", "text_mask", "regions", "region_mask")}
    out = model(**inputs, **boxes)

    def found(*names):
        return next(out[name] for name in names if name in out)

    words = found("mlm_logits", "prediction_logits")[:, :7]
    np.testing.assert_allclose(model.score_words(fused.text_tokens), words, atol=1e-5)
    answers = found("vqa_logits", "question_answering_score", "logits")
    np.testing.assert_allclose(model.score_answers(fused), answers, atol=1e-5)
    matches = model.match(fused)
    assert matches.shape == (6, 2)
    if family == "visualbert":
        np.testing.assert_allclose(matches[:, ::-1], out["seq_relationship_logits"], atol=1e-5)
    elif family == "oscar":
        p = np.exp(log_softmax(np.asarray(out["contrast_logits"])))
        expected = np.stack([p[:, 1] + p[:, 2], p[:, 0]], axis=1)
        np.testing.assert_allclose(jax.nn.softmax(matches), expected, atol=1e-5)
    else:
        expected = found("itm_logits", "cross_relationship_score")
        np.testing.assert_allclose(matches, expected, atol=1e-5)
    if hasattr(model, "region_heads") and model.region_heads:
        said = model.score_regions(fused.image_tokens)
        assert said.keys() == model.region_heads.keys()
        for name, scores in said.items():
            assert scores.shape[:2] == given["regions"].shape[:2]
            np.testing.assert_allclose(scores, out[name], atol=1e-5, err_msg=name)
    patches, tokens = model.aligned(seen.image, seen.text)
    assert (patches.shape, tokens.shape) == (fused.image_tokens.shape[:2], (6, 7))


def test_the_whole_picture_is_the_mean_of_what_is_seen_of_it():
    """As if it had been given."""
    given = batch()
    seen = features("vl_bert", given)
    chosen = np.asarray(seen.regions_masked.chosen)
    there = given["region_mask"] & ~chosen
    means = [
        row[keep].mean(axis=0) if keep.any() else np.zeros(6)
        for row, keep in zip(given["regions"], there, strict=True)
    ]
    with_it = {
        "regions": np.concatenate([np.stack(means)[:, None], given["regions"]], axis=1),
        "boxes": np.concatenate([np.tile([0, 0, 1, 1], (6, 1, 1)), given["boxes"]], axis=1),
    }
    with_it = {name: array.astype(np.float32) for name, array in with_it.items()}
    for name, array, first in (
        ("region_mask", given["region_mask"], True),
        ("region_masked", chosen, False),
    ):
        with_it[name] = np.concatenate([np.full((6, 1), first), array], axis=1)
    model, config = FAMILIES["vl_bert"]
    config = replace(config, whole_picture=False)
    graph = nnx.split(nnx.eval_shape(lambda: model(config, nnx.Rngs(0))))[0]
    words = {name: given[name] for name in ("text", "text_mask")}
    expected = nnx.merge(graph, parts_of("vl_bert")[1])(**words, **with_it)
    fused = seen.regions_masked.fused
    np.testing.assert_allclose(fused.text_tokens, expected["sequence_output"], atol=1e-5)
    np.testing.assert_allclose(fused.image_tokens, expected["region_output"], atol=1e-5)
    found = seen.model.score_regions(fused.image_tokens)["region_logits"]
    np.testing.assert_allclose(found, expected["region_logits"][:, 1:], atol=1e-5)
