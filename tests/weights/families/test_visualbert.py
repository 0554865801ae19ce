"""VisualBERT beside recorded runs of its own code (uclanlp/visualbert)."""

import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

import mmjax
from mmjax.errors import InputError
from mmjax.objectives.loss import cross_entropy, weighted
from mmjax.objectives.masked_language import word_loss
from mmjax.objectives.masked_regions import kl_divergence
from mmjax.objectives.matching import matching_loss
from tests.weights.families.recorded import Recorded, assert_saved_whole, load, original_names, run

CONFIG = {
    "text": {
        "width": 48,
        "depth": 2,
        "heads": 4,
        "mlp_width": 96,
        "vocabulary_size": 120,
        "max_length": 20,
        "padding": -1,
    },
    "region_width": 20,
}
HEADS = {
    "pretraining": {"masked_language": True, "next_sentence": True},
    "vqa": {"answers": [f"answer {i}" for i in range(13)]},
    "nlvr": {"labels": ["false", "true"]},
    "multichoice": {"labels": ["choice"]},
    "bypass": {"labels": ["false", "true"], "bypass": True},
}
TIED = "cls.predictions.decoder.weight"


@pytest.fixture(scope="module")
def recorded(shared):
    return Recorded(shared / "goldens" / "visualbert_dev.npz")


def weights_of(recorded, kind):
    """A kind's own tensors, and the trunk, which is stored only once."""
    return recorded.under("w/pretraining/", "bert.") | recorded.under(f"w/{kind}/")


def load_kind(recorded, folder, kind):
    return load(folder, "visualbert-original", CONFIG | HEADS[kind], weights_of(recorded, kind))


def inputs_of(recorded, kind):
    """Every choice is a row of ours."""
    names = {
        "text": "input_ids",
        "text_type": "token_type_ids",
        "text_mask": "input_mask",
        "regions": "visual_embeddings",
        "region_mask": "image_mask",
        "region_type": "visual_embeddings_type",
    }
    inputs = {ours: jnp.array(recorded[f"in/{kind}/{theirs}"]) for ours, theirs in names.items()}
    if kind == "multichoice":
        inputs = {name: array.reshape(-1, *array.shape[2:]) for name, array in inputs.items()}
    return {k: v.astype(bool) if k.endswith("mask") else v for k, v in inputs.items()}


def losses_of(outputs, recorded, kind):
    """The original's parts, from the model's outputs; a label of -1 is none."""
    if kind == "pretraining":
        labels = jnp.array(recorded["in/pretraining/masked_lm_labels"])
        words = outputs["prediction_logits"][:, : labels.shape[1]]
        total, weight = weighted(word_loss(words, labels), labels >= 0)
        belongs = jnp.array(recorded["in/pretraining/is_random_next"] == 0)
        # The first of the two classes is that of belonging.
        pairs = matching_loss(outputs["seq_relationship_logits"][:, ::-1], belongs)
        return {"masked_lm_loss": total / weight, "next_sentence_loss": pairs.mean()}
    logits, label = outputs["logits"], jnp.array(recorded[f"in/{kind}/label"])
    if kind == "vqa":
        return {"": kl_divergence(logits, label).mean()}
    return {"": cross_entropy(logits.reshape(len(label), -1), label).mean()}


@pytest.mark.parametrize("kind", HEADS)
def test_outputs_loss_and_gradients(recorded, kind, tmp_path):
    model, inputs = load_kind(recorded, tmp_path, kind), inputs_of(recorded, kind)

    def loss(model):
        outputs = model(**inputs)
        parts = losses_of(outputs, recorded, kind)
        return sum(parts.values()), (parts, outputs)

    value, (parts, out), gradient = run(model, loss)
    for part, found in parts.items():
        recorded.check(f"loss/{kind}_{part}".removesuffix("_"), found)
    recorded.check(f"out/{kind}/sequence_output", out["last_hidden_state"])
    recorded.check(f"out/{kind}/pooled_output", out["pooler_output"])
    if kind == "pretraining":
        recorded.check("out/pretraining/logits", out["prediction_logits"])
        recorded.check("out/pretraining/seq_relationship_score", out["seq_relationship_logits"])
    else:
        shape = recorded[f"out/{kind}/logits"].shape
        recorded.check(f"out/{kind}/logits", out["logits"].reshape(shape))
    recorded.check(f"loss/{kind}", value)
    recorded.check_gradients(kind, gradient)


def test_embeddings(recorded, tmp_path):
    model, inputs = load_kind(recorded, tmp_path, "nlvr"), inputs_of(recorded, "nlvr")
    text = model.encode_text(inputs["text"], inputs["text_mask"], inputs["text_type"])
    image = model.encode_image(inputs["regions"], inputs["region_mask"], inputs["region_type"])
    recorded.check("out/nlvr/embeddings", jnp.concatenate([text.tokens, image.tokens], axis=1))


@pytest.mark.parametrize("kind", HEADS)
def test_saved_under_either_names(recorded, kind, tmp_path):
    model = load_kind(recorded, tmp_path, kind)
    names = original_names(model, nnx.to_pure_dict(nnx.state(model))).keys()
    assert names == weights_of(recorded, kind).keys() - {TIED}
    assert_saved_whole(model, tmp_path)
    model.family = "visual_bert"
    assert_saved_whole(model, tmp_path)
    assert mmjax.load(tmp_path).family == "visual_bert"


@pytest.mark.parametrize("kind", ["pretraining", "vqa"])
def test_published_files_have_one_more_prefix(recorded, kind, tmp_path):
    plain, weights = load_kind(recorded, tmp_path, kind), weights_of(recorded, kind)
    nested = {f"bert.{name}": array for name, array in weights.items()}
    model = load(tmp_path, "visualbert-original", CONFIG | HEADS[kind], nested)
    jax.tree.map(np.testing.assert_array_equal, nnx.state(model), nnx.state(plain))


def test_asks_what_a_classifier_is_for(recorded, tmp_path):
    model = load_kind(recorded, tmp_path, "vqa")
    model.family = "visual_bert"
    mmjax.save_huggingface(model, tmp_path)
    description = json.loads((tmp_path / "config.json").read_text())
    description["architectures"] = ["VisualBertModel"]
    (tmp_path / "config.json").write_text(json.dumps(description))
    with pytest.raises(InputError, match="architectures names VisualBertModel"):
        mmjax.load(tmp_path)
