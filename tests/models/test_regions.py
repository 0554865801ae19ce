"""What UNITER, Oscar and VL-BERT have in common: words and regions in one stream."""

from dataclasses import replace
from functools import cache

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from mmjax.errors import InputError
from mmjax.models.oscar import Oscar, OscarConfig
from mmjax.models.regions import StreamConfig, box_numbers, box_waves, check_regions
from mmjax.models.uniter import Uniter, UniterConfig
from mmjax.models.vl_bert import VlBert, VlBertConfig, VlBertTextConfig
from tests.models import reference

WORDS, FEATURES = 30, 6
LAYERS = {"width": 24, "depth": 2, "heads": 3, "mlp_width": 20, "epsilon": 1e-6}
TEXT = {**LAYERS, "vocabulary_size": WORDS, "max_length": 16}
HEADS = {"region_width": FEATURES, "masked_language": True, "answers": ("no", "yes", "blue")}
REGION_HEADS = {"region_classes": 5, "matching": True}

FAMILIES = {
    "uniter": (
        Uniter,
        UniterConfig(
            StreamConfig(**TEXT), **HEADS, **REGION_HEADS, region_features=True, ranking=True
        ),
    ),
    "oscar": (
        Oscar,
        OscarConfig(StreamConfig(**TEXT), **HEADS, contrasts=3, classifier="mlp"),
    ),
    "oscar-norm": (
        Oscar,
        OscarConfig(StreamConfig(**TEXT, activation="relu"), **HEADS, region_epsilon=1e-3),
    ),
    "vl_bert": (
        VlBert,
        VlBertConfig(VlBertTextConfig(**TEXT), **HEADS, **REGION_HEADS, box_width=4),
    ),
}


@cache
def parameters(name):
    model, config = FAMILIES[name]
    return reference.split(lambda: model(config, nnx.Rngs(0)))


def build(name, **layers):
    """The model; `layers` changes fields of its layers, and no parameter."""
    model, config = FAMILIES[name]
    config = replace(config, text=replace(config.text, **layers))
    graph = nnx.split(nnx.eval_shape(lambda: model(config, nnx.Rngs(0))))[0]
    return nnx.merge(graph, parameters(name)[1])


def batch(lengths=(7, 4, 5), counts=(3, 5, 4), seed=0):
    rng = np.random.default_rng(seed)
    rows, length, count = len(lengths), max(lengths), max(counts)
    corners = np.sort(rng.uniform(size=(rows, count, 2, 2)), axis=2)
    mask = np.arange(length) < np.array(lengths)[:, None]
    return {
        "text": np.where(mask, rng.integers(1, WORDS, (rows, length)), 0),
        "text_mask": mask,
        "text_type": np.broadcast_to(np.arange(length) > 2, (rows, length)).astype(np.int32),
        "regions": rng.normal(size=(rows, count, FEATURES)).astype(np.float32),
        "boxes": corners.reshape(rows, count, 4).astype(np.float32),
        "region_mask": np.arange(count) < np.array(counts)[:, None],
    }


def of_masks(name, output, inputs):
    """An output, where its positions are those of words or regions that are there."""
    for kind, mask in (("sequence", "text_mask"), ("mlm", "text_mask"), ("region", "region_mask")):
        if name.startswith(kind):
            return np.asarray(output)[inputs[mask]]
    return np.asarray(output)


# ---- the papers


def embedded_words(p, inputs):
    tables = p["text_embeddings"]
    x = tables["token_embedding"]["embedding"][inputs["text"]]
    x = x + tables["position_embedding"]["embedding"][: inputs["text"].shape[1]]
    return x + tables["type_embedding"]["embedding"][inputs["text_type"]]


def sides(boxes):
    return boxes[..., 2:] - boxes[..., :2]


def uniter_stream(p, config, inputs):
    """Chen et al. 2020, section 3.1, in which seven numbers describe a place."""
    text, image, boxes = p["text_embeddings"], p["region_embeddings"], inputs["boxes"]
    width, height = np.moveaxis(sides(boxes), -1, 0)
    place = np.concatenate([boxes, sides(boxes), (width * height)[..., None]], axis=-1)
    seen, placed = (
        reference.layer_norm(reference.dense(x, image[name]), image[f"{name}_norm"], config.epsilon)
        for name, x in (("features", inputs["regions"]), ("box", place))
    )
    regions = seen + placed + text["type_embedding"]["embedding"][1]
    words = reference.layer_norm(embedded_words(p, inputs), text["norm"], config.epsilon)
    return words, reference.layer_norm(regions, image["norm"], config.epsilon)


