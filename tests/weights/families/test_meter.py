"""METER beside recorded runs of its original code."""

import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from mmjax.models.meter import MeterConfig
from mmjax.objectives.answering import soft_binary_cross_entropy
from mmjax.objectives.loss import cross_entropy
from mmjax.objectives.masked_language import word_loss
from mmjax.objectives.matching import matching_loss
from mmjax.objectives.ranking import ranking_loss
from mmjax.weights.families.meter import FAMILY
from mmjax.weights.names import pairs_of
from tests.weights.families.recorded import Recorded, assert_saved_whole, load, run

TASKS = {"answers": [str(i) for i in range(11)], "reasoning": True, "entailment": True}
RETRIEVAL = {"masked_language": False, "ranking": True}


@pytest.fixture(scope="module")
def tasks(shared):
    return Recorded(shared / "goldens" / "meter_dev.npz")


@pytest.fixture(scope="module")
def retrieval(shared):
    return Recorded(shared / "goldens" / "meter_irtr_dev.npz")


@pytest.fixture(scope="module")
def model(tasks, tmp_path_factory):
    return load_meter(tasks, tmp_path_factory.mktemp("meter"), TASKS)


@pytest.fixture(scope="module")
def retriever(retrieval, tmp_path_factory):
    return load_meter(retrieval, tmp_path_factory.mktemp("meter"), RETRIEVAL)


def load_meter(recorded, folder, heads):
    theirs = recorded.config
    layers = {
        "width": theirs["rob_width"],
        "heads": theirs["rob_heads"],
        "mlp_width": theirs["rob_inter"],
    }
    config = {
        "image": {
            "width": theirs["clip_width"],
            "depth": theirs["clip_layers"] - 1,
            "heads": theirs["clip_width"] // theirs["clip_head_dim"],
            "image_size": theirs["image_size"],
            "patch_size": theirs["patch_size"],
            "patch_bias": False,
            "embedding_norm": True,
            "activation": "quick_gelu",
            "epsilon": 1e-5,
        },
        "text": {
            **layers,
            "depth": theirs["rob_layers"],
            "epsilon": theirs["rob_eps"],
            "vocabulary_size": theirs["vocab_size"],
            "max_length": theirs["max_text_len"] + 2,
            "first_position": 2,
            "padding": 1,
            "types": 1,
        },
        "fusion": {
            **layers,
            "depth": theirs["num_top_layer"],
            "norm": "post",
            "epsilon": 1e-12,
            "project": True,
            "token_types": True,
        },
        **heads,
    }
    return load(folder, "meter", config, recorded.under("w/"))


def picture(recorded, name="image"):
    return recorded[f"in/{name}"].transpose(0, 2, 3, 1)


def pair(recorded, text="text_ids", image="image"):
    mask = recorded["in/text_masks"].astype(bool)
    return {
        "text": recorded[f"in/{text}"],
        "text_mask": mask,
        "image": picture(recorded, image),
    }


def maybe_matching(recorded):
    """A label of 0 puts another picture beside the text."""
    is_match = recorded["draw/itm_labels"][:, None, None, None] == 1
    images = np.where(is_match, picture(recorded), picture(recorded, "false_image_0"))
    return {**pair(recorded), "image": images}


def test_encoders_and_fusion(tasks, model):
    inputs = {name: jnp.array(array) for name, array in pair(tasks).items()}
    image = model.encode_image(inputs["image"])
    text = model.encode_text(inputs["text"], inputs["text_mask"])
    tasks.check("hook/infer/vit_model#0", image.tokens)
    tasks.check("hook/infer/text_transformer.encoder.layer.1#0", text.tokens)
    fused = model.fuse(image, text)
    tasks.check("out/infer/image_feats", fused.image_tokens)
    tasks.check("out/infer/text_feats", fused.text_tokens)
    tasks.check("out/infer/cls_feats", fused.pooled)


def test_positions_follow_the_padding(tasks, model):
    """Without a mask too: padding has the position before the first."""
    found = model.text.embeddings(jnp.array(tasks["in/text_ids"]))
    tasks.check("hook/infer/text_transformer.embeddings#0", found)


