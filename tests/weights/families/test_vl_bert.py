"""VL-BERT beside recorded runs of its own code."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from safetensors.numpy import load_file

from mmjax.models.vl_bert import VlBert, VlBertConfig, VlBertTextConfig
from mmjax.objectives.answering import soft_binary_cross_entropy
from mmjax.objectives.loss import weighted
from mmjax.objectives.masked_language import word_loss
from mmjax.objectives.masked_regions import kl_divergence
from mmjax.objectives.matching import matching_loss
from tests.weights.families.recorded import Recorded, assert_saved_whole, load, run

PRETRAINING = {"masked_language": True, "region_classes": 14, "matching": True}
ANSWERING = {
    "answers": [str(i) for i in range(13)],
    "classifier": "2fc",
    "classifier_width": 40,
}


@pytest.fixture(scope="module")
def vl_bert(shared):
    return Recorded(shared / "goldens" / "vlbert_dev.npz")


def load_vl_bert(recorded, folder, heads, tensors):
    theirs = recorded.config
    text = {
        "width": theirs["hidden_size"],
        "depth": theirs["num_hidden_layers"],
        "heads": theirs["num_attention_heads"],
        "mlp_width": theirs["intermediate_size"],
        "activation": theirs["hidden_act"],
        "vocabulary_size": theirs["vocab_size"],
        "max_length": theirs["max_position_embeddings"],
        "types": theirs["type_vocab_size"],
    }
    sizes = {"region_width": theirs["feat_dim"], "box_width": theirs["coord_dim"]}
    return load(folder, "vl_bert", {"text": text, **sizes, **heads}, tensors)


@pytest.fixture
def pretrained(vl_bert, tmp_path):
    return load_vl_bert(vl_bert, tmp_path, PRETRAINING, vl_bert.under("w/pretrain/"))


def regions_of(recorded):
    boxes = recorded["in/boxes"]
    # Pixels there, and the width and height of each picture.
    size = np.tile(recorded["in/im_info"][:, :2], 2).astype(np.float64)
    return {
        "regions": boxes[..., 4:],
        "boxes": (boxes[..., :4] / size[:, None]).astype(np.float32),
        "region_mask": boxes[..., 0] > -1.5,
    }


def inputs_of(recorded):
    text = recorded["in/text"]
    masked = {"region_masked": recorded["in/mvrc_ops"] == 1}
    return {"text": text, "text_mask": text > 0, **regions_of(recorded), **masked}


def test_the_stream(vl_bert, pretrained):
    inputs = {name: jnp.array(array) for name, array in inputs_of(vl_bert).items()}
    words, mask = inputs["text_mask"], inputs["region_mask"]
    image = pretrained.encode_image(
        inputs["regions"], inputs["boxes"], mask, inputs["region_masked"]
    )
    vl_bert.check("out/pretrain/text_visual_embeddings", np.repeat(image.pooled[:, None], 10, 1))
    fused = pretrained.fuse(image, pretrained.encode_text(inputs["text"], words))
    vl_bert.check("out/vlbert/text_out", fused.text_tokens, words)
    vl_bert.check("out/vlbert/object_out", fused.image_tokens, mask)
    vl_bert.check("out/vlbert/pooled", fused.pooled)


LOSSES = ("mlm", "mvrc", "rel")


@pytest.mark.parametrize("name", [*LOSSES, "total"])
def test_pretraining(name, vl_bert, pretrained):
    inputs = inputs_of(vl_bert)
    words, regions = jnp.array(vl_bert["in/mlm_labels"]), jnp.array(vl_bert["in/mvrc_labels"])
    is_match = jnp.array(vl_bert["in/relationship_label"] == 1)
    entropy = jax.scipy.special.entr(regions).sum(axis=-1)

    def losses(out):
        # Theirs is the cross-entropy of soft labels.
        of_regions = kl_divergence(out["region_logits"], regions) + entropy
        parts = {
            "mlm": weighted(word_loss(out["mlm_logits"], words), words != -1),
            "mvrc": weighted(of_regions, regions.sum(axis=-1) > 0),
            "rel": weighted(matching_loss(out["itm_logits"], is_match), jnp.ones(4)),
        }
        return {name: total / weight for name, (total, weight) in parts.items()}

    def loss(model):
        out = model(**inputs)
        found = losses(out)
        return sum(found.values()) if name == "total" else found[name], out

    value, out, gradient = run(pretrained, loss)
    vl_bert.check(f"loss/{name}", value)
    vl_bert.check_gradients(name, gradient)
    vl_bert.check("out/pretrain/mlm_logits", out["mlm_logits"], inputs["text_mask"])
    vl_bert.check("out/pretrain/mvrc_logits", out["region_logits"], inputs["region_mask"])
    vl_bert.check("out/pretrain/relationship_logits", out["itm_logits"])


def test_questions(vl_bert, tmp_path):
    trunk = {
        name: array
        for name, array in vl_bert.under("w/pretrain/").items()
        if not name.startswith("object_mask") and "_head." not in name
    }
    model = load_vl_bert(vl_bert, tmp_path, ANSWERING, trunk | vl_bert.under("w/vqa/"))
    inputs = regions_of(vl_bert) | {
        "text": vl_bert["out/vqa/text_input_ids"],
        "text_type": vl_bert["out/vqa/text_token_type_ids"],
        "text_mask": vl_bert["out/vqa/text_mask"],
    }

    def loss(model):
        logits = model(**inputs)["vqa_logits"]
        scores = jnp.array(vl_bert["in/vqa_label"])
        return soft_binary_cross_entropy(logits, scores).mean(), logits

    value, logits, gradient = run(model, loss)
    vl_bert.check("out/vqa/logits", logits)
    vl_bert.check("loss/vqa", value)
    vl_bert.check_gradients("vqa", gradient)
    assert_saved_whole(model, tmp_path / "saved")


def test_saved(pretrained, tmp_path):
    assert_saved_whole(pretrained, tmp_path)


def test_names_of_the_published_models(tmp_path):
    """Pre-trained on texts alone as well, without a pooler; BERT's transform before the answers."""
    text = VlBertTextConfig(width=12, depth=1, heads=3, vocabulary_size=9, pooler=False)
    config = VlBertConfig(text, region_width=5, box_width=2, texts_alone=True, region_classes=4)
    assert_saved_whole(VlBert(config, nnx.Rngs(0)), tmp_path)
    shapes = {name: a.shape for name, a in load_file(tmp_path / "model.safetensors").items()}
    assert shapes["aux_text_visual_embedding.weight"] == (1, 12)
    assert shapes["object_mask_visual_embedding.weight"] == (1, 5)
    assert "vlbert.pooler.dense.weight" not in shapes

    text = VlBertTextConfig(width=12, depth=1, heads=3, vocabulary_size=9)
    config = VlBertConfig(text, region_width=5, answers=("no", "yes"))
    assert_saved_whole(VlBert(config, nnx.Rngs(0)), tmp_path)
    shapes = {name: a.shape for name, a in load_file(tmp_path / "model.safetensors").items()}
    assert shapes["final_mlp.0.dense.weight"] == (12, 12)
    assert shapes["final_mlp.0.LayerNorm.bias"] == (12,)
    assert shapes["final_mlp.2.weight"] == (2, 12)
