"""Oscar beside recorded runs of its own code."""

import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from safetensors.numpy import load_file

from mmjax.models.oscar import Oscar, OscarConfig
from mmjax.models.regions import StreamConfig
from mmjax.objectives.answering import soft_binary_cross_entropy
from mmjax.objectives.loss import cross_entropy, weighted
from mmjax.objectives.masked_language import word_loss
from mmjax.objectives.masked_regions import kl_divergence
from mmjax.objectives.matching import matching_loss
from tests.weights.families.recorded import Recorded, assert_saved_whole, load, run

PRETRAINING = {"masked_language": True, "contrasts": 3}
MLP = {"classifier": "mlp", "classifier_width": 3 * 48}


@pytest.fixture(scope="module")
def oscar(shared):
    return Recorded(shared / "goldens" / "oscar_dev.npz")


def load_oscar(recorded, folder, weights, heads):
    """The model whose own tensors are under `weights`; what others share is stored only once."""
    theirs = recorded.config
    text = {
        "width": theirs["hidden_size"],
        "depth": theirs["num_hidden_layers"],
        "heads": theirs["num_attention_heads"],
        "mlp_width": theirs["intermediate_size"],
        "activation": theirs["hidden_act"],
        "epsilon": theirs["layer_norm_eps"],
        "vocabulary_size": theirs["vocab_size"],
        "max_length": theirs["max_position_embeddings"],
        "types": theirs["type_vocab_size"],
    }
    config = {"text": text, "region_width": theirs["img_feature_dim"] - 6, **heads}
    tensors = recorded.under("w/pretrain/", "bert.") | recorded.under(f"w/{weights}/")
    return load(folder, "oscar", config, tensors)


def inputs_of(recorded, prefix, **replaced):
    arrays = recorded.under(prefix) | replaced
    text, features, mask = arrays["input_ids"], arrays["img_feats"], arrays["attention_mask"]
    inputs = {
        "text": text,
        "text_type": arrays["token_type_ids"],
        # The last six numbers are the corners and the sides of the box.
        "regions": features[..., :-6],
        "boxes": features[..., -6:-2],
    }
    mask, length = mask == 1, text.shape[1]
    if mask.ndim == 3:
        return inputs | {"attention_mask": mask}
    return inputs | {"text_mask": mask[:, :length], "region_mask": mask[:, length:]}


def pairs_of(recorded):
    """The second axis there is that of the two pictures."""
    arrays = recorded.under("in/nlvr2/")
    first, second = (
        inputs_of(recorded, "in/nlvr2/", **{n: a[:, side] for n, a in arrays.items() if a.ndim > 1})
        for side in (0, 1)
    )
    return first | {f"{name}_b": array for name, array in second.items()}


def test_the_stream(oscar, tmp_path):
    model = load_oscar(oscar, tmp_path, "pretrain", PRETRAINING)
    inputs = {name: jnp.array(array) for name, array in inputs_of(oscar, "in/base/").items()}
    mask = np.concatenate([inputs["text_mask"], inputs["region_mask"]], axis=1)
    words = model.encode_text(inputs["text"], inputs["text_mask"], inputs["text_type"])
    image = model.encode_image(inputs["regions"], inputs["boxes"], inputs["region_mask"])
    fused = model.fuse(image, words)
    oscar.check("out/model/txt_emb", words.tokens)
    both = np.concatenate([words.tokens, image.tokens], axis=1)
    oscar.check("out/model/hidden0", both)
    both = np.concatenate([fused.text_tokens, fused.image_tokens], axis=1)
    oscar.check("out/model/seq", both, mask)
    oscar.check("out/model/pooled", fused.pooled)
    alone = model(**inputs | {"region_mask": np.zeros((4, 7), bool)})["sequence_output"]
    oscar.check("out/model/text_only_seq", alone, inputs["text_mask"])


