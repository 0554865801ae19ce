"""Swin in `transformers`: SwinModel, SwinForImageClassification."""

from typing import Any

from mmjax.models.encoders import ImageModel, ImageModelConfig
from mmjax.models.swin import SwinConfig
from mmjax.weights.families.vit import read_labels, resize_positions, write_labels
from mmjax.weights.family import Family, Source
from mmjax.weights.keys import ACTIVATIONS, Fixed, Key, read_keys, write_keys
from mmjax.weights.names import Entry, Table, modules, under

KEYS = (
    Key("embed_dim", "stem_width", 96),
    Key("depths", "depths", (2, 2, 6, 2)),
    Key("num_heads", "heads", (3, 6, 12, 24)),
    Key("window_size", "window", 7),
    Key("mlp_ratio", "mlp_ratio", 4.0),
    Key("hidden_act", "activation", "gelu", ACTIVATIONS),
    Key("hidden_dropout_prob", "dropout", 0.0),
    Key("drop_path_rate", "drop_path", 0.1),
    Key("layer_norm_eps", "epsilon", 1e-5),
    Key("image_size", "image_size", 224),
    Key("patch_size", "patch_size", 4),
    Key("qkv_bias", "qkv_bias", True),
    Key("use_absolute_embeddings", "absolute_positions", False),
    Fixed("num_channels", 3),
)

ENCODER: Table = (
    Entry(
        "position_embedding",
        "embeddings.position_embeddings",
        leading=1,
        resize=resize_positions,
    ),
    *modules(
        {
            "patch": "embeddings.patch_embeddings.projection",
            "embedding_norm": "embeddings.norm",
            "norm": "layernorm",
            "stages/{s}/merge/norm": "encoder.layers.{s}.downsample.norm",
            "stages/{s}/merge/reduction": "encoder.layers.{s}.downsample.reduction",
        }
    ),
    *under(
        modules(
            {
                "window_attention/norm": "layernorm_before",
                "window_attention/attention/query": "attention.self.query",
                "window_attention/attention/key": "attention.self.key",
                "window_attention/attention/value": "attention.self.value",
                "window_attention/attention/out": "attention.output.dense",
                "window_attention/relative_position_bias": (
                    "attention.self.relative_position_bias_table"
                ),
                "mlp/norm": "layernorm_after",
                "mlp/up": "intermediate.dense",
                "mlp/down": "output.dense",
            }
        ),
        "stages/{s}/blocks/layers/",
        "encoder.layers.{s}.blocks.{n}.",
    ),
)


def _read(source: Source) -> ImageModelConfig:
    labels = read_labels(source.json) if source.has("classifier.weight") else ()
    return ImageModelConfig(SwinConfig(**read_keys(KEYS, source.json, source.origin)), labels)


def _write(config: ImageModelConfig) -> dict[str, Any]:
    kind = "SwinForImageClassification" if config.labels else "SwinModel"
    labels = write_labels(config.labels) if config.labels else {}
    keys = write_keys(KEYS, config.image)
    return {"architectures": [kind], "model_type": "swin", **keys, **labels}


def _table(config: ImageModelConfig) -> Table:
    prefix = "swin." if config.labels else ""
    return (*under(ENCODER, "image/", prefix), *modules({"classifier": "classifier"}))


FAMILY = Family(
    name="swin",
    model=ImageModel,
    config=ImageModelConfig,
    table=_table,
    read=_read,
    write=_write,
    is_member=lambda config: isinstance(config.image, SwinConfig),
    prefix="swin.",
    unused=(r".*mask_token", r".*relative_position_index"),
)
