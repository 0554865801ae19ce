"""What ALBEF and BLIP train with alike: a momentum model that teaches, queues, hard negatives."""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx
from jax.nn import log_softmax, softmax

from mmjax.models.features import Encoded
from mmjax.models.model import Model
from tests.weights.families.recorded import Recorded


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
    return jnp.asarray(recorded["in/image"].transpose(0, 2, 3, 1))


def texts(recorded: Recorded, name: str = "input_ids") -> tuple[jax.Array, jax.Array]:
    """Token ids, and where they are tokens."""
    mask = name.replace("input_ids", "attention_mask").replace("_ids", "_mask")
    return jnp.asarray(recorded[f"in/{name}"]), jnp.asarray(recorded[f"in/{mask}"], bool)


def averaged(model: Model, momentum_model: Model, momentum: float) -> Model:
    """The momentum model after its update, which comes first in a step."""
    graph, before = nnx.split(momentum_model)
    mix = jax.tree.map(
        lambda average, new: momentum * average + (1 - momentum) * new,
        nnx.to_pure_dict(before),
        nnx.to_pure_dict(nnx.state(model)),
    )
    return nnx.merge(graph, mix)


def cross_entropy(logits: Any, labels: Any) -> jax.Array:
    return optax.softmax_cross_entropy_with_integer_labels(logits, jnp.asarray(labels))


def soft_cross_entropy(logits: Any, targets: Any) -> jax.Array:
    return -(targets * log_softmax(logits)).sum(axis=-1)


class Contrast(NamedTuple):
    """The contrastive loss, and what is recorded on the way to it."""

    loss: jax.Array
    outputs: dict[str, Any]


def contrast(
    model: Any,
    teacher: Any,
    seen: Encoded,
    read: Encoded,
    recorded: Recorded,
    positives: Any,
    alpha: float,
) -> Contrast:
    """Against the teacher's features of this batch, and of those in the queue."""
    head, image = model.contrastive, pictures(recorded)
    text, mask = texts(recorded)
    out = {
        "image_feat": head.image(seen.pooled),
        "text_feat": head.text(read.pooled),
        "image_feat_m": teacher.contrastive.image(teacher.encode_image(image).pooled),
        "text_feat_m": teacher.contrastive.text(teacher.encode_text(text, mask).pooled),
    }
    all_images = jnp.concatenate([out["image_feat_m"], recorded["w/image_queue"].T])
    all_texts = jnp.concatenate([out["text_feat_m"], recorded["w/text_queue"].T])
    for end in ("", "_m"):
        scale = jax.lax.stop_gradient(head.scale) if end else head.scale
        out[f"sim_i2t{end}"] = scale * out[f"image_feat{end}"] @ all_texts.T
        out[f"sim_t2i{end}"] = scale * out[f"text_feat{end}"] @ all_images.T
    losses = []
    for way in ("i2t", "t2i"):
        targets = alpha * softmax(out[f"sim_{way}_m"]) + (1 - alpha) * positives
        losses.append(soft_cross_entropy(out[f"sim_{way}"], targets).mean())
        out |= {f"sim_{way}_targets": targets, f"loss_{way}": losses[-1]}
    return Contrast((losses[0] + losses[1]) / 2, out)


def triples(recorded: Recorded) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Rows of pictures and of texts, and whether they match: B pairs, then 2 B drawn ones."""
    own = np.arange(len(recorded["in/image"]))
    images = np.concatenate([own, recorded["draw/neg_image_idx"], own])
    texts = np.concatenate([own, own, recorded["draw/neg_text_idx"]])
    return images, texts, np.repeat([1, 0, 0], len(own))


def check_outputs(recorded: Recorded, variant: str, found: dict[str, Any]) -> int:
    """Those outputs that were recorded of the variant; how many they are."""
    names = [name for name in found if f"out/{variant}/{name}" in recorded.arrays.files]
    for name in names:
        recorded.check(f"out/{variant}/{name}", found[name])
    return len(names)
