"""CLIP in `transformers`: CLIPModel."""

from collections.abc import Mapping
from typing import Any

from mmjax.errors import InputError
from mmjax.models.heads import ContrastiveConfig
from mmjax.models.text_tower import TextTowerConfig
from mmjax.models.two_tower import TwoTower, TwoTowerConfig
from mmjax.models.vit import ViTConfig
from mmjax.weights.families.bert import UNUSED, resize_rows
from mmjax.weights.families.vit import resize_positions
from mmjax.weights.family import Family, Source
from mmjax.weights.keys import ACTIVATIONS, Fixed, Key, read_keys, write_keys
from mmjax.weights.names import Entry, Table, modules, under

IMAGE_KEYS = (
    Key("hidden_size", "width", 768),
    Key("num_hidden_layers", "depth", 12),
    Key("num_attention_heads", "heads", 12),
    Key("intermediate_size", "mlp_width", 3072),
    Key("hidden_act", "activation", "quick_gelu", ACTIVATIONS),
    Key("layer_norm_eps", "epsilon", 1e-5),
    Key("image_size", "image_size", 224),
    Key("patch_size", "patch_size", 32),
    Fixed("num_channels", 3),
)
TEXT_KEYS = (
    Key("vocab_size", "vocabulary_size", 49408),
    Key("hidden_size", "width", 512),
    Key("num_hidden_layers", "depth", 12),
    Key("num_attention_heads", "heads", 8),
    Key("intermediate_size", "mlp_width", 2048),
    Key("hidden_act", "activation", "quick_gelu", ACTIVATIONS),
    Key("layer_norm_eps", "epsilon", 1e-5),
    Key("max_position_embeddings", "max_length", 77),
)
# The number that old files carry for the end of a text, which is that of no token: there the end
# is found as the largest id.
_NO_END_TOKEN = 2

LAYER: Table = modules(
    {
        "self_attention/norm": "layer_norm1",
        "self_attention/attention/query": "self_attn.q_proj",
        "self_attention/attention/key": "self_attn.k_proj",
        "self_attention/attention/value": "self_attn.v_proj",
        "self_attention/attention/out": "self_attn.out_proj",
        "mlp/norm": "layer_norm2",
        "mlp/up": "mlp.fc1",
        "mlp/down": "mlp.fc2",
    }
)
IMAGE: Table = (
    Entry("class_token", "embeddings.class_embedding", leading=-1),
    Entry(
        "position_embedding",
        "embeddings.position_embedding.weight",
        resize=resize_positions,
    ),
    *modules(
        {
            "patch": "embeddings.patch_embedding",
            "embedding_norm": "pre_layrnorm",
            "norm": "post_layernorm",
        }
    ),
    *under(LAYER, "blocks/layers/", "encoder.layers.{n}."),
)
TEXT: Table = (
    Entry("token_embedding", "embeddings.token_embedding", resize=resize_rows),
    *modules({"position_embedding": "embeddings.position_embedding", "norm": "final_layer_norm"}),
    *under(LAYER, "blocks/layers/", "encoder.layers.{n}."),
)
CONTRASTIVE: Table = (
    Entry("logit_scale", "logit_scale"),
    *modules({"image_projection": "visual_projection", "text_projection": "text_projection"}),
)


def read_image(json: Mapping[str, Any], origin: str) -> ViTConfig:
    """CLIP's image encoder: no bias on patches, one LayerNorm before the blocks."""
    return ViTConfig(
        **read_keys(IMAGE_KEYS, json, origin),
        patch_bias=False,
        embedding_norm=True,
        norm_tokens=False,
    )


def is_image(config: Any) -> bool:
    """Whether CLIPVisionModel can be this encoder."""
    return (
        isinstance(config, ViTConfig)
        and config.pool == "class_token"
        and config.embedding_norm
        and not config.patch_bias
        and not config.norm_tokens
    )


def _read_text(json: Mapping[str, Any], origin: str) -> TextTowerConfig:
    end = json.get("eos_token_id", 49407)
    if not isinstance(end, int):
        raise InputError(f"{origin}: eos_token_id is {end!r}, where one token is expected.")
    pool = {"pool": "largest"} if end == _NO_END_TOKEN else {"pool": "end", "end_token": end}
    return TextTowerConfig(**read_keys(TEXT_KEYS, json, origin), **pool)


def _read(source: Source) -> TwoTowerConfig:
    parts = {part: source.json.get(part) or {} for part in ("vision_config", "text_config")}
    return TwoTowerConfig(
        image=read_image(parts["vision_config"], f"{source.origin}: vision_config"),
        text=_read_text(parts["text_config"], f"{source.origin}: text_config"),
        contrastive=ContrastiveConfig(source.json.get("projection_dim", 512), bias=False),
    )


def _write(config: Any) -> dict[str, Any]:
    width = config.contrastive.width
    end = _NO_END_TOKEN if config.text.pool == "largest" else config.text.end_token
    return {
        "architectures": ["CLIPModel"],
        "model_type": "clip",
        "projection_dim": width,
        "vision_config": {
            "model_type": "clip_vision_model",
            "projection_dim": width,
            **write_keys(IMAGE_KEYS, config.image),
        },
        "text_config": {
            "model_type": "clip_text_model",
            "projection_dim": width,
            "eos_token_id": end,
            **write_keys(TEXT_KEYS, config.text),
        },
    }


def _is_member(config: TwoTowerConfig) -> bool:
    return (
        is_image(config.image)
        and isinstance(config.text, TextTowerConfig)
        and config.text.causal
        and not config.text.head
        and config.contrastive == ContrastiveConfig(config.contrastive.width, bias=False)
    )


FAMILY = Family(
    name="clip",
    model=TwoTower,
    config=TwoTowerConfig,
    table=lambda config: (
        *under(IMAGE, "image/", "vision_model."),
        *under(TEXT, "text/", "text_model."),
        *under(CONTRASTIVE, "contrastive/", ""),
    ),
    read=_read,
    write=_write,
    is_member=_is_member,
    unused=UNUSED,
)