def oscar_stream(p, config, inputs):
    """Li et al. 2020, section 3: features with six numbers behind them, in one projection."""
    image, boxes = p["region_embeddings"], inputs["boxes"]
    features = np.concatenate([inputs["regions"], boxes, sides(boxes)], axis=-1)
    regions = reference.dense(features, image["projection"])
    if "norm" in image:
        regions = reference.layer_norm(regions, image["norm"], 1e-3)
    norm = p["text_embeddings"]["norm"]
    return reference.layer_norm(embedded_words(p, inputs), norm, config.epsilon), regions


def waves(box):
    """The published code's description of one box, number by number."""
    x1, y1, x2, y2 = box
    numbers = []
    for place in ((x1 + x2) / 2, (y1 + y2) / 2, x2 - x1, y2 - y1):
        for function in (np.sin, np.cos):
            numbers += [function(100 * place / 1000 ** (i / 4)) for i in range(4)]
    return numbers


def vl_bert_stream(p, config, inputs):
    """Su et al. 2020, section 3.2: everything is of a word, something seen, a type, a position."""
    text, image = p["text_embeddings"], p["region_embeddings"]
    places = np.array([[waves(box) for box in row] for row in inputs["boxes"].astype(np.float64)])
    features = np.concatenate([places, inputs["regions"]], axis=-1)
    seen = np.maximum(reference.dense(features, image["projection"]), 0)
    words = embedded_words(p, inputs)
    words += reference.layer_norm(seen[:, :1], p["picture_norm"], config.epsilon)
    regions = image["word"] + reference.layer_norm(seen, image["norm"], config.epsilon)
    lengths, positions = inputs["text_mask"].sum(axis=1), text["position_embedding"]["embedding"]
    regions = np.concatenate(
        [regions + positions[lengths][:, None], (p["end"] + positions[lengths + 1])[:, None]],
        axis=1,
    )
    regions += text["type_embedding"]["embedding"][2]
    return tuple(reference.layer_norm(x, text["norm"], config.epsilon) for x in (words, regions))


STREAMS = {
    "uniter": uniter_stream,
    "oscar": oscar_stream,
    "oscar-norm": oscar_stream,
    "vl_bert": vl_bert_stream,
}


@pytest.mark.parametrize("name", [name for name in FAMILIES if name != "oscar-norm"])
def test_agrees_with_the_paper(name):
    inputs, config = batch(), FAMILIES[name][1].text
    p = reference.in_float64(parameters(name)[1])
    words, regions = STREAMS[name](p, config, inputs)
    mask = np.concatenate([inputs["text_mask"], inputs["region_mask"]], axis=1)
    x = np.concatenate([words, regions], axis=1)
    end = np.ones((len(x), x.shape[1] - mask.shape[1]), bool)  # that VL-BERT adds
    mask = np.concatenate([mask, end], axis=1)
    for layer in reference.layers_of(p["fusion"]["blocks"], config.depth):
        x = reference.attention_sublayer(x, None, layer["self_attention"], mask, config)
        x = reference.mlp_sublayer(x, layer["mlp"], config)
    out = build(name)(**inputs)
    length, count = inputs["text"].shape[1], inputs["regions"].shape[1]
    for output, expected in (
        ("sequence_output", x[:, :length]),
        ("region_output", x[:, length : length + count]),
        ("pooled_output", np.tanh(reference.dense(x[:, 0], p["fusion"]["pooler"]))),
    ):
        found = of_masks(output, out[output], inputs)
        np.testing.assert_allclose(found, of_masks(output, expected, inputs), atol=5e-5)


def test_regions_may_be_normalised():
    """And that is all that differs below the layers."""
    inputs, config = batch(), FAMILIES["oscar-norm"][1].text
    p = reference.in_float64(parameters("oscar-norm")[1])
    _, expected = oscar_stream(p, config, inputs)
    regions, boxes = jnp.array(inputs["regions"]), jnp.array(inputs["boxes"])
    found = build("oscar-norm").encode_image(regions, boxes).tokens
    np.testing.assert_allclose(found, expected, atol=1e-5)


# ---- what is true of all


@pytest.mark.parametrize("name", FAMILIES)
def test_padding_changes_nothing(name):
    model, inputs = build(name), batch()
    padded = {}
    for key, array in inputs.items():
        widths = [(0, 0), (0, 4)] + [(0, 0)] * (array.ndim - 2)
        padded[key] = np.pad(array, widths, constant_values=0 if "mask" in key else 1)
    expected, found = model(**inputs), model(**padded)
    assert expected.keys() == found.keys()
    for key, value in expected.items():
        np.testing.assert_allclose(
            of_masks(key, found[key], padded), of_masks(key, value, inputs), atol=2e-5, err_msg=key
        )


