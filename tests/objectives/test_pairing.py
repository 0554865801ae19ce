"""Matching with one pair an example."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from jax.sharding import AxisType

from mmjax.errors import InputError
from mmjax.models.oscar import Oscar, OscarConfig
from mmjax.models.regions import StreamConfig
from mmjax.objectives.pairing import Pairing, draw_pairs
from mmjax.sharding import make_mesh, to_device
from tests.models.reference import assert_close
from tests.objectives.region_models import FAMILIES, TEXT, batch, features, parts_of
from tests.objectives.test_transport import plain_distance

KEY = jax.random.key(3)
IMAGE_SIDE = ("regions", "boxes", "region_mask")
TEXT_SIDE = ("text", "text_mask")


def draw(given, key=KEY):
    """Partners, whether they are true, and which examples count."""
    return [np.asarray(x) for x in draw_pairs(features("uniter", given), key)]


def outputs(family, given, partner, replaces):
    """The whole model's, of the pairs that were drawn."""
    inputs = {name: given[name] for name in (*TEXT_SIDE, *IMAGE_SIDE)}
    if family == "visualbert":
        del inputs["boxes"]
    side = TEXT_SIDE if replaces == "text" else IMAGE_SIDE
    inputs |= {name: inputs[name][partner] for name in side if name in inputs}
    return inputs, nnx.merge(*parts_of(family))(**inputs)


def cross_entropy(logits, labels):
    x = np.asarray(logits, np.float64)
    log_p = x - np.log(np.exp(x).sum(axis=1, keepdims=True))
    return -log_p[np.arange(len(x)), labels.astype(int)]


@pytest.mark.parametrize("replaces", ["text", "image"])
@pytest.mark.parametrize("family", ["uniter", "lxmert", "vl_bert", "visualbert"])
def test_agrees_with_plain_cross_entropy(family, replaces):
    given = batch(rows=8)
    partner, true, counted = draw(given)
    assert 0 < true[counted].sum() < counted.sum()
    _, out = outputs(family, given, partner, replaces)
    names = ("itm_logits", "cross_relationship_score", "seq_relationship_logits")
    logits = next(out[name] for name in names if name in out)
    labels = ~true if family == "visualbert" else true  # there the second class is that of no
    loss = Pairing(replaces=replaces)(features(family, given), KEY)
    expected = cross_entropy(logits, labels)[counted].sum()
    np.testing.assert_allclose(loss.total, expected, rtol=1e-5)
    assert loss.weight == counted.sum()
    hits, weight = loss.metrics["pairing/accuracy"]
    found = (np.asarray(logits).argmax(axis=1) == labels)[counted]
    assert (hits, weight) == (found.sum(), counted.sum())
    total, weight = loss.metrics["pairing/positives"]
    assert (total, weight) == (true[counted].sum(), counted.sum())


def test_all_pollution_is_one_class():
    given = batch(rows=8)
    partner, true, counted = draw(given)
    logits = np.asarray(outputs("oscar", given, partner, "text")[1]["contrast_logits"], np.float64)
    p = np.exp(logits) / np.exp(logits).sum(axis=1, keepdims=True)
    expected = -np.log(np.where(true, p[:, 0], p[:, 1] + p[:, 2]))[counted].sum()
    found = Pairing()(features("oscar", given), KEY).total
    np.testing.assert_allclose(found, expected, rtol=1e-5)


@pytest.mark.parametrize("family", ["uniter", "lxmert", "oscar"])
def test_transport_draws_true_pairs_together_and_false_ones_apart(family):
    given = batch(rows=8)
    partner, true, counted = draw(given)
    inputs, out = outputs(family, given, partner, "image")
    words, regions = (
        next(np.asarray(out[name]) for name in names if name in out)
        for names in (("sequence_output", "language_output"), ("region_output", "vision_output"))
    )
    distance = plain_distance(words, regions, inputs["text_mask"], inputs["region_mask"])
    signed = np.where(true, distance, -distance)[counted].sum()
    plain, moved = (
        Pairing(replaces="image", transport=weight)(features(family, given), KEY)
        for weight in (0.0, 0.1)
    )
    np.testing.assert_allclose(moved.total - plain.total, 0.1 * signed, atol=2e-5)
    assert moved.weight == plain.weight
    total, weight = moved.metrics["pairing/transport"]
    np.testing.assert_allclose(total, signed, rtol=1e-4)
    assert weight == counted.sum()


