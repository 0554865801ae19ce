"""What each family's image processor does, and reading it from a `preprocessor_config.json`."""

import re
from collections.abc import Mapping
from dataclasses import fields, replace
from typing import Any

from PIL import Image

from mmjax.errors import InputError
from mmjax.processing.pixels import ImageProcessor

BILINEAR, BICUBIC = Image.Resampling.BILINEAR, Image.Resampling.BICUBIC

# More than this a config cannot mean: of the side of a picture, and of any other number.
_MAX_SIDE, _HUGE = 8192, 1e9


def _square(side: int) -> dict[str, int]:
    return {"height": side, "width": side}


_HALF: dict[str, Any] = {"image_mean": (0.5, 0.5, 0.5), "image_std": (0.5, 0.5, 0.5)}
_CLIP: dict[str, Any] = {
    "image_mean": (0.48145466, 0.4578275, 0.40821073),
    "image_std": (0.26862954, 0.26130258, 0.27577711),
    "resample": BICUBIC,
}

# What a family does where its config is silent: the defaults of `transformers`.
FAMILIES: dict[str, ImageProcessor] = {
    family.image_processor_type.removesuffix("ImageProcessor"): family
    for family in (
        ImageProcessor("ViTImageProcessor", _square(224), BILINEAR, **_HALF),
        ImageProcessor(
            "DeiTImageProcessor",
            _square(256),
            BICUBIC,
            **_HALF,
            do_center_crop=True,
            crop_size=_square(224),
        ),
        ImageProcessor(
            "ConvNextImageProcessor",
            {"shortest_edge": 384},
            BICUBIC,
            **_HALF,
            crop_pct=224 / 256,
        ),
        ImageProcessor(
            "EfficientNetImageProcessor",
            _square(346),
            BICUBIC,
            **_HALF,
            crop_size=_square(289),
            rescale_offset=False,
            include_top=True,
        ),
        ImageProcessor(
            "CLIPImageProcessor",
            {"shortest_edge": 224},
            **_CLIP,
            do_center_crop=True,
            crop_size=_square(224),
        ),
        ImageProcessor("SiglipImageProcessor", _square(224), BICUBIC, **_HALF),
        ImageProcessor("BlipImageProcessor", _square(384), **_CLIP),
        ImageProcessor(
            "ViltImageProcessor",
            {"shortest_edge": 384},
            BICUBIC,
            **_HALF,
            do_pad=True,
            size_divisor=32,
        ),
        ImageProcessor(
            "FlavaImageProcessor",
            _square(224),
            **_CLIP,
            do_center_crop=True,
            crop_size=_square(224),
        ),
        ImageProcessor(
            "BridgeTowerImageProcessor",
            {"shortest_edge": 288},
            **_CLIP,
            do_center_crop=True,
            crop_size={"shortest_edge": 288},
            do_pad=True,
            size_divisor=32,
        ),
    )
}
# Where a `size` of one number is the shortest edge, not a square.
_EDGE = ("ConvNext", "CLIP", "Siglip", "Vilt", "BridgeTower")
# Keys that mean something only to the families that set them above.
_OWN_KEYS = ("do_pad", "size_divisor", "crop_pct", "rescale_offset", "include_top")


def read_image_processor(config: Mapping[str, Any], type_name: str, origin: str) -> ImageProcessor:
    """The processor that a `preprocessor_config.json` describes.

    Args:
      config: the file. Keys it lacks are as the family has them; steps that are null are not done;
        keys that mean nothing to the family are left aside, as `transformers` leaves them.
      type_name: the family's class, in any of its spellings: `CLIPImageProcessor`,
        `CLIPFeatureExtractor`, `CLIPProcessor`; also with `Fast` or `Pil`.
      origin: names the file in messages.

    Raises:
      InputError: the family is not known, or a value cannot be meant.
    """
    name = _family(type_name, origin)
    usual = FAMILIES[name]
    known = {f.name for f in fields(usual) if f.init} - {"image_processor_type"}
    known -= {key for key in _OWN_KEYS if getattr(usual, key) is None}
    given = {
        key: _value(key, config[key], name, f"{origin}: {key}")
        for key in sorted(known & config.keys())
    }
    processor = replace(usual, **given)
    if config.get("do_pad") and usual.do_pad is None:
        raise InputError(f"{origin}: do_pad is true, and {type_name} pads no pictures.")
    if processor.do_center_crop and processor.crop_size is None:
        raise InputError(f"{origin}: do_center_crop is true, and there is no crop_size.")
    return processor


