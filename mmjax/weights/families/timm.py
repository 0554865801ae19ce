"""ViT as timm names it (ALBEF, BLIP and much else hold such a ViT), and timm's own checkpoints."""

import re

from mmjax.errors import InputError, near_misses
from mmjax.models.encoders import ImageModel, ImageModelConfig
from mmjax.models.vit import ViTConfig
from mmjax.weights.families.vit import resize_positions
from mmjax.weights.family import Family, Source
from mmjax.weights.names import Entry, Table, fused_attention, modules, under

ENCODER: Table = (
    Entry("class_token", "cls_token", leading=1),
    Entry("position_embedding", "pos_embed", leading=1, resize=resize_positions),
    *modules({"patch": "patch_embed.proj", "norm": "norm"}),
    *fused_attention("blocks/layers/self_attention/attention", "blocks.{n}.attn.qkv"),
    *under(
        modules(
            {
                "self_attention/norm": "norm1",
                "self_attention/attention/out": "attn.proj",
                "mlp/norm": "norm2",
                "mlp/up": "mlp.fc1",
                "mlp/down": "mlp.fc2",
            }
        ),
        "blocks/layers/",
        "blocks.{n}.",
    ),
)

IMAGENET_MEAN, IMAGENET_STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
# Plain ViT and DeiT: 'vit_base_patch16_224.augreg_in21k' is B/16.
_ARCHITECTURE = re.compile(r"(?:vit|deit)_([a-z]+)_patch(\d+)_(\d+)(?:_in21k|_dino)?(?:\..*)?")
_LETTERS = {"tiny": "Ti", "small": "S", "base": "B", "large": "L", "huge": "H"}


def _read(source: Source) -> ImageModelConfig:
    name = str(source.json.get("architecture"))
    found = _ARCHITECTURE.fullmatch(name)
    if found is None or found[1] not in _LETTERS:
        known = [f"vit_{size}_patch16_224" for size in _LETTERS]
        raise InputError(f"{source.origin}: architecture is {name!r}.{near_misses(name, known)}")
    if (arguments := {**(source.json.get("model_args") or {})}).keys() - {"img_size"}:
        raise InputError(
            f"{source.origin}: model_args are {arguments}; only img_size is supported."
        )
    size, patch, pixels = found.groups()
    # Files of before 2023 have what is here `pretrained_cfg` at their top.
    described = source.json.get("pretrained_cfg") or source.json
    _, height, width = described.get("input_size", (3, int(pixels), int(pixels)))
    image = ViTConfig(
        size=f"{_LETTERS[size]}/{patch}",
        image_size=arguments.get("img_size", (height, width)),
        mean=tuple(described.get("mean", IMAGENET_MEAN)),
        std=tuple(described.get("std", IMAGENET_STD)),
    )
    classes = source.json.get("num_classes", 0) if source.has("head.weight") else 0
    names = source.json.get("label_names")
    if not isinstance(names, list) or len(names) != classes:
        names = [f"LABEL_{i}" for i in range(classes)]
    return ImageModelConfig(image, tuple(names))


FAMILY = Family(
    name="timm",
    model=ImageModel,
    config=ImageModelConfig,
    table=lambda config: (*under(ENCODER, "image/", ""), *modules({"classifier": "head"})),
    read=_read,
    is_member=lambda config: False,  # as `transformers` names it is what is not loaded so
)
