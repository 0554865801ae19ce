"""From a picture to the pixels that a pretrained model wants."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, fields, replace
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Float32, UInt8
from PIL import Image

from mmjax.data.image import BadRecord, decode_image, to_rgb
from mmjax.errors import InputError

Picture = Image.Image | str | Path | bytes | np.ndarray

# Longest side by shortest side where `size_divisor` is set: COCO's pictures, as in ViLT.
_LONGEST = 1333 / 800
# Below this side, families with a `crop_pct` crop; from it on they resize to a square.
_CROPPED_BELOW = 384
# Of a resized picture. A thin one gets very long when its shortest edge is to have some size.
_MAX_PIXELS = 2**27


@dataclass(frozen=True)
class ImageProcessor:
    """Resizing, cropping and normalising by a family's own rules.

    A picture is laid on white as RGB, resized, cropped at its centre (with a black margin where it
    is smaller), scaled and normalised; then a batch is padded to its largest picture. The fields
    are the keys of `preprocessor_config.json`; one that is None means nothing to the family.
    `families.read_image_processor` makes one of a config.
    """

    image_processor_type: str
    size: Mapping[str, int]  # 'height' and 'width', or 'shortest_edge' and maybe 'longest_edge'
    resample: int  # as Pillow numbers its filters
    image_mean: Sequence[float]
    image_std: Sequence[float]
    do_resize: bool = True
    do_center_crop: bool = False
    crop_size: Mapping[str, int] | None = None  # 'height' and 'width', or 'shortest_edge'
    do_rescale: bool = True
    rescale_factor: float = 1 / 255
    do_normalize: bool = True
    do_pad: bool | None = None  # a batch to its largest picture, with a mask
    size_divisor: int | None = None  # sides are multiples of it, and the longest has a limit
    crop_pct: float | None = None  # the share of the resized picture that a crop keeps
    rescale_offset: bool | None = None  # subtract 1 after scaling
    include_top: bool | None = None  # divide by `image_std` once more
    _levels: Float32[np.ndarray, "256 3"] = field(init=False, repr=False, compare=False)

    def __post_init__(self):
        object.__setattr__(self, "_levels", self._table())

    @property
    def statistics(self) -> tuple[tuple[float, ...], tuple[float, ...]]:
        """Mean and deviation such that (pixel / 255 - mean) / deviation is what comes out."""
        darkest, brightest = (self._levels[level].astype(float) for level in (0, 255))
        deviation = 1 / (brightest - darkest)
        return tuple(-darkest * deviation), tuple(deviation)

    def resized_to(self, side: int) -> "ImageProcessor":
        """The same for squares of another size."""
        size, crop = (dict.fromkeys(sizes or {}, side) for sizes in (self.size, self.crop_size))
        return replace(self, size=size, crop_size=crop or None)

    def to_config(self) -> dict[str, Any]:
        """The content of a `preprocessor_config.json` from which this processor comes back."""
        config = {f.name: getattr(self, f.name) for f in fields(self) if f.init}
        config = {name: value for name, value in config.items() if value is not None}
        config |= {name: list(config[name]) for name in ("image_mean", "image_std")}
        return config | {"resample": int(self.resample), "do_convert_rgb": True}

    def __call__(self, pictures: Sequence[Picture]) -> dict[str, np.ndarray]:
        """A batch of pictures.

        A path or encoded bytes are shown upright; a Pillow picture or uint8 [H, W, 3] as it is.

        Returns:
          `image` float32 [B, H, W, 3]; where the batch is padded also `image_mask` bool [B, H, W],
          True on a picture.

        Raises:
          InputError: something is not a picture, or the pictures do not fit together.
        """
        images = [self._one(picture, f"image[{i}]") for i, picture in enumerate(pictures)]
        if not images:
            raise InputError("image: the list of pictures is empty.")
        shapes = [image.shape[:2] for image in images]
        if not self.do_pad and len(set(shapes)) > 1:
            raise InputError(
                "The pictures of one batch would have different sizes, "
                + ", ".join(f"{height} × {width}" for height, width in shapes)
                + f": {self.image_processor_type} keeps their shapes with do_resize="
                f"{self.do_resize} and size={dict(self.size)}. Give them one at a time."
            )
        height, width = np.max(shapes, axis=0)
        batch = np.zeros((len(images), height, width, 3), np.float32)
        mask = np.zeros((len(images), height, width), bool)
        for i, (image, (height, width)) in enumerate(zip(images, shapes, strict=True)):
            batch[i, :height, :width] = image
            mask[i, :height, :width] = True
        if self.do_pad and not self.do_center_crop:  # centre crops all have one size
            return {"image": batch, "image_mask": mask}
        return {"image": batch}

    def _one(self, picture: Picture, name: str) -> Float32[np.ndarray, "height width 3"]:
        pixels = _pixels(picture, name)
        if self.do_resize:
            pixels = self._resized(pixels, name)
        if self.do_center_crop:
            pixels = _centre(pixels, self._crop_shape())
        return self._levels[pixels, np.arange(3)]

    def _resized(
        self, pixels: UInt8[np.ndarray, "_ _ 3"], name: str
    ) -> UInt8[np.ndarray, "height width 3"]:
        height, width = self._resized_shape(*pixels.shape[:2])
        if min(height, width) < 1 or height * width > _MAX_PIXELS:
            raise InputError(
                f"{name}: {pixels.shape[0]} × {pixels.shape[1]} pixels are too narrow a picture; "
                f"{self.image_processor_type} would make {height} × {width} of them."
            )
        picture = Image.fromarray(pixels).resize((width, height), Image.Resampling(self.resample))
        edge = self.size.get("shortest_edge")
        if self.crop_pct is not None and edge is not None and edge < _CROPPED_BELOW:
            return _centre(np.asarray(picture), (edge, edge))
        return np.asarray(picture)

    def _resized_shape(self, height: int, width: int) -> tuple[int, int]:
        """The height and width that a picture of `height` × `width` is resized to."""
        if "height" in self.size:
            return self.size["height"], self.size["width"]
        edge, longest = self.size["shortest_edge"], self.size.get("longest_edge")
        if self.size_divisor is not None:
            return _in_multiples(height, width, edge, self.size_divisor)
        if self.crop_pct is not None and edge >= _CROPPED_BELOW:
            return edge, edge
        if self.crop_pct is not None:
            edge = int(edge / self.crop_pct)
        exact: float = edge
        if longest is not None and max(height, width) / min(height, width) * edge > longest:
            exact = longest * min(height, width) / max(height, width)
            edge = round(exact)
            if min(height, width) == edge:
                return height, width
        if height <= width:
            return edge, int(exact * width / height)
        return int(exact * height / width), edge

    def _crop_shape(self) -> tuple[int, int]:
        size = self.crop_size or {}
        if "shortest_edge" in size:
            return size["shortest_edge"], size["shortest_edge"]
        return size["height"], size["width"]

    def _table(self) -> Float32[np.ndarray, "256 3"]:
        """What each of the 256 levels becomes in each channel."""
        levels = np.arange(256, dtype=np.float64)[:, None].repeat(3, axis=1)
        if self.do_rescale:
            levels *= self.rescale_factor
        table = levels.astype(np.float32)
        if self.do_rescale and self.rescale_offset:
            table -= 1
        mean, std = (np.asarray(v, np.float32) for v in (self.image_mean, self.image_std))
        if self.do_normalize:
            table = (table - mean) / std
        if self.include_top:
            table = table / std
        return table


def _pixels(picture: Picture, name: str) -> UInt8[np.ndarray, "height width 3"]:
    """The picture as RGB, transparency on white."""
    match picture:
        case Image.Image():
            try:
                pixels = np.asarray(to_rgb(picture, name))
            except (BadRecord, MemoryError):
                raise
            except Exception as error:  # a lazily read file makes Pillow raise nearly anything
                raise BadRecord(name, f"the picture cannot be decoded: {error}") from error
        case str() | Path():
            pixels = decode_image(Path(picture), f"{name} ({picture})")
        case bytes() | np.ndarray():
            pixels = decode_image(picture, name)
        case _:
            raise InputError(
                f"{name}: expected a Pillow picture, a path, encoded bytes or uint8 pixels "
                f"[height, width, 3], found {type(picture).__name__}."
            )
    if not pixels.size:
        raise BadRecord(name, "the picture has no pixels")
    return pixels


def _in_multiples(height: int, width: int, edge: int, divisor: int) -> tuple[int, int]:
    """The shortest side near `edge`, the longest within its limit, both multiples of `divisor`."""
    scale = edge / min(height, width)
    new_height, new_width = (edge, scale * width) if height < width else (scale * height, edge)
    longest = int(_LONGEST * edge)
    if max(new_height, new_width) > longest:
        scale = longest / max(new_height, new_width)
        new_height, new_width = scale * new_height, scale * new_width
    return (
        int(new_height + 0.5) // divisor * divisor,
        int(new_width + 0.5) // divisor * divisor,
    )


def _centre(
    pixels: UInt8[np.ndarray, "_ _ 3"], shape: tuple[int, int]
) -> UInt8[np.ndarray, "height width 3"]:
    """The middle of the picture; black around it where it is smaller than `shape`."""
    missing = [max(0, want - have) for want, have in zip(shape, pixels.shape, strict=False)]
    if any(missing):
        pixels = np.pad(pixels, [*(((m + 1) // 2, m // 2) for m in missing), (0, 0)])
    top, left = ((have - want) // 2 for want, have in zip(shape, pixels.shape, strict=False))
    return pixels[top : top + shape[0], left : left + shape[1]]
