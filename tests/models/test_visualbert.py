"""VisualBERT's own parts; its numbers are held against the originals in `tests/parity`."""

from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from mmjax.errors import InputError
from mmjax.models.regions import StreamConfig
from mmjax.models.visualbert import VisualBert, VisualBertConfig, last_word
from tests.models import reference

TEXT = StreamConfig(width=12, depth=2, heads=3, mlp_width=16, vocabulary_size=20, max_length=9)
PLAIN = VisualBertConfig(text=TEXT, region_width=6)
CONFIGS = {
    "plain": PLAIN,
    "bypass": replace(PLAIN, bypass=True),
    "pretraining": replace(PLAIN, masked_language=True, next_sentence=True),
    "answering": replace(PLAIN, answers=("yes", "no", "two")),
    "reasoning": replace(PLAIN, labels=("false", "true")),
}


def build(config=PLAIN):
    return nnx.merge(*reference.split(lambda: VisualBert(config, nnx.Rngs(0))))


def batch(regions=5, length=6):
    rng = np.random.default_rng(0)
    return {
        "text": jnp.array(rng.integers(1, 20, (2, length))),
        "text_mask": jnp.arange(length) < jnp.array([[length], [length - 2]]),
        "regions": jnp.array(rng.normal(size=(2, regions, 6)), jnp.float32),
        "region_mask": jnp.arange(regions) < jnp.array([[regions - 1], [regions]]),
    }


@pytest.mark.parametrize("name", CONFIGS)
def test_padding_changes_nothing(name):
    model, given = build(CONFIGS[name]), batch()
    expected = model(**given)
    found = model(
        text=jnp.pad(given["text"], ((0, 0), (0, 2)), constant_values=3),
        text_mask=jnp.pad(given["text_mask"], ((0, 0), (0, 2))),
        regions=jnp.pad(given["regions"], ((0, 0), (0, 4), (0, 0)), constant_values=50.0),
        region_mask=jnp.pad(given["region_mask"], ((0, 0), (0, 4))),
    )
    assert found.keys() == expected.keys()
    for output in found:
        if output in ("last_hidden_state", "prediction_logits"):  # words and regions in one row
            kept = np.concatenate([found[output][:, :6], found[output][:, 8:13]], axis=1)
        else:
            kept = found[output]
        np.testing.assert_allclose(kept, expected[output], atol=2e-5, err_msg=output)


def test_regions_are_of_type_1_at_position_0():
    model, given = build(), batch()
    ones = model(**given, region_type=np.ones((2, 5), np.int32))["last_hidden_state"]
    zeros = model(**given, region_type=np.zeros((2, 5), np.int32))["last_hidden_state"]
    found = model(**given)["last_hidden_state"]
    np.testing.assert_array_equal(found, ones)
    assert not np.allclose(found, zeros)
    swapped = given | {"regions": given["regions"][:, ::-1], "region_mask": None}
    found, expected = model(**swapped), model(**(given | {"region_mask": None}))
    np.testing.assert_allclose(found["pooler_output"], expected["pooler_output"], atol=1e-5)


def test_bypassing_regions_meet_the_words_in_the_top_layer_alone():
    model, given = build(CONFIGS["bypass"]), batch()
    text = model.encode_text(given["text"], given["text_mask"])
    image = model.encode_image(given["regions"], given["region_mask"])
    words = model.fusion.blocks(text.tokens, given["text_mask"][:, None, :])
    both = jnp.concatenate([words, image.tokens], axis=1)
    mask = jnp.concatenate([given["text_mask"], given["region_mask"]], axis=1)
    expected = model.top(both, mask[:, None, :])
    fused = model.fuse(image, text)
    np.testing.assert_allclose(fused.text_tokens, expected[:, :6], atol=1e-5)
    np.testing.assert_allclose(fused.image_tokens, expected[:, 6:], atol=1e-5)


def test_an_answer_is_read_before_the_last_token():
    tokens = jnp.arange(2 * 6 * 3, dtype=jnp.float32).reshape(2, 6, 3)
    mask = jnp.arange(6) < jnp.array([[6], [3]])
    expected = np.stack([tokens[0, 4], tokens[1, 1]])
    np.testing.assert_array_equal(last_word(tokens, mask), expected)
    np.testing.assert_array_equal(last_word(tokens, None), tokens[:, 4])


def test_refuses_features_of_another_width():
    given = batch()
    given["regions"] = given["regions"][..., :5]
    with pytest.raises(InputError, match="region_width"):
        build()(**given)


def test_one_classifier_at_most():
    with pytest.raises(InputError, match="answers and labels"):
        VisualBertConfig(text=TEXT, answers=("yes",), labels=("true",))


@pytest.mark.parametrize("name", ["bypass", "reasoning"])
def test_dropout_comes_from_the_key(name):
    config = replace(CONFIGS[name], text=replace(TEXT, dropout=0.3))
    model, given = build(config), batch()
    output = "logits" if name == "reasoning" else "pooler_output"
    a, again, b = (
        model(**given, train=True, key=jax.random.key(seed))[output] for seed in (0, 0, 1)
    )
    np.testing.assert_array_equal(a, again)
    assert not np.allclose(a, b)
    assert not np.allclose(a, model(**given)[output])
