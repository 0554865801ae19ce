"""ViT in `transformers`: ViTModel, ViTForImageClassification."""

from typing import Any

import numpy as np

from mmjax.errors import InputError
from mmjax.models.encoders import ImageModel, ImageModelConfig
from mmjax.models.vit import ViTConfig, resize_position_embedding
from mmjax.weights.family import Family, Source
from mmjax.weights.keys import ACTIVATIONS, Fixed, Key, read_keys, write_keys
from mmjax.weights.names import Entry, Table, modules, under

KEYS = (
    Key("hidden_size", "width", 768),
    Key("num_hidden_layers", "depth", 12),
    Key("num_attention_heads", "heads", 12),
    Key("intermediate_size", "mlp_width", 3072),
    Key("hidden_act", "activation", "gelu", ACTIVATIONS),
    Key("hidden_dropout_prob", "dropout", 0.0),
    Key("layer_norm_eps", "epsilon", 1e-12),
    Key("image_size", "image_size", 224),
    Key("patch_size", "patch_size", 16),
    Key("qkv_bias", "qkv_bias", True),
    Fixed("num_channels", 3),
    Fixed("pooler_act", "tanh"),
)


def resize_positions(table: np.ndarray, shape: tuple[int, ...]) -> np.ndarray:
    """Position embeddings for another number of patches."""
    return resize_position_embedding(table, shape[0])


ENCODER: Table = (
    Entry("class_token", "embeddings.cls_token", leading=1),
    Entry(
        "position_embedding",
        "embeddings.position_embeddings",
        leading=1,
        resize=resize_positions,
    ),
    *modules(
        {
            "patch": "embeddings.patch_embeddings.projection",
            "norm": "layernorm",
            "pooler": "pooler.dense",
        }
    ),
    *under(
        modules(
            {
                "self_attention/norm": "layernorm_before",
                "self_attention/attention/query": "attention.attention.query",
                "self_attention/attention/key": "attention.attention.key",
                "self_attention/attention/value": "attention.attention.value",
                "self_attention/attention/out": "attention.output.dense",
                "mlp/norm": "layernorm_after",
                "mlp/up": "intermediate.dense",
                "mlp/down": "output.dense",
            }
        ),
        "blocks/layers/",
        "encoder.layer.{n}.",
    ),
)


def read_encoder(json: Any, origin: str, pooler: bool) -> ViTConfig:
    """The encoder that a config.json, or a part of one, describes."""
    return ViTConfig(**read_keys(KEYS, json, origin), pooler=pooler)


def write_encoder(config: ViTConfig) -> dict[str, Any]:
    """The config.json, or the part of one, of an encoder."""
    return {"model_type": "vit", **write_keys(KEYS, config)}


def is_encoder(config: Any) -> bool:
    """Whether ViTModel can be this encoder."""
    return isinstance(config, ViTConfig) and (
        config.pool == "class_token"
        and config.norm == "pre"
        and config.norm_tokens
        and config.patch_bias
        and not config.embedding_norm
    )


def _read(source: Source) -> ImageModelConfig:
    labels = read_labels(source.json) if source.has("classifier.weight") else ()
    return ImageModelConfig(
        read_encoder(source.json, source.origin, source.has("pooler.dense.weight")), labels
    )


def read_labels(json: Any) -> tuple[str, ...]:
    """The names of the classes, in order; two of them where the file says nothing, as there."""
    count = json.get("num_labels") or 2
    names = json.get("id2label") or {str(i): f"LABEL_{i}" for i in range(count)}
    labels = {int(key): label for key, label in names.items()}
    if sorted(labels) != list(range(len(labels))):
        raise InputError(f"id2label should name the classes 0 to {len(labels) - 1}, each once.")
    return tuple(labels[i] for i in range(len(labels)))


def write_labels(labels: tuple[str, ...]) -> dict[str, Any]:
    """What config.json says of the names of the classes."""
    return {
        "id2label": {str(i): label for i, label in enumerate(labels)},
        "label2id": {label: i for i, label in enumerate(labels)},
    }


def _write(config: Any) -> dict[str, Any]:
    kind = "ViTForImageClassification" if config.labels else "ViTModel"
    labels = write_labels(config.labels) if config.labels else {}
    return {"architectures": [kind], **write_encoder(config.image), **labels}


def _table(config: ImageModelConfig) -> Table:
    prefix = "vit." if config.labels else ""
    return (*under(ENCODER, "image/", prefix), *modules({"classifier": "classifier"}))


FAMILY = Family(
    name="vit",
    model=ImageModel,
    config=ImageModelConfig,
    table=_table,
    read=_read,
    write=_write,
    is_member=lambda config: is_encoder(config.image),
    prefix="vit.",
    unused=(r".*mask_token",),
)