def test_half_of_the_pairs_are_false_and_any_other_picture_may_be_the_partner():
    given = batch(rows=8)
    rows = np.arange(8)
    model = features("uniter", given)
    draw_again = jax.jit(lambda key: draw_pairs(model, key))
    drawn = [draw_again(jax.random.key(seed)) for seed in range(300)]
    partners, true, counted = (np.stack(x) for x in zip(*drawn, strict=True))
    assert not counted[:, 3].any()
    assert counted[:, rows != 3].all()
    share = true[:, rows != 3]
    assert abs(share.mean() - 0.5) < 5 * 0.5 / share.size**0.5
    assert (partners == rows)[true].all()
    false = ~true & counted
    assert (given["image_id"][partners] != given["image_id"])[false].all()
    for row in (0, 4):
        found = np.bincount(partners[:, row][false[:, row]], minlength=8)
        others = given["valid"] & (given["image_id"] != given["image_id"][row])
        assert not found[~others].any()
        expected = found.sum() / others.sum()
        statistic = ((found[others] - expected) ** 2 / expected).sum()
        assert statistic < 27.9  # the 0.9999 quantile for 6 degrees of freedom


def test_what_is_drawn_belongs_to_examples_not_to_rows():
    given = batch(rows=8)
    order = np.random.default_rng(0).permutation(8)
    partner, true, counted = draw(given)
    moved, moved_true, moved_counted = draw({name: x[order] for name, x in given.items()})
    np.testing.assert_array_equal(moved_true, true[order])
    np.testing.assert_array_equal(moved_counted, counted[order])
    index = given["index"]
    found, expected = index[order][moved], index[partner][order]
    np.testing.assert_array_equal(found[moved_counted], expected[moved_counted])


def test_invalid_rows_change_nothing():
    given, noisy = batch(rows=8), batch(rows=8)
    for name in (*TEXT_SIDE, *IMAGE_SIDE):
        noisy[name][3] = noisy[name][4]
    noisy["index"][3], noisy["image_id"][3] = 4321, 77
    for replaces in ("text", "image"):
        objective = Pairing(replaces=replaces, transport=0.5)
        loss, again = (objective(features("uniter", b), KEY) for b in (given, noisy))
        np.testing.assert_allclose(again.total, loss.total, rtol=1e-6)
        assert again.weight == loss.weight == 7


def test_a_batch_of_one_picture_has_no_false_pairs():
    given = batch(rows=8)
    given["image_id"][:] = 5
    _, true, counted = draw(given)
    np.testing.assert_array_equal(counted, true & given["valid"])
    loss = Pairing(transport=0.1)(features("uniter", given), KEY)
    assert loss.weight == counted.sum()
    assert np.isfinite(loss.total)
    nothing = Pairing()(features("uniter", given | {"valid": np.zeros(8, bool)}), KEY)
    assert (nothing.total, nothing.weight) == (0, 0)


@pytest.mark.parametrize("objective", [Pairing(), Pairing(replaces="image", transport=0.1)])
def test_eight_devices_compute_what_one_does(objective):
    given = batch(rows=16)
    params = parts_of("uniter")[1]

    def mean(params, batch):
        seen = features("uniter", batch, params=params)
        loss = objective(seen, KEY)
        return loss.total / loss.weight, loss.metrics

    results = []
    for mesh in (
        jax.make_mesh(
            (1, 1, 1),
            ("data", "fsdp", "tensor"),
            (AxisType.Auto,) * 3,
            devices=jax.devices()[:1],
        ),
        make_mesh(data=4, fsdp=2),
    ):
        with jax.set_mesh(mesh):
            step = jax.jit(jax.value_and_grad(mean, has_aux=True))
            results.append(jax.device_get(step(params, to_device(given, mesh))))
    assert_close(results[1], results[0])


def test_a_model_must_have_the_head():
    for family in FAMILIES:
        Pairing().check("mine", nnx.merge(*parts_of(family)))
    config = OscarConfig(StreamConfig(**TEXT))
    for config, complaint in (
        (OscarConfig(StreamConfig(**TEXT)), "set model.matching"),
        (OscarConfig(StreamConfig(**TEXT), matching=True), None),
    ):
        model = nnx.eval_shape(lambda config=config: Oscar(config, nnx.Rngs(0)))
        if complaint is None:
            Pairing().check("mine", model)
            continue
        with pytest.raises(InputError, match=complaint):
            Pairing().check("mine", model)
    with pytest.raises(InputError, match=r"objectives\.mine\.replaces is 'texts'.*text"):
        Pairing(replaces="texts").check("mine", nnx.merge(*parts_of("uniter")))


def test_a_head_of_retrieval_says_it_itself():
    config = OscarConfig(StreamConfig(**TEXT), region_width=6, matching=True, contrasts=3)
    model = Oscar(config, nnx.Rngs(0))
    inputs = {name: jnp.array(batch()[name]) for name in (*TEXT_SIDE, *IMAGE_SIDE)}
    words = model.encode_text(inputs["text"], inputs["text_mask"])
    image = model.encode_image(*(inputs[name] for name in IMAGE_SIDE))
    expected = model(**inputs)["itm_logits"]
    np.testing.assert_allclose(model.match(model.fuse(image, words)), expected, atol=1e-6)