def test_pretraining(oscar, tmp_path):
    model = load_oscar(oscar, tmp_path, "pretrain", PRETRAINING)
    inputs = inputs_of(oscar, "in/base/", input_ids=oscar["in/pretrain/input_ids"])
    labels = jnp.array(oscar["in/pretrain/masked_lm_labels"][:, :13])
    contrasts = jnp.array(oscar["in/pretrain/next_sentence_label"])

    def masked_language(model):
        out = model(**inputs)
        total, weight = weighted(word_loss(out["mlm_logits"], labels), labels != -1)
        return total / weight, out

    def total(model):
        loss, out = masked_language(model)
        contrast = cross_entropy(out["contrast_logits"], contrasts).mean()
        return loss + contrast, contrast

    loss, out, gradient = run(model, masked_language)
    words = inputs["text_mask"]
    expected = oscar["out/pretrain/prediction_scores"][:, :13][words]
    np.testing.assert_allclose(out["mlm_logits"][words], expected, atol=2e-5 * abs(expected).max())
    oscar.check("out/pretrain/seq_relationship_score", out["contrast_logits"])
    oscar.check("loss/pretrain_mlm", loss)
    oscar.check_gradients("pretrain_mlm", gradient)
    loss, contrast, gradient = run(model, total)
    oscar.check("loss/pretrain_contrastive", contrast)
    oscar.check("loss/pretrain_total", loss)
    oscar.check_gradients("pretrain_total", gradient)
    assert_saved_whole(model, tmp_path / "saved")


def answers(count):
    return {"answers": [str(i) for i in range(count)]}


TASKS = {
    "vqa": (answers(13), "vqa_logits", soft_binary_cross_entropy),
    "retrieval": (
        {"matching": True},
        "itm_logits",
        lambda logits, labels: matching_loss(logits, labels == 1),
    ),
    "gqa": (answers(11) | MLP, "vqa_logits", cross_entropy),
    "nlvr2": ({"reasoning": True} | MLP, "nlvr_logits", cross_entropy),
}


@pytest.mark.parametrize("name", TASKS)
def test_tasks(name, oscar, tmp_path):
    heads, output, criterion = TASKS[name]
    model = load_oscar(oscar, tmp_path, name, heads)
    inputs = pairs_of(oscar) if name == "nlvr2" else inputs_of(oscar, "in/base/")

    def loss(model):
        logits = model(**inputs)[output]
        return criterion(logits, jnp.array(oscar[f"in/{name}/labels"])).mean(), logits

    value, logits, gradient = run(model, loss)
    oscar.check(f"out/{name}/logits", logits)
    oscar.check(f"loss/{name}", value)
    oscar.check_gradients(name, gradient)
    assert_saved_whole(model, tmp_path / "saved")


def test_captioning(oscar, tmp_path):
    """Words of a caption look at themselves and back; nothing else looks at the caption."""
    model = load_oscar(oscar, tmp_path, "caption", {"masked_language": True})
    inputs = inputs_of(oscar, "in/caption/")
    masked, words = oscar["in/caption/masked_pos"] == 1, oscar["in/caption/masked_ids"]
    targets = words[words != 0]
    smoothing, count = oscar.config["label_smoothing"], oscar.config["vocab_size"]
    labels = np.full((len(targets), count), smoothing / (count - 1), np.float32)
    labels[np.arange(len(targets)), targets] = 1 - smoothing

    def loss(model):
        logits = model(**inputs)["mlm_logits"]
        return kl_divergence(logits[masked], jnp.array(labels)).mean(), logits

    value, logits, gradient = run(model, loss)
    oscar.check("out/caption/class_logits", np.asarray(logits)[masked])
    # Rows of padding look at nothing, and are nothing.
    oscar.check("out/caption/infer_logits", logits, oscar["in/caption/input_ids"] != 0)
    oscar.check("loss/caption", value)
    oscar.check_gradients("caption", gradient)
    assert_saved_whole(model, tmp_path / "saved")


def test_names_of_a_model_that_normalises_regions(tmp_path):
    """Behind the hidden layer of its reasoning a LayerNorm stands as well."""
    text = StreamConfig(width=12, depth=1, heads=3, vocabulary_size=9)
    config = OscarConfig(
        text, region_width=5, region_epsilon=1e-5, reasoning=True, classifier="mlp"
    )
    assert_saved_whole(Oscar(config, nnx.Rngs(0)), tmp_path)
    shapes = {name: a.shape for name, a in load_file(tmp_path / "model.safetensors").items()}
    assert shapes["bert.img_embedding.weight"] == (12, 11)
    assert shapes["bert.LayerNorm.weight"] == (12,)
    assert shapes["classifier.0.weight"] == (24, 24)
    assert shapes["classifier.2.weight"] == (24,)
    assert shapes["classifier.3.weight"] == (2, 24)
