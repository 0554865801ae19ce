"""UNITER and VILLA beside recorded runs of their own code."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx

import mmjax
from mmjax.errors import InputError
from mmjax.models.regions import StreamConfig
from mmjax.models.uniter import Uniter, UniterConfig
from tests.weights.families.recorded import (
    GRADIENTS,
    Recorded,
    assert_close,
    assert_saved_whole,
    load,
    original_names,
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


@pytest.fixture(scope="module")
def villa(shared):
    return Recorded(shared / "goldens" / "villa_dev.npz")


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


def cross_entropy(logits, labels):
    return optax.softmax_cross_entropy_with_integer_labels(logits, jnp.asarray(labels))


def binary_cross_entropy(logits, scores):
    return optax.sigmoid_binary_cross_entropy(logits, scores)


def margins(scores, group):
    """How far a sigmoid fails to be 0.2 below that of the first of its group."""
    scores = jax.nn.sigmoid(scores.reshape(-1, group))
    return jax.nn.relu(0.2 + scores[:, 1:] - scores[:, :1])


@dataclass
class Task:
    """One recorded loss: a model, the scores that it is of, and its elements."""

    weights: str
    heads: dict[str, Any]
    scores: Callable[[dict[str, Any], Recorded], jax.Array]
    elements: Callable[[jax.Array, Recorded], jax.Array]
    batch: str = ""
    inputs: Callable[[Recorded, str], dict[str, np.ndarray]] = inputs_of
    recorded: tuple[str, str] = ("scores", "loss_elem")
    factor: int = 1


def nlvr(weights, reasoning, inputs=pairs_of, batch="nlvr2"):
    return Task(
        weights,
        {"reasoning": reasoning},
        lambda out, r: out["nlvr_logits"],
        lambda scores, r: cross_entropy(scores, r[f"in/{batch}/targets"]),
        batch=batch,
        inputs=inputs,
        recorded=("scores", ""),
    )


def soft_labels(r):
    return r["in/mrc/label_targets"]


def kl_divergence(scores, r):
    labels = soft_labels(r)
    return jax.scipy.special.xlogy(labels, labels) - labels * jax.nn.log_softmax(scores)


TASKS = {
    "mlm": Task(
        "pretrain",
        PRETRAINING,
        lambda out, r: out["mlm_logits"][r["in/mlm/txt_labels"] != -1],
        lambda scores, r: cross_entropy(
            scores, r["in/mlm/txt_labels"][r["in/mlm/txt_labels"] != -1]
        ),
        recorded=("scores", "loss_per_token"),
    ),
    "mrfr": Task(
        "pretrain",
        PRETRAINING,
        lambda out, r: out["region_features"][r["in/mrfr/img_masks"]],
        lambda features, r: (features - r["in/mrfr/feat_targets"]) ** 2,
        recorded=("pred", "loss_elem"),
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
        kl_divergence,
        batch="mrc",
        recorded=("", "loss_elem"),
    ),
    "itm_xe": Task(
        "pretrain",
        PRETRAINING,
        lambda out, r: out["itm_logits"],
        lambda scores, r: cross_entropy(scores, r["in/itm/targets"]),
        batch="itm",
        recorded=("", ""),
    ),
    "vqa": Task(
        "vqa",
        ANSWERS,
        lambda out, r: out["vqa_logits"],
        lambda scores, r: binary_cross_entropy(scores, r["in/vqa/targets"]),
        factor=13,
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
        elements = task.elements(scores, uniter)
        return elements.mean() * task.factor, (scores, elements)

    value, parts, gradient = run(model, loss)
    for recorded, found in zip(task.recorded, parts, strict=True):
        if recorded:
            uniter.check(f"out/{name}/{recorded}", found)
    uniter.check(f"loss/{name}", value)
    uniter.check_gradients(name, gradient)
    assert_saved_whole(model, tmp_path / "saved")


@pytest.fixture
def pretrained(uniter, tmp_path):
    return load_uniter(uniter, tmp_path, "pretrain", PRETRAINING)


def test_the_stream(uniter, pretrained):
    inputs = {name: jnp.asarray(array) for name, array in inputs_of(uniter, "in/mlm/").items()}
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
    inputs = {name: jnp.asarray(array) for name, array in inputs_of(uniter, "in/mrfr/").items()}
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
    """The distance by which pre-training aligns them, at the recorded plan of transport."""
    inputs, plan = inputs_of(uniter, "in/itm/"), uniter["out/itm/ot_plan_T"].swapaxes(1, 2)
    sign = np.where(uniter["in/itm/targets"] == 1, 1, -1)
    both = inputs["text_mask"][:, :, None] & inputs["region_mask"][:, None, :]

    def loss(model):
        out = model(**inputs)
        words, regions = (
            out[name] / jnp.linalg.norm(out[name], axis=-1, keepdims=True)
            for name in ("sequence_output", "region_output")
        )
        cost = jnp.where(both, 1 - jnp.einsum("bld,brd->blr", words, regions), 0)
        distance = (cost * plan).sum(axis=(1, 2))
        return (sign * distance).mean(), (cost, distance)

    value, (cost, distance), gradient = run(pretrained, loss)
    uniter.check("out/itm/ot_cost", cost)
    uniter.check("out/itm/ot_dist", distance)
    uniter.check("loss/itm_ot", value)
    uniter.check_gradients("itm_ot", gradient)


class Adversary:
    """VILLA's loss at given perturbations, and its gradients."""

    def __init__(self, villa, folder):
        config = config_of(villa, ANSWERS)
        self.model = load(folder, "villa", config, villa.under("w/"))
        self.inputs, self.targets = inputs_of(villa, "in/"), villa["in/targets"]
        graph, state = nnx.split(self.model)
        self.params = nnx.to_pure_dict(state)

        def loss(params, text_shift, region_shift, weight):
            model = nnx.merge(graph, params)
            clean = jax.nn.log_softmax(model(**self.inputs)["vqa_logits"])
            scores = model(**self._shifted(text_shift, region_shift))["vqa_logits"]
            found = jax.nn.log_softmax(scores)
            # The divergence both ways; the clean scores are not held fixed.
            divergence = ((jnp.exp(clean) - jnp.exp(found)) * (clean - found)).mean() * 13
            entropy = binary_cross_entropy(scores, self.targets).mean() * 13
            return entropy + weight * divergence, (scores, entropy, divergence)

        self.gradient = jax.jit(jax.value_and_grad(loss, argnums=(0, 1, 2), has_aux=True))

    def _shifted(self, text_shift, region_shift):
        regions = self.inputs["regions"] + region_shift
        return self.inputs | {"text_shift": text_shift, "regions": regions}


