"""CLIP, SigLIP, and ViT beside BERT: two towers."""

import numpy as np
from einops import rearrange

from tests.cases.case import LAYERS, UNCOMMON_LAYERS, Case, pictures, renamed, texts

TEXT = {"vocab_size": 20, "max_position_embeddings": 12}
IMAGE = {"image_size": 16, "patch_size": 8}


def _pairs(rng, **sizes):
    return {"image": pictures(rng, **sizes), **texts(rng, batch=3)}


def _ended_pairs(rng):
    """Texts that end in the largest id, 19."""
    inputs = _pairs(rng)
    inputs["text"][[0, 1, 2], [6, 3, 4]] = 19
    return inputs


def _unmasked_pairs(rng):
    """SigLIP attends to padding."""
    inputs = _pairs(rng)
    del inputs["text_mask"]
    return inputs


def _in_patches(inputs):
    """Siglip2Model takes pictures cut up, and the shape of each in patches."""
    theirs = renamed({"text": inputs["text"]})
    patches = rearrange(inputs["image"], "b (h p) (w q) c -> b (h w) (p q c)", p=8, q=8)
    ones = np.ones(patches.shape[:2], np.int64)
    shapes = np.full((len(patches), 2), 2)
    return theirs | {
        "pixel_values": patches,
        "pixel_attention_mask": ones,
        "spatial_shapes": shapes,
    }


CASES = (
    Case(
        name="clip",
        recorded=True,
        kind="CLIPModel",
        config=lambda t: t.CLIPConfig(
            text_config={**LAYERS, **TEXT, "eos_token_id": 19},
            vision_config={**UNCOMMON_LAYERS, **IMAGE},
            projection_dim=12,
        ),
        inputs=_ended_pairs,
    ),
    Case(
        name="clip-old",  # the end is the largest id, as in OpenAI's files
        kind="CLIPModel",
        config=lambda t: t.CLIPConfig(
            text_config={**UNCOMMON_LAYERS, **TEXT, "eos_token_id": 2, "hidden_act": "gelu"},
            vision_config={**LAYERS, **IMAGE, "hidden_act": "gelu"},
            projection_dim=10,
        ),
        inputs=_ended_pairs,
    ),
    Case(
        name="siglip",
        recorded=True,
        kind="SiglipModel",
        config=lambda t: t.SiglipConfig(
            text_config={**LAYERS, **TEXT}, vision_config={**LAYERS, **IMAGE}
        ),
        inputs=_unmasked_pairs,
    ),
    Case(
        name="siglip2",
        recorded=True,
        kind="Siglip2Model",
        config=lambda t: t.Siglip2Config(
            text_config={**UNCOMMON_LAYERS, **TEXT},
            vision_config={**UNCOMMON_LAYERS, "num_patches": 4, "patch_size": 8},
        ),
        inputs=_unmasked_pairs,
        theirs=_in_patches,
    ),
    Case(
        name="vision-text-dual-encoder",
        recorded=True,
        kind="VisionTextDualEncoderModel",
        config=lambda t: t.VisionTextDualEncoderConfig.from_vision_text_configs(
            t.ViTConfig(**LAYERS, **IMAGE),
            t.BertConfig(**UNCOMMON_LAYERS, **TEXT),
            projection_dim=12,
        ),
        inputs=_pairs,
    ),
)
