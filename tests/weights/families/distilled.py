"""What ALBEF and BLIP train with alike: a momentum model that teaches, queues, hard negatives."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx

from mmjax.data.tokenizer import TextTokenizer
from mmjax.models.model import Model
from mmjax.objectives.features import Features
from mmjax.objectives.loss import Loss
from mmjax.objectives.matching import (
    Negatives,
    match_triples,
    matching_loss,
)
from mmjax.objectives.momentum import MomentumContrastive, momentum_nce
from tests.objectives.fakes import negative_probabilities
from tests.weights.families.recorded import OUTPUTS, Recorded, assert_close, original_names

KEY = jax.random.key(0)  # of objectives that leave nothing to chance
TOKENIZER = object.__new__(TextTokenizer)  # (what is read of one beside recorded masks)
TOKENIZER.special_ids, TOKENIZER.mask_id = (0, 101, 102, 103), 103


def encoders_of(recorded: Recorded, words: int = 0, **text: Any) -> dict[str, Any]:
    """Our configs of both encoders; `words` are those that the vocabulary has in addition."""
    theirs = recorded.config
    return {
        "image": {
            "width": theirs["vision_width"],
            "depth": theirs["vit_depth"],
            "heads": theirs["vit_heads"],
            "image_size": theirs["image_res"],
            "patch_size": theirs["patch_size"],
        },
        "text": {
            "width": theirs["text_width"],
            "depth": theirs["text_layers"],
            "heads": theirs["text_heads"],
            "mlp_width": theirs["intermediate_size"],
            "vocabulary_size": theirs["vocab"] + words,
            "max_length": theirs["max_pos"],
            "padding": 0,
            **text,
        },
    }


def pictures(recorded: Recorded) -> jax.Array:
    return jnp.array(recorded["in/image"].transpose(0, 2, 3, 1))


def texts(recorded: Recorded, name: str = "input_ids") -> tuple[jax.Array, jax.Array]:
    """Token ids, and where they are tokens."""
    mask = name.replace("input_ids", "attention_mask").replace("_ids", "_mask")
    return jnp.array(recorded[f"in/{name}"]), jnp.array(recorded[f"in/{mask}"], bool)


def batch_of(recorded: Recorded, text: str = "input_ids", **fields: Any) -> dict[str, jax.Array]:
    """The recorded batch, every picture another where the run does not say."""
    image, rows = pictures(recorded), jnp.arange(len(recorded["in/image"]))
    ids, mask = texts(recorded, text)
    every = {"image": image, "text": ids, "text_mask": mask, "index": rows, "valid": rows >= 0}
    return every | {"image_id": rows} | fields


def averaged(model: Model, momentum_model: Model, momentum: float) -> Model:
    """The momentum model after its update, which comes first in a step."""
    graph, before = nnx.split(momentum_model)
    new, old = nnx.to_pure_dict(nnx.state(model)), nnx.to_pure_dict(before)
    return nnx.merge(graph, optax.incremental_update(new, old, 1 - momentum))


def queues_of(recorded: Recorded) -> dict[str, dict[str, jax.Array]]:
    """The memory before the step. What the queue held at first is negative there."""
    size, rows = recorded.config["queue_size"], len(recorded["in/image"])
    others = 1000 + np.arange(size)
    image_id = recorded.arrays.get("w/idx_queue", np.full(size, -100)).reshape(-1)
    queues = {name: jnp.array(recorded[f"w/{name}"].T) for name in ("image_queue", "text_queue")}
    queues["image_id_queue"] = jnp.array(np.where(image_id < 0, others, image_id), jnp.int32)
    batches = {name: x.reshape(-1, rows, *x.shape[1:]) for name, x in queues.items()}
    return {"momentum_contrastive": batches}


def training_features(model: Any, teacher: Any, recorded: Recorded, **fields: Any) -> Features:
    """The features of the recorded step."""
    step = recorded.config["queue_ptr"] // len(recorded["in/image"])
    return Features(
        model,
        batch_of(recorded, **fields),
        tokenizer=TOKENIZER,
        step=jnp.array(step),
        memory=queues_of(recorded),
        average=teacher,
    )


def contrast(features: Features, recorded: Recorded, alpha: float) -> Loss:
    return MomentumContrastive(distill=alpha, queue_size=recorded.config["queue_size"])(
        features, KEY
    )


def match(features: Features, recorded: Recorded) -> Loss:
    """The drawn pairs."""
    text, image = (jnp.array(recorded[f"draw/neg_{side}_idx"]) for side in ("text", "image"))
    there = jnp.ones(len(text), bool)
    return match_triples(features, Negatives(text, there, image, there))


def in_their_order(triples: jax.Array) -> jax.Array:
    """True pairs, then those with a false picture, then those with a false text."""
    return jnp.concatenate([triples[0::3], triples[2::3], triples[1::3]])


def mean(loss: Loss) -> jax.Array:
    return loss.total / loss.weight


def outputs_of(features: Features, contrasted: Loss, matched: Loss) -> dict[str, Any]:
    """What is recorded on the way to the losses."""
    average = features.average
    assert average is not None
    assert contrasted.scores is not None
    assert matched.scores is not None
    return {
        "image_embeds": features.image.tokens,
        "text_embeds": features.text.tokens,
        "image_embeds_m": average.image.tokens,
        "image_feat": features.image_embedding,
        "text_feat": features.text_embedding,
        "image_feat_m": average.image_embedding,
        "text_feat_m": average.text_embedding,
        "sim_i2t": contrasted.scores[0],
        "fusion_pos": features.fused.text_tokens,
        "vl_output": in_their_order(matched.scores[0]),
        "memory": contrasted.memory,
    }


def check_outputs(recorded: Recorded, variant: str, found: dict[str, Any]) -> int:
    """Those outputs that were recorded of the variant; how many they are."""
    names = [name for name in found if f"out/{variant}/{name}" in recorded.arrays.files]
    for name in names:
        recorded.check(f"out/{variant}/{name}", found[name])
    return len(names)


def check_functions(recorded: Recorded, variant: str, alpha: float, added: float = 0.0) -> None:
    """The pure functions, from what was recorded before them to what was recorded behind them.

    `added` is what the original adds to the probability of every negative.
    """
    out = recorded.under(f"out/{variant}/")
    ids = queues_of(recorded)["momentum_contrastive"]["image_id_queue"].reshape(-1)
    own = recorded.arrays.get("in/idx", np.arange(len(recorded["in/image"])))
    everything = jnp.array(np.concatenate([own, ids]))
    positives, there = jnp.array(own)[:, None] == everything, everything >= 0
    for way in ("i2t", "t2i"):
        logits, teacher = (jnp.array(out[f"sim_{way}{end}"]) for end in ("", "_m"))
        losses = momentum_nce(logits, teacher, positives, there, alpha)
        recorded.check(f"out/{variant}/loss_{way}", losses.mean())
        others = ~positives[:, : len(own)]
        # The originals' do not sum to 1.
        drawn = np.where(others, out[f"weights_{way}"] - added, 0)
        found = negative_probabilities(np.asarray(logits[:, : len(own)]), np.asarray(others))
        assert_close(found, drawn / drawn.sum(axis=1, keepdims=True), OUTPUTS, way)
    labels = jnp.array(out["itm_labels"], bool)
    losses = matching_loss(jnp.array(out["vl_output"]), labels)
    recorded.check(f"loss/{variant}/itm", losses.mean())


def check_after(recorded: Recorded, teacher: Model, memory: dict[str, jax.Array]) -> None:
    """The average and the queues after the step."""
    for name in ("image_queue", "text_queue"):
        recorded.check(f"after/{name}", memory[name].reshape(-1, memory[name].shape[-1]).T)
    if "after/idx_queue" in recorded.arrays.files:
        image_id = recorded["after/idx_queue"].reshape(-1)
        found = np.asarray(memory["image_id_queue"]).reshape(-1)
        np.testing.assert_array_equal(found[image_id >= 0], image_id[image_id >= 0])
        assert (found[image_id < 0] >= 1000).all()
    check_average(recorded, teacher)


def check_average(recorded: Recorded, teacher: Model) -> None:
    """The momentum model after the step."""
    found = original_names(teacher, nnx.to_pure_dict(nnx.state(teacher)))
    norms = recorded.under("after_norm/")
    assert norms
    for name, norm in norms.items():
        np.testing.assert_allclose(np.linalg.norm(found[name]), norm, rtol=OUTPUTS, err_msg=name)
    for name in recorded.under("after/").keys() & found.keys():
        recorded.check(f"after/{name}", found[name])