@pytest.fixture(scope="module")
def adversary(villa, tmp_path_factory):
    return Adversary(villa, tmp_path_factory.mktemp("villa"))


def test_villa_without_perturbation(villa, adversary, tmp_path):
    def loss(model):
        scores = model(**adversary.inputs)["vqa_logits"]
        return binary_cross_entropy(scores, adversary.targets).mean() * 13, scores

    value, scores, gradient = run(adversary.model, loss)
    villa.check("out/clean_scores", scores)
    villa.check("loss/clean", value)
    villa.check_gradients("clean", gradient)
    assert_saved_whole(adversary.model, tmp_path)


VARIANTS = (
    "text_l2",
    "image_l2_clip",
    "text_linf_clip",
    "both_l2",
    "alter_l2",
    "text_l2_released",
    "both_l2_randinit",
)


@pytest.mark.parametrize("name", VARIANTS)
def test_villa_at_its_perturbations(name, villa, adversary):
    variant = villa.config["variants"][name]
    steps, weight = variant["adv_steps"], variant["adv_kl_weight"]
    # One modality after the other where they alternate, else both at once.
    sides = ["text", "image"] if "alter" in variant["adv_modality"] else ["both"]
    share = steps * len(sides)
    total = jax.tree.map(jnp.zeros_like, adversary.params)
    for step in range(steps):
        used = {side: villa[f"out/{name}/step{step}/{side}_delta_used"] for side in ("txt", "img")}
        losses = []
        for i, side in enumerate(sides):
            text = used["txt"] * (side != "image")
            regions = used["img"] * (side != "text")
            (loss, (scores, entropy, divergence)), (gradient, *shifts) = adversary.gradient(
                adversary.params, text, regions, weight
            )
            number, ending = ("", "") if side == "both" else (str(i), f"_{i + 1}")
            at = f"{name}/step{step}"
            villa.check(f"out/{at}/scores{number}", scores)
            villa.check(f"loss/{at}/bce_loss{ending}", entropy)
            np.testing.assert_allclose(
                divergence, villa[f"loss/{at}/kl_loss{ending}"], rtol=2e-5, atol=3e-7
            )
            losses.append(loss / share)
            for kind, of_side, shift in zip(("txt", "img"), ("text", "image"), shifts, strict=True):
                recorded = f"out/{at}/{kind}_delta_grad"
                if recorded in villa.arrays and side in ("both", of_side):
                    assert_close(shift / share, villa[recorded], GRADIENTS, recorded)
            total = jax.tree.map(lambda sum, part: sum + part / share, total, gradient)
        villa.check(f"loss/{name}/step{step}/loss", sum(losses))
    villa.check_gradients(name, original_names(adversary.model, total))


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