@pytest.mark.parametrize("name", FAMILIES)
def test_regions_come_in_any_order(name):
    """But for the first, which is VL-BERT's whole picture."""
    model, inputs = build(name), batch(counts=(5, 5, 5))
    order = [0, 3, 1, 4, 2]
    shuffled = inputs | {key: inputs[key][:, order] for key in ("regions", "boxes", "region_mask")}
    expected, found = model(**inputs), model(**shuffled)
    for key, value in expected.items():
        value = value[:, np.array(order)] if key.startswith("region") else value
        np.testing.assert_allclose(found[key], value, atol=2e-5, err_msg=key)


@pytest.mark.parametrize("name", FAMILIES)
def test_dropout_is_drawn_by_the_key(name):
    model, inputs = build(name, dropout=0.3), batch()
    keys = [jax.random.key(n) for n in (1, 1, 2)]
    once, again, other = (model(**inputs, train=True, key=key)["sequence_output"] for key in keys)
    np.testing.assert_array_equal(once, again)
    assert np.abs(once - other).max() > 0.1
    expected = build(name)(**inputs)["sequence_output"]
    np.testing.assert_array_equal(model(**inputs)["sequence_output"], expected)


@pytest.mark.parametrize("name", FAMILIES)
def test_half_precision_stays_near(name):
    inputs = batch()
    exact, half = build(name)(**inputs), build(name, dtype="bfloat16")(**inputs)
    assert half["sequence_output"].dtype == jnp.bfloat16
    assert half["vqa_logits"].dtype == jnp.float32
    for key, value in exact.items():
        error = of_masks(key, np.asarray(half[key], np.float32) - value, inputs)
        assert np.abs(error).mean() < 0.03 * max(1, float(np.abs(value).max())), key


@pytest.mark.parametrize("name", FAMILIES)
def test_every_parameter_learns(name):
    """Of a scalar of all outputs, with some regions masked where the family does that."""
    graph, params = parameters(name)
    inputs = batch()
    if FAMILIES[name][0] is not Oscar:
        inputs["region_masked"] = np.broadcast_to([False, True, False, True, False], (3, 5))

    def loss(params):
        out = nnx.merge(graph, params)(**inputs)
        return sum(jnp.square(value).mean() for value in out.values())

    gradient = jax.jit(jax.grad(loss))(params)
    for path, leaf in jax.tree_util.tree_leaves_with_path(gradient):
        assert np.isfinite(leaf).all(), path
        assert np.abs(leaf).max() > 0, path


@pytest.mark.parametrize("name", FAMILIES)
def test_wrong_widths_are_refused(name):
    inputs = batch()
    wide = np.concatenate([inputs["regions"]] * 2, axis=-1)
    with pytest.raises(InputError, match=r"regions are \[3, 5, 12\].*\[batch, regions, 6\]"):
        build(name)(**inputs | {"regions": wide})


def test_boxes_are_of_four_numbers():
    regions = jnp.zeros((3, 5, 6))
    check_regions(regions, jnp.zeros((3, 5, 4)), 6)
    for shape in ((3, 5, 7), (3, 4, 4), (5, 4)):
        with pytest.raises(InputError, match=r"expected \[3, 5, 4\]"):
            check_regions(regions, jnp.zeros(shape), 6)
    with pytest.raises(InputError, match=r"regions are \[5, 6\]"):
        check_regions(regions[0], jnp.zeros((5, 4)), 6)


def test_an_answer_is_named_once():
    with pytest.raises(InputError, match=r"UniterConfig\.answers names an answer twice"):
        UniterConfig(StreamConfig(**TEXT), answers=("yes", "no", "yes"))


def test_numbers_of_a_box():
    box = jnp.array([[0.1, 0.2, 0.5, 0.9]])
    numbers = [0.1, 0.2, 0.5, 0.9, 0.4, 0.7, 0.28]
    for count in (4, 6, 7):
        np.testing.assert_allclose(box_numbers(box, count)[0], numbers[:count], atol=1e-6)


def test_waves_of_a_box():
    boxes = batch()["boxes"]
    expected = [[waves(box) for box in row] for row in boxes.astype(np.float64)]
    np.testing.assert_allclose(box_waves(jnp.array(boxes), 4), expected, atol=2e-5)
