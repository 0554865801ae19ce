"""LXMERT's own parts; its numbers are held against the originals in `tests/parity`."""

from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from mmjax.errors import InputError
from mmjax.models.lxmert import Lxmert, LxmertConfig
from mmjax.models.regions import StreamConfig
from tests.models import reference

TEXT = StreamConfig(width=12, depth=1, heads=3, mlp_width=16, vocabulary_size=20, max_length=9)
CONFIG = LxmertConfig(
    text=TEXT,
    region_depth=2,
    fusion_depth=1,
    region_width=6,
    answers=("yes", "no", "two"),
    masked_language=True,
    matching=True,
    region_objects=5,
    region_attributes=4,
    region_features=True,
)


def build(config=CONFIG):
    return nnx.merge(*reference.split(lambda: Lxmert(config, nnx.Rngs(0))))


def batch(regions=5, length=6):
    rng = np.random.default_rng(0)
    return {
        "text": rng.integers(1, 20, (2, length)),
        "text_mask": np.arange(length) < np.array([[length], [length - 2]]),
        "regions": rng.normal(size=(2, regions, 6)).astype(np.float32),
        "boxes": rng.random((2, regions, 4)).astype(np.float32),
        "region_mask": np.arange(regions) < np.array([[regions - 1], [regions]]),
    }


def test_has_the_heads_that_its_config_asks_for():
    plain = LxmertConfig(text=TEXT, region_depth=2, fusion_depth=1, region_width=6)
    features = {"language_output", "vision_output", "pooled_output"}
    assert build(plain)(**batch()).keys() == features
    out = build()(**batch())
    shapes = {name: x.shape[1:] for name, x in out.items() if name not in features}
    assert shapes == {
        "prediction_logits": (6, 20),
        "cross_relationship_score": (2,),
        "object_logits": (5, 5),
        "attribute_logits": (5, 4),
        "region_features": (5, 6),
        "question_answering_score": (3,),
    }
    some = build(replace(CONFIG, region_objects=0, region_features=False))(**batch())
    assert out.keys() - some.keys() == {"object_logits", "region_features"}


def test_padding_changes_nothing():
    model, given = build(), batch()
    expected = model(**given)
    noise = {"text": 3, "regions": 50.0, "boxes": 7.0}
    padded = {
        name: np.pad(x, [(0, 0), (0, 3)] + [(0, 0)] * (x.ndim - 2), constant_values=noise.get(name))
        for name, x in given.items()
        if name in noise
    }
    for name in ("text_mask", "region_mask"):
        padded[name] = np.pad(given[name], [(0, 0), (0, 3)])
    found = model(**padded)
    for name in ("pooled_output", "question_answering_score", "cross_relationship_score"):
        np.testing.assert_allclose(found[name], expected[name], atol=1e-5, err_msg=name)
    np.testing.assert_allclose(
        found["language_output"][:, :6], expected["language_output"], atol=1e-5
    )


def test_a_region_is_the_mean_of_its_features_and_its_box():
    embeddings, given = build().region_embeddings, batch()

    def normalised(linear, norm, x):
        x = x @ np.asarray(linear.kernel[...], np.float64) + np.asarray(linear.bias[...])
        x = (x - x.mean(-1, keepdims=True)) / np.sqrt(x.var(-1, keepdims=True) + TEXT.epsilon)
        return x * np.asarray(norm.scale[...]) + np.asarray(norm.bias[...])

    features = normalised(embeddings.features, embeddings.features_norm, given["regions"])
    boxes = normalised(embeddings.box, embeddings.box_norm, given["boxes"])
    found = embeddings(jnp.array(given["regions"]), jnp.array(given["boxes"]))
    np.testing.assert_allclose(found, (features + boxes) / 2, atol=1e-5)


@pytest.mark.parametrize("padding", [0, -1])
def test_padding_rows_of_all_three_tables_get_no_gradient(padding):
    model = build(replace(CONFIG, text=replace(TEXT, padding=padding)))
    graph, state = nnx.split(model)
    text = jnp.array([[0, 3, 5], [4, 0, 0]])

    def scalar(params):
        encoded = nnx.merge(graph, params).encode_text(text, text_type=text % 2)
        return jnp.vdot(encoded.tokens, jnp.arange(encoded.tokens.size).reshape(2, 3, -1) % 7)

    tables = jax.grad(scalar)(nnx.to_pure_dict(state))["text_embeddings"]
    for name in ("token_embedding", "position_embedding", "type_embedding"):
        gradient = np.asarray(tables[name]["embedding"])
        assert gradient[1:].any(), name
        assert gradient[0].any() == (padding < 0), name


def test_dropout_comes_from_the_key():
    model, given = build(replace(CONFIG, text=replace(TEXT, dropout=0.3))), batch()
    a, again, b = (
        model(**given, train=True, key=jax.random.key(seed))["pooled_output"] for seed in (0, 0, 1)
    )
    np.testing.assert_array_equal(a, again)
    assert not np.allclose(a, b)
    assert not np.allclose(a, model(**given)["pooled_output"])


def test_refuses_regions_with_their_boxes_inside():
    given = batch()
    given["regions"] = np.concatenate([given["regions"], given["boxes"]], axis=-1)
    with pytest.raises(InputError, match=r"\[2, 5, 10\]"):
        build()(**given)


def test_refuses_an_answer_named_twice():
    with pytest.raises(InputError, match="twice"):
        replace(CONFIG, answers=("yes", "yes"))
