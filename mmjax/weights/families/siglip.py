"""SigLIP and SigLIP 2 (of one resolution) in `transformers`: SiglipModel, Siglip2Model.

The fixed-resolution checkpoints of SigLIP 2 are SiglipModels. Siglip2Model is that of the others,
which takes pictures of any shape; we run it at the square grid of its position table.
"""

import dataclasses
import math
from collections.abc import Mapping
from typing import Any

from mmjax.errors import InputError
from mmjax.models.heads import ContrastiveConfig
from mmjax.models.text_tower import TextTowerConfig
from mmjax.models.two_tower import TwoTower, TwoTowerConfig
from mmjax.models.vit import ViTConfig
from mmjax.weights.families.bert import UNUSED
from mmjax.weights.families.clip import IMAGE as CLIP_IMAGE
from mmjax.weights.families.clip import TEXT as CLIP_TEXT
from mmjax.weights.family import Family, Source
from mmjax.weights.keys import ACTIVATIONS, Fixed, Key, Keys, read_keys, write_keys
from mmjax.weights.names import Entry, Table, fused_attention, modules, under

_LAYERS = (
    Key("hidden_size", "width", 768),
    Key("num_hidden_layers", "depth", 12),
    Key("num_attention_heads", "heads", 12),
    Key("intermediate_size", "mlp_width", 3072),
    Key("hidden_act", "activation", "gelu_pytorch_tanh", ACTIVATIONS),
    Key("layer_norm_eps", "epsilon", 1e-6),
)
_IMAGE_KEYS = (
    *_LAYERS,
    Key("image_size", "image_size", 224),
    Key("patch_size", "patch_size", 16),
    Fixed("num_channels", 3),
    Fixed("vision_use_head", True),
)
_IMAGE_KEYS_2 = tuple(
    key for key in _IMAGE_KEYS if isinstance(key, Fixed) or key.ours != "image_size"
)
_TEXT_KEYS = (
    *_LAYERS,
    Key("vocab_size", "vocabulary_size", 32000),
    Key("max_position_embeddings", "max_length", 64),
)

_POOLING: Table = (
    Entry("query", "probe", leading=1),
    *fused_attention("attention", "attention.in_proj_{leaf}"),
    *modules(
        {
            "attention/out": "attention.out_proj",
            "mlp/norm": "layernorm",
            "mlp/up": "mlp.fc1",
            "mlp/down": "mlp.fc2",
        }
    ),
)


def _table(config: TwoTowerConfig) -> Table:
    return (
        *under(CLIP_IMAGE, "image/", "vision_model."),
        *under(_POOLING, "image/pooling/", "vision_model.head."),
        *under(CLIP_TEXT, "text/", "text_model."),
        *modules({"text/head": "text_model.head"}),
        Entry("contrastive/logit_scale", "logit_scale", leading=1),
        Entry("contrastive/logit_bias", "logit_bias", leading=1),
    )


def _table_2(config: TwoTowerConfig) -> Table:
    # A patch is flattened there, and mapped by a plain dense layer.
    patch = Entry("image/patch", "vision_model.embeddings.patch_embedding", inputs=3)
    return (patch, *_table(config))


def _read_towers(
    source: Source, image: Mapping[str, Any], image_keys: Keys, **fields: Any
) -> TwoTowerConfig:
    text = source.json.get("text_config") or {}
    text_origin = f"{source.origin}: text_config"
    towers = TwoTowerConfig(
        image=ViTConfig(
            **read_keys(image_keys, image, f"{source.origin}: vision_config"),
            **fields,
            pool="attention",
        ),
        text=TextTowerConfig(
            **read_keys(_TEXT_KEYS, text, text_origin), causal=False, pool="last", head=True
        ),
        contrastive=ContrastiveConfig(
            width=text.get("hidden_size", 768),
            project_image=False,
            project_text=False,
            bias=False,
            logit_bias=True,
        ),
    )
    if text.get("projection_size", towers.text.width) != towers.text.width:
        raise InputError(f"{text_origin}: projection_size is only supported equal to hidden_size.")
    return towers


def _read(source: Source) -> TwoTowerConfig:
    return _read_towers(source, source.json.get("vision_config") or {}, _IMAGE_KEYS)


def _read_2(source: Source) -> TwoTowerConfig:
    image = source.json.get("vision_config") or {}
    patches = image.get("num_patches", 256)
    if (side := math.isqrt(patches)) ** 2 != patches:
        raise InputError(
            f"{source.origin}: vision_config: num_patches is {patches}, which is no square grid."
        )
    size = side * image.get("patch_size", 16)
    return _read_towers(source, image, _IMAGE_KEYS_2, image_size=size)


def _write_text(config: TextTowerConfig) -> dict[str, Any]:
    return {**write_keys(_TEXT_KEYS, config), "projection_size": config.width}


def _write(config: Any) -> dict[str, Any]:
    return {
        "architectures": ["SiglipModel"],
        "model_type": "siglip",
        "vision_config": {
            "model_type": "siglip_vision_model",
            **write_keys(_IMAGE_KEYS, config.image),
        },
        "text_config": {"model_type": "siglip_text_model", **_write_text(config.text)},
    }


def _write_2(config: Any) -> dict[str, Any]:
    down, across = config.image.grid
    return {
        "architectures": ["Siglip2Model"],
        "model_type": "siglip2",
        "vision_config": {
            "model_type": "siglip2_vision_model",
            "num_patches": down * across,
            **write_keys(_IMAGE_KEYS_2, config.image),
        },
        "text_config": {"model_type": "siglip2_text_model", **_write_text(config.text)},
    }


def _is_member(config: TwoTowerConfig) -> bool:
    return (
        isinstance(config.image, ViTConfig)
        and config.image.pool == "attention"
        and isinstance(config.text, TextTowerConfig)
        and config.text.head
        and not config.text.causal
        and config.contrastive.logit_bias
    )


FAMILY = Family(
    name="siglip",
    model=TwoTower,
    config=TwoTowerConfig,
    table=_table,
    read=_read,
    write=_write,
    is_member=_is_member,
    unused=UNUSED,
)

# A model that was not loaded as the one or the other is written as SigLIP.
FAMILY_2 = dataclasses.replace(
    FAMILY,
    name="siglip2",
    table=_table_2,
    read=_read_2,
    write=_write_2,
    is_member=lambda config: False,
)