def test_tasks_of_one_picture(tasks, model):
    tag = "mlm_itm_vqa_snli"
    words, targets = tasks["in/text_labels_mlm"], jnp.array(tasks[f"out/{tag}/vqa_targets"])
    is_masked, matches = words != -100, jnp.array(tasks["draw/itm_labels"] == 1)
    relations = jnp.array(tasks["in/snli_labels"])

    def loss(model):
        masked = model(**pair(tasks, text="text_ids_mlm"))
        matching = model(**maybe_matching(tasks))
        plain = model(**pair(tasks))
        mlm = word_loss(masked["mlm_logits"], jnp.where(is_masked, words, 0))
        losses = {
            "mlm": mlm.mean(where=is_masked),
            "itm": matching_loss(matching["itm_logits"], matches).mean(),
            "vqa": soft_binary_cross_entropy(plain["vqa_logits"], targets).mean(),
            "snli": cross_entropy(plain["ve_logits"], relations).mean(),
        }
        return sum(losses.values()), (losses, [masked, matching, plain])

    total, (losses, passes), gradient = run(model, loss)
    tasks.check(f"loss/{tag}/total", total)
    for name, found in losses.items():
        tasks.check(f"loss/{tag}/{name}", found)
    for i, out in enumerate(passes):
        tasks.check(f"out/{tag}/infer{i}/text_feats", out["sequence_output"])
        tasks.check(f"out/{tag}/infer{i}/image_feats", out["image_output"])
        tasks.check(f"out/{tag}/infer{i}/cls_feats", out["pooled_output"])
        assert "nlvr_logits" not in out
    masked, matching, plain = passes
    tasks.check(f"out/{tag}/mlm_logits", masked["mlm_logits"])
    tasks.check(f"out/{tag}/itm_logits", matching["itm_logits"])
    tasks.check(f"out/{tag}/vqa_logits", plain["vqa_logits"])
    tasks.check(f"out/{tag}/snli_logits", plain["ve_logits"])
    tasks.check_gradients(tag, gradient)


def test_two_pictures(tasks, model):
    inputs = {**pair(tasks, image="image_0"), "image_b": picture(tasks, "image_1")}

    def loss(model):
        out = model(**inputs)
        labels = jnp.array(tasks["in/nlvr2_answers"])
        return cross_entropy(out["nlvr_logits"], labels).mean(), out

    value, out, gradient = run(model, loss)
    tasks.check("loss/nlvr2/nlvr2", value)
    tasks.check("out/nlvr2/nlvr2_logits", out["nlvr_logits"])
    tasks.check("out/nlvr2/infer0/cls_feats", out["pooled_output"])
    tasks.check_gradients("nlvr2", gradient)


def test_retrieval(retrieval, retriever):
    texts = retrieval["in/text_ids"]
    rows, choices, length = texts.shape
    inputs = {
        "text": texts.reshape(-1, length),
        "text_mask": retrieval["in/text_masks"].reshape(-1, length).astype(bool),
        "image": np.repeat(picture(retrieval), choices, axis=0),
    }

    def loss(model):
        out = model(**inputs)
        scores = out["rank_logits"].reshape(rows, choices)
        counts = jnp.ones((rows, choices - 1), bool)
        losses = ranking_loss(scores[:, 0], scores[:, 1:], counts)
        return losses.mean(), (scores, out["pooled_output"])

    value, (scores, pooled), gradient = run(retriever, loss)
    retrieval.check("loss/irtr/irtr", value)
    retrieval.check("out/irtr/score", scores)
    retrieval.check("out/irtr/cls_feats", pooled)
    retrieval.check_gradients("irtr", gradient)


def test_saves_its_weights(model, retriever, tmp_path):
    assert_saved_whole(model, tmp_path / "tasks")
    assert_saved_whole(retriever, tmp_path / "retrieval")


def test_defaults_are_the_published_model():
    """METER-CLIP16-RoBERTa at 288 pixels, as its pre-training left it."""
    model = nnx.eval_shape(lambda: FAMILY.model(MeterConfig(), nnx.Rngs(0)))
    pairs = pairs_of(FAMILY.table(model.config), nnx.to_pure_dict(nnx.state(model)))
    shapes = {name: pair.their_shape for pair in pairs for name in pair.names}
    assert shapes["vit_model.visual.positional_embedding"] == (1 + 18 * 18, 768)
    assert shapes["text_transformer.embeddings.word_embeddings.weight"] == (50265, 768)
    assert shapes["text_transformer.embeddings.position_embeddings.weight"] == (514, 768)
    assert shapes["text_transformer.embeddings.token_type_embeddings.weight"] == (1, 768)
    assert shapes["token_type_embeddings.weight"] == (2, 768)
    assert shapes["mlm_score.decoder.weight"] == (50265, 768)
    assert shapes["itm_score.fc.weight"] == (2, 1536)
    for stack, depth in (
        ("vit_model.visual.transformer.resblocks", 11),
        ("text_transformer.encoder.layer", 12),
        ("cross_modal_text_layers", 6),
        ("cross_modal_image_layers", 6),
    ):
        numbers = {
            int(name.removeprefix(f"{stack}.").split(".")[0])
            for name in shapes
            if name.startswith(f"{stack}.")
        }
        assert numbers == set(range(depth)), stack
