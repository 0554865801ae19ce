"""ALIGN in `transformers`: AlignModel, AlignVisionModel."""

from collections.abc import Mapping
from typing import Any

from mmjax.errors import InputError
from mmjax.models.efficientnet import STEM_WIDTH, EfficientNetConfig
from mmjax.models.encoders import ImageModel, ImageModelConfig
from mmjax.models.heads import ContrastiveConfig
from mmjax.models.two_tower import TwoTower, TwoTowerConfig
from mmjax.weights.families import bert
from mmjax.weights.families.resnet import UNUSED
from mmjax.weights.family import Family, Source
from mmjax.weights.keys import ACTIVATIONS, Fixed, Key, read_keys, write_keys
from mmjax.weights.names import Entry, Table, modules, under

IMAGE_KEYS = (
    Key("image_size", "image_size", 600),
    Key("width_coefficient", "width_coefficient", 2.0),
    Key("depth_coefficient", "depth_coefficient", 3.1),
    Key("depth_divisor", "width_unit", 8),
    Key("kernel_sizes", "kernels", (3, 3, 5, 3, 5, 5, 3)),
    Key("out_channels", "base_widths", (16, 24, 40, 80, 112, 192, 320)),
    Key("depthwise_padding", "symmetric_blocks", ()),
    Key("strides", "strides", (1, 2, 2, 2, 1, 2, 1)),
    Key("num_block_repeats", "base_depths", (1, 2, 2, 3, 3, 4, 1)),
    Key("expand_ratios", "expansions", (1, 6, 6, 6, 6, 6, 6)),
    Key("squeeze_expansion_ratio", "squeeze", 0.25),
    Key("hidden_act", "activation", "swish", ACTIVATIONS),
    Key("pooling_type", "pool", "mean"),
    Key("batch_norm_eps", "epsilon", 1e-3),
    Key("drop_connect_rate", "drop_path", 0.2),
    Fixed("num_channels", 3),
)

_BLOCK: Table = modules(
    {
        "expand/convolution": "expansion.expand_conv",
        "expand/norm": "expansion.expand_bn",
        "depthwise/convolution": "depthwise_conv.depthwise_conv",
        "depthwise/norm": "depthwise_conv.depthwise_norm",
        "excitation/reduce": "squeeze_excite.reduce",
        "excitation/expand": "squeeze_excite.expand",
        "project/convolution": "projection.project_conv",
        "project/norm": "projection.project_bn",
    }
)


def image_table(config: Any) -> Table:
    """The image encoder's names. Blocks are numbered through all stages there."""
    entries = modules(
        {"stem/convolution": "embeddings.convolution", "stem/norm": "embeddings.batchnorm"}
    )
    for stage in range(len(config.depths)):
        n, ours = sum(config.depths[:stage]), f"stages/{stage}/"
        entries += under(_BLOCK, f"{ours}first/", f"encoder.blocks.{n}.")
        entries += under(_BLOCK, f"{ours}rest/layers/", "encoder.blocks.{n}.", first=n + 1)
    return entries


def read_image(json: Mapping[str, Any], origin: str) -> EfficientNetConfig:
    """The image encoder that a config.json, or a part of one, describes."""
    config = EfficientNetConfig(**read_keys(IMAGE_KEYS, json, origin))
    expected = list(_inputs(config))
    if (inputs := json.get("in_channels", expected)) != expected:
        raise InputError(
            f"{origin}: in_channels is {inputs}, where {expected} is expected: what the stem and "
            "the stages before give."
        )
    return config


def write_image(config: Any) -> dict[str, Any]:
    """The config.json, or the part of one, of an image encoder."""
    return {
        "model_type": "align_vision_model",
        **write_keys(IMAGE_KEYS, config),
        "in_channels": list(_inputs(config)),
    }


def _inputs(config: EfficientNetConfig) -> tuple[int, ...]:
    return (STEM_WIDTH, *config.base_widths[:-1])


def _read(source: Source) -> TwoTowerConfig:
    text = source.json.get("text_config") or {}
    return TwoTowerConfig(
        image=read_image(source.json.get("vision_config") or {}, f"{source.origin}: vision_config"),
        text=bert.read_encoder(text, f"{source.origin}: text_config", pooler=True),
        contrastive=ContrastiveConfig(
            width=source.json.get("projection_dim", 640),
            project_image=False,
            temperature=1.0,
            text_token=True,
        ),
    )


def _write(config: Any) -> dict[str, Any]:
    return {
        "architectures": ["AlignModel"],
        "model_type": "align",
        "projection_dim": config.contrastive.width,
        "vision_config": write_image(config.image),
        "text_config": {**bert.write_encoder(config.text), "model_type": "align_text_model"},
    }


def _table(config: Any) -> Table:
    return (
        *under(image_table(config.image), "image/", "vision_model."),
        *under(bert.ENCODER, "text/", "text_model."),
        *modules({"contrastive/text_projection": "text_projection"}),
        Entry("contrastive/temperature", "temperature"),
    )


def _is_member(config: Any) -> bool:
    return (
        isinstance(config.image, EfficientNetConfig)
        and bert.is_encoder(config.text)
        and config.text.pooler
        and config.contrastive.temperature > 0
    )


FAMILY = Family(
    name="align",
    model=TwoTower,
    config=TwoTowerConfig,
    table=_table,
    read=_read,
    write=_write,
    is_member=_is_member,
    unused=(*UNUSED, *bert.UNUSED),
)

IMAGE_FAMILY = Family(
    name="align_vision_model",
    model=ImageModel,
    config=ImageModelConfig,
    table=lambda config: under(image_table(config.image), "image/", ""),
    read=lambda source: ImageModelConfig(read_image(source.json, source.origin)),
    write=lambda config: {"architectures": ["AlignVisionModel"], **write_image(config.image)},
    is_member=lambda config: isinstance(config.image, EfficientNetConfig) and not config.labels,
    unused=UNUSED,
)
