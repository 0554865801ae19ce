"""ResNet in `transformers`: ResNetModel, ResNetForImageClassification."""

from typing import Any

from mmjax.models.encoders import ImageModel, ImageModelConfig
from mmjax.models.resnet import ResNetConfig
from mmjax.weights.families.vit import read_labels, write_labels
from mmjax.weights.family import Family, Source
from mmjax.weights.keys import ACTIVATIONS, Fixed, Key, read_keys, write_keys
from mmjax.weights.names import Table, modules, under

KEYS = (
    Key("layer_type", "layer", "bottleneck"),
    Key("embedding_size", "stem_width", 64),
    Key("hidden_sizes", "widths", (256, 512, 1024, 2048)),
    Key("depths", "depths", (3, 4, 6, 3)),
    Key("hidden_act", "activation", "relu", ACTIVATIONS),
    Key("downsample_in_first_stage", "stride_in_first_stage", False),
    Key("downsample_in_bottleneck", "stride_in_reduction", False),
    Fixed("num_channels", 3),
)
# How often the running statistics were updated.
UNUSED = (r".*num_batches_tracked",)

_CONVOLUTION: Table = modules({"convolution": "convolution", "norm": "normalization"})
_LAYER: Table = (
    *(
        entry
        for i in range(3)
        for entry in under(_CONVOLUTION, f"convolutions/{i}/", f"layer.{i}.")
    ),
    *under(_CONVOLUTION, "shortcut/", "shortcut."),
)
ENCODER: Table = (
    *under(_CONVOLUTION, "stem/", "embedder.embedder."),
    *under(_LAYER, "stages/{s}/first/", "encoder.stages.{s}.layers.0."),
    *under(_LAYER, "stages/{s}/rest/layers/", "encoder.stages.{s}.layers.{n}.", first=1),
)


def _read(source: Source) -> ImageModelConfig:
    labels = read_labels(source.json) if source.has("classifier.1.weight") else ()
    return ImageModelConfig(ResNetConfig(**read_keys(KEYS, source.json, source.origin)), labels)


def _write(config: ImageModelConfig) -> dict[str, Any]:
    kind = "ResNetForImageClassification" if config.labels else "ResNetModel"
    labels = write_labels(config.labels) if config.labels else {}
    keys = write_keys(KEYS, config.image)
    return {"architectures": [kind], "model_type": "resnet", **keys, **labels}


def _table(config: ImageModelConfig) -> Table:
    prefix = "resnet." if config.labels else ""
    return (*under(ENCODER, "image/", prefix), *modules({"classifier": "classifier.1"}))


FAMILY = Family(
    name="resnet",
    model=ImageModel,
    config=ImageModelConfig,
    table=_table,
    read=_read,
    write=_write,
    is_member=lambda config: isinstance(config.image, ResNetConfig),
    prefix="resnet.",
    unused=UNUSED,
)