def _family(type_name: str, origin: str) -> str:
    name = re.sub(r"(ImageProcessor|FeatureExtractor|Processor)(Fast|Pil)?$", "", type_name)
    name = {"Align": "EfficientNet"}.get(name, name)
    if name == "Siglip2":
        raise InputError(
            f"{origin}: {type_name} cuts pictures of any shape into patches (NaFlex), which is not "
            "supported. SigLIP 2 models of a fixed resolution are: theirs is SiglipImageProcessor."
        )
    if name not in FAMILIES:
        known = ", ".join(family.image_processor_type for family in FAMILIES.values())
        raise InputError(f"{origin}: no image processor {type_name!r} is known. Known are {known}.")
    return name


def _value(key: str, value: Any, family: str, name: str) -> Any:
    """One value of the file, checked, in its one form; `name` names it in messages."""
    match key:
        case "size":
            return _size(value, name, edge=family in _EDGE)
        case "crop_size":
            return None if value is None else _size(value, name, edge=False)
        case "image_mean":
            return _channels(value, name)
        case "image_std":
            return _channels(value, name, above=0.0)
        case "resample":
            return _whole(value, name, range(len(Image.Resampling)))
        case "size_divisor":
            return _whole(value, name, range(1, _MAX_SIDE + 1))
        case "rescale_factor" | "crop_pct":
            return _number(value, name, above=0.0)
    if not isinstance(value, bool | None):
        raise InputError(f"{name} is true or false, not {value!r}.")
    return bool(value)


def _size(value: Any, name: str, edge: bool) -> dict[str, int]:
    if isinstance(value, int):
        value = {"shortest_edge": value} if edge else _square(value)
    elif isinstance(value, list) and len(value) == 2:
        value = {"height": value[0], "width": value[1]}
    elif not isinstance(value, dict):
        raise InputError(f"{name} is a number or an object, not {value!r}.")
    sides = {side: length for side, length in value.items() if length is not None}
    forms = ({"height", "width"}, {"shortest_edge"}, {"shortest_edge", "longest_edge"})
    if set(sides) not in forms:
        raise InputError(
            f"{name} has the keys {sorted(sides)}; expected are height and width, or "
            "shortest_edge, alone or with longest_edge."
        )
    return {
        side: _whole(n, f"{name}: {side}", range(1, _MAX_SIDE + 1)) for side, n in sides.items()
    }


def _channels(value: Any, name: str, above: float = -_HUGE) -> tuple[float, ...]:
    values = value if isinstance(value, list) else [value] * 3
    if len(values) != 3:
        raise InputError(f"{name} has a value a channel, 3 in all, not {len(values)}.")
    return tuple(_number(v, name, above) for v in values)


def _whole(value: Any, name: str, allowed: range) -> int:
    if not isinstance(value, int) or isinstance(value, bool) or value not in allowed:
        raise InputError(
            f"{name} is a whole number from {allowed.start} to {allowed.stop - 1}, not {value!r}."
        )
    return value


def _number(value: Any, name: str, above: float) -> float:
    if not isinstance(value, int | float) or isinstance(value, bool) or not abs(value) < _HUGE:
        raise InputError(f"{name} is a number, not {value!r}.")
    if value <= above:
        raise InputError(f"{name} is above {above:g}, not {value}.")
    return float(value)
