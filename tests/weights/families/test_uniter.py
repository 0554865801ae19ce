"""UNITER and VILLA beside recorded runs of their own code."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

import mmjax
from mmjax.errors import InputError
from mmjax.models.regions import StreamConfig
from mmjax.models.uniter import Uniter, UniterConfig
from mmjax.objectives.answering import soft_binary_cross_entropy
from mmjax.objectives.loss import cross_entropy
from mmjax.objectives.masked_language import word_loss
from mmjax.objectives.masked_regions import kl_divergence, squared_error
from mmjax.objectives.matching import matching_loss
from mmjax.objectives.pairing import signed_distance
from mmjax.objectives.ranking import margin_loss
from mmjax.objectives.transport import cosine_distance, transport_distance
from tests.weights.families.recorded import (
    OUTPUTS,
    Recorded,
    assert_close,
    assert_saved_whole,
    load,
    run,
)

PRETRAINING = {
    "masked_language": True,
    "region_features": True,
    "region_classes": 14,
    "matching": True,
}
ANSWERS = {"answers": [str(i) for i in range(13)]}


@pytest.fixture(scope="module")
def uniter(shared):
    return Recorded(shared / "goldens" / "uniter_dev.npz")


def config_of(recorded, heads, types=2):
    theirs = recorded.config
    text = {
        "width": theirs["hidden_size"],
        "depth": theirs["num_hidden_layers"],
        "heads": theirs["num_attention_heads"],
        "mlp_width": theirs["intermediate_size"],
        "activation": theirs["hidden_act"],
        "vocabulary_size": theirs["vocab_size"],
        "max_length": theirs["max_position_embeddings"],
        "types": types,
    }
    return {"text": text, "region_width": theirs["img_dim"], **heads}


def load_uniter(recorded, folder, weights, heads):
    """The model whose own tensors are under `weights`; what others share is stored only once."""
    trunk = recorded.under("w/pretrain/", "uniter.")
    types = 3 if "reasoning" in heads else 2
    own = recorded.under(f"w/{weights}/")
    if types == 3:
        own |= recorded.under("w/nlvr2attn/", "uniter.")
    return load(folder, "uniter", config_of(recorded, heads, types), trunk | own)


def inputs_of(recorded, prefix):
    """A batch of theirs as one of ours: their masks are of words and regions without gaps."""
    text = recorded[f"{prefix}input_ids"]
    regions = recorded[f"{prefix}img_feat"]
    rows = len(regions)
    text = np.broadcast_to(text, (rows, text.shape[1]))
    counts = recorded[f"{prefix}attn_masks"].sum(axis=1) - (text != 0).sum(axis=1)
    inputs = {
        "text": text,
        "text_mask": text != 0,
        "regions": regions,
        "region_mask": np.arange(regions.shape[1]) < counts[:, None],
        "boxes": recorded[f"{prefix}img_pos_feat"][..., :4],
    }
    if f"{prefix}img_masks" in recorded.arrays:
        inputs["region_masked"] = recorded[f"{prefix}img_masks"]
    return inputs


def pairs_of(recorded, prefix):
    """Rows of theirs are of the left and of the right picture in turn."""
    inputs = inputs_of(recorded, prefix)
    left, right = ({name: array[side::2] for name, array in inputs.items()} for side in (0, 1))
    assert (left["text"] == right["text"]).all()
    return left | {f"{name}_b": right[name] for name in ("regions", "boxes", "region_mask")}


def triplets_of(recorded, prefix):
    """All regions of both pictures are in one row there; masks part them."""
    inputs, side = inputs_of(recorded, prefix), recorded[f"{prefix}img_type_ids"]
    second = {"regions_b": inputs["regions"], "boxes_b": inputs["boxes"]}
    return inputs | second | {"region_mask": side == 1, "region_mask_b": side == 2}


def words_of(r):
    """Words behind masks, and where they are."""
    labels = r["in/mlm/txt_labels"]
    return jnp.array(labels[labels != -1]), labels != -1


def soft_labels(r):
    return jnp.array(r["in/mrc/label_targets"])


def margins(scores, group):
    scores = scores.reshape(-1, group)
    return margin_loss(scores[:, 0], scores[:, 1:], 0.2)


def as_recorded(elements):
    return elements


def summed(elements):
    """Where ours are of a row, and theirs of each class: they take the mean, and then a factor."""
    return elements.sum(axis=-1)


@dataclass
class Task:
    """One recorded loss: a model, the scores that it is of, and the losses whose mean it is."""

    weights: str
    heads: dict[str, Any]
    scores: Callable[[dict[str, Any], Recorded], jax.Array]
    losses: Callable[[jax.Array, Recorded], jax.Array]
    batch: str = ""
    inputs: Callable[[Recorded, str], dict[str, np.ndarray]] = inputs_of
    recorded: tuple[str, str] = ("scores", "loss_elem")  # of scores and of losses
    theirs: Callable[[np.ndarray], np.ndarray] = as_recorded
    factor: float = 1


def nlvr(weights, reasoning, inputs=pairs_of, batch="nlvr2"):
    return Task(
        weights,
        {"reasoning": reasoning},
        lambda out, r: out["nlvr_logits"],
        lambda scores, r: cross_entropy(scores, jnp.array(r[f"in/{batch}/targets"])),
        batch=batch,
        inputs=inputs,
        recorded=("scores", ""),
    )


TASKS = {
    "mlm": Task(
        "pretrain",
        PRETRAINING,
        lambda out, r: out["mlm_logits"][words_of(r)[1]],
        lambda scores, r: word_loss(scores[None], words_of(r)[0][None])[0],
        recorded=("scores", "loss_per_token"),
    ),
    "mrfr": Task(
        "pretrain",
        PRETRAINING,
        lambda out, r: out["region_features"][r["in/mrfr/img_masks"]],
        lambda features, r: squared_error(features, jnp.array(r["in/mrfr/feat_targets"])),
        recorded=("pred", "loss_elem"),
        theirs=lambda elements: elements.mean(axis=-1),
    ),
    "mrc": Task(
        "pretrain",
        PRETRAINING,
        lambda out, r: out["region_logits"][r["in/mrc/img_masks"]],
        lambda scores, r: cross_entropy(scores, soft_labels(r)[:, 1:].argmax(axis=1) + 1),
    ),
    "mrckl": Task(
        "pretrain",
        PRETRAINING,
        lambda out, r: out["region_logits"][r["in/mrc/img_masks"]],
        lambda scores, r: kl_divergence(scores, soft_labels(r)),
        batch="mrc",
        recorded=("", "loss_elem"),
        theirs=summed,
        factor=1 / 14,
    ),
    "itm_xe": Task(
        "pretrain",
        PRETRAINING,
        lambda out, r: out["itm_logits"],
        lambda scores, r: matching_loss(scores, jnp.array(r["in/itm/targets"] == 1)),
        batch="itm",
        recorded=("", ""),
    ),
    "vqa": Task(
        "vqa",
        ANSWERS,
        lambda out, r: out["vqa_logits"],
        lambda scores, r: soft_binary_cross_entropy(scores, jnp.array(r["in/vqa/targets"])),
        theirs=summed,
    ),
    "nlvr2attn": nlvr("nlvr2attn", "paired_attention"),
    "nlvr2paired": nlvr("nlvr2paired", "paired"),
    "nlvr2triplet": nlvr("nlvr2triplet", "triplet", triplets_of, "nlvr2triplet"),
    "rank": Task(
        "rank",
        {"matching": True, "ranking": True},
        lambda out, r: out["rank_logits"][:, None],
        lambda scores, r: margins(scores, 3),
    ),
    "hard": Task(
        "rank",
        {"matching": True, "ranking": True},
        lambda out, r: out["rank_logits"][:, None],
        lambda scores, r: margins(scores[np.append(0, r["out/hard/topk"])], 4),
        recorded=("all_scores", "loss_elem"),
    ),
}


@pytest.mark.parametrize("name", TASKS)
def test_scores_losses_and_gradients(name, uniter, tmp_path):
    task = TASKS[name]
    model = load_uniter(uniter, tmp_path, task.weights, task.heads)
    inputs = task.inputs(uniter, f"in/{task.batch or name}/")

    def loss(model):
        scores = task.scores(model(**inputs), uniter)
        losses = task.losses(scores, uniter)
        return losses.mean() * task.factor, (scores, losses)

    value, (scores, losses), gradient = run(model, loss)
    of_scores, of_losses = task.recorded
    if of_scores:
        uniter.check(f"out/{name}/{of_scores}", scores)
    if of_losses:
        assert_close(losses, task.theirs(uniter[f"out/{name}/{of_losses}"]), OUTPUTS, name)
    uniter.check(f"loss/{name}", value)
    uniter.check_gradients(name, gradient)
    assert_saved_whole(model, tmp_path / "saved")


@pytest.fixture
def pretrained(uniter, tmp_path):
    return load_uniter(uniter, tmp_path, "pretrain", PRETRAINING)


def test_the_stream(uniter, pretrained):
    inputs = {name: jnp.array(array) for name, array in inputs_of(uniter, "in/mlm/").items()}
    words = pretrained.encode_text(inputs["text"], inputs["text_mask"])
    image = pretrained.encode_image(inputs["regions"], inputs["boxes"], inputs["region_mask"])
    fused = pretrained.fuse(image, words)
    uniter.check("out/model/txt_emb", words.tokens, inputs["text_mask"])
    uniter.check("out/model/img_emb", image.tokens, inputs["region_mask"])
    uniter.check("out/model/pooled", fused.pooled)
    # Theirs close the gap between the words and the regions of a row.
    rows = uniter["in/mlm/gather_index"][..., None]
    tokens = np.concatenate([fused.text_tokens, fused.image_tokens], axis=1)
    packed = np.take_along_axis(tokens, rows, axis=1)
    uniter.check("out/model/layer1", packed, uniter["in/mlm/attn_masks"] == 1)


def test_masked_regions(uniter, pretrained):
    inputs = {name: jnp.array(array) for name, array in inputs_of(uniter, "in/mrfr/").items()}
    boxes, mask, masked = inputs["boxes"], inputs["region_mask"], inputs["region_masked"]
    image = pretrained.encode_image(inputs["regions"], boxes, mask, masked)
    uniter.check("out/mrfr/img_emb", image.tokens, mask)
    # What is hidden is not looked at.
    regions = jnp.where(masked[..., None], 7, inputs["regions"])
    again = pretrained.encode_image(regions, boxes, mask, masked)
    np.testing.assert_array_equal(again.tokens, image.tokens)


def test_a_masked_modality_is_absent(uniter, pretrained):
    inputs = inputs_of(uniter, "in/mlm/")
    for ours, theirs, mask, other in (
        ("sequence_output", "txt_only", "text_mask", "region_mask"),
        ("region_output", "img_only", "region_mask", "text_mask"),
    ):
        out = pretrained(**inputs | {other: np.zeros_like(inputs[other])})
        uniter.check(f"out/model/{theirs}", out[ours], inputs[mask])


def test_transport_of_words_to_regions(uniter, pretrained):
    """The distance by which pre-training aligns them, beside the matching of pairs."""
    inputs, labels = inputs_of(uniter, "in/itm/"), jnp.array(uniter["in/itm/targets"] == 1)
    masks = jnp.array(inputs["text_mask"]), jnp.array(inputs["region_mask"])

    def loss(model):
        out = model(**inputs)
        tokens = out["sequence_output"], out["region_output"]
        distance = transport_distance(*tokens, *masks)
        total, weight = signed_distance(distance, labels, jnp.ones(4, bool))
        matching = matching_loss(out["itm_logits"], labels).mean()
        return total / weight, (cosine_distance(*tokens), distance, matching)

    value, (cost, distance, matching), gradient = run(pretrained, loss)
    both = inputs["text_mask"][:, :, None] & inputs["region_mask"][:, None, :]
    uniter.check("out/itm/ot_cost", cost, both)
    uniter.check("out/itm/ot_dist", distance)
    uniter.check("loss/itm_ot", value)
    uniter.check("loss/itm_total", matching + uniter.config["itm_ot_lambda"] * value)
    uniter.check_gradients("itm_ot", gradient)


def test_villa_without_perturbation(shared, tmp_path):
    """What VILLA adds to it is held against its own code in `tests/objectives`."""
    villa = Recorded(shared / "goldens" / "villa_dev.npz")
    model = load(tmp_path, "villa", config_of(villa, ANSWERS), villa.under("w/"))
    inputs, targets = inputs_of(villa, "in/"), jnp.array(villa["in/targets"])

    def loss(model):
        scores = model(**inputs)["vqa_logits"]
        return soft_binary_cross_entropy(scores, targets).mean(), scores

    value, scores, gradient = run(model, loss)
    villa.check("out/clean_scores", scores)
    villa.check("loss/clean", value)
    villa.check_gradients("clean", gradient)
    assert_saved_whole(model, tmp_path / "saved")


def test_a_model_of_our_own_is_written_as_uniter(tmp_path):
    """And can be loaded under either name, with the heads that the config asks for."""
    text = StreamConfig(width=12, depth=1, heads=3, vocabulary_size=9, types=3)
    config = UniterConfig(text, region_width=5, matching=True, reasoning="paired_attention")
    model = Uniter(config, nnx.Rngs(0))
    assert_saved_whole(model, tmp_path)
    file = tmp_path / "model.safetensors"
    described = {"text": {"width": 12, "depth": 1, "heads": 3, "vocabulary_size": 9, "types": 3}}
    described |= {"region_width": 5, "matching": True, "reasoning": "paired_attention"}
    assert mmjax.load(file, family="villa", config=described).config == config
    with pytest.raises(InputError) as error:
        mmjax.load(file, family="uniter", config=described | {"reasoning": "paired"})
    assert "attn1.in_proj_weight" in str(error.value)
