"""Pictures: from encoded bytes to a square of pixels, and the random changes made in training."""

import io
import math
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from jaxtyping import UInt8
from PIL import Image, ImageOps, UnidentifiedImageError

from mmjax.data.randaugment import MAX_MAGNITUDE, rand_augment
from mmjax.errors import InputError


class BadRecord(InputError):  # noqa: N818 - a finding about the data, not a fault of the code
    """One record that cannot be used, such as a truncated picture.

    The data pipeline replaces it, marks it invalid or stops, as `data.on_bad_record` says.
    """

    def __init__(self, name: str, reason: str):
        super().__init__(name, reason)
        self.name = name
        self.reason = reason

    def __str__(self) -> str:
        return f"{self.name}: {self.reason}"


@dataclass(frozen=True)
class Augment:
    """The random changes to a picture in training.

    Attributes:
      crop_scale: the smallest share of the picture's area that a random crop keeps; 1 keeps the
        whole picture, which captions about positions need.
      flip: mirror every second picture, unless its text speaks of left and right.
      randaugment: how many operations of `rand_augment`, and their magnitude.
    """

    crop_scale: float = 1.0
    flip: bool = False
    randaugment: tuple[int, int] = (0, 0)

    def __post_init__(self):
        if not 0 < self.crop_scale <= 1:
            raise InputError(
                "data.crop_scale is a share of the picture's area, above 0 and at most 1, "
                f"not {self.crop_scale}."
            )
        counts = self.randaugment
        if len(counts) != 2 or counts[0] < 0 or not 0 <= counts[1] <= MAX_MAGNITUDE:
            raise InputError(
                "data.randaugment is a number of operations and their magnitude, from 0 to "
                f"{MAX_MAGNITUDE}, not {counts}."
            )

    @property
    def moves(self) -> bool:
        """Whether things may lie elsewhere afterwards."""
        return self.crop_scale < 1 or self.flip or self.randaugment[0] > 0


def decode_image(
    image: bytes | Path | np.ndarray, name: str, min_size: int | None = None
) -> UInt8[np.ndarray, "height width 3"]:
    """The pixels of an encoded picture, upright, as sRGB; transparency lies on white.

    Args:
      image: an encoded picture, the path of one, or pixels, which are returned as they are.
      name: names the record in messages.
      min_size: if given, a JPEG may be decoded at 1/2, 1/4 or 1/8 of its size, which is faster,
        as long as both its sides keep this many pixels.

    Raises:
      BadRecord: the picture is absent, empty, truncated, too large or not a picture.
    """
    if isinstance(image, np.ndarray):
        return _checked_pixels(image, name)
    if isinstance(image, Path):
        try:
            image = image.read_bytes()
        except OSError as error:
            raise BadRecord(name, f"the picture cannot be read: {error.strerror}") from error
    if not image:
        raise BadRecord(name, "the picture is empty (0 bytes)")
    try:
        with Image.open(io.BytesIO(image)) as picture:
            _refuse_bomb(picture, name)
            if min_size is not None:
                picture.draft(None, (min_size, min_size))
            ImageOps.exif_transpose(picture, in_place=True)
            return np.asarray(to_rgb(picture, name))
    except (BadRecord, MemoryError):
        raise
    except UnidentifiedImageError as error:  # its own message names an object in memory
        raise BadRecord(name, "the picture is broken, or of a format that is not known") from error
    except Exception as error:  # broken files make Pillow's decoders raise nearly anything
        raise BadRecord(name, f"the picture cannot be decoded: {error}") from error


def resize_image(
    image: UInt8[np.ndarray, "height width 3"], size: int
) -> UInt8[np.ndarray, "size size 3"]:
    """The whole picture as a square, bicubic, aspect not kept: evaluation in ALBEF and METER."""
    if image.shape[:2] == (size, size):
        return image
    return np.asarray(Image.fromarray(image).resize((size, size), Image.Resampling.BICUBIC))


def random_resized_crop(
    image: UInt8[np.ndarray, "height width 3"],
    size: int,
    rng: np.random.Generator,
    scale: tuple[float, float] = (0.2, 1.0),
    ratio: tuple[float, float] = (3 / 4, 4 / 3),
) -> UInt8[np.ndarray, "size size 3"]:
    """A random rectangle of the picture as a square (Szegedy et al. 2015, section 6).

    Args:
      image: the picture.
      size: the side of the result in pixels.
      rng: where the rectangle comes from.
      scale: the range of the rectangle's area as a share of the picture's, uniform.
      ratio: the range of width by height, uniform in its logarithm.
    """
    height, width = image.shape[:2]
    for _ in range(10):
        area = height * width * rng.uniform(*scale)
        aspect = math.exp(rng.uniform(math.log(ratio[0]), math.log(ratio[1])))
        crop_width = round(math.sqrt(area * aspect))
        crop_height = round(math.sqrt(area / aspect))
        if 0 < crop_width <= width and 0 < crop_height <= height:
            top = rng.integers(height - crop_height + 1)
            left = rng.integers(width - crop_width + 1)
            return resize_image(image[top : top + crop_height, left : left + crop_width], size)
    return resize_image(_centre_crop(image, ratio), size)


def load_image(
    image: bytes | Path | np.ndarray,
    name: str,
    size: int,
    *,
    augment: Augment | None = None,
    rng: np.random.Generator | None = None,
    may_flip: bool = False,
) -> UInt8[np.ndarray, "size size 3"]:
    """A record's picture as a square: plainly resized without `rng`, else randomly changed.

    Raises:
      BadRecord: as `decode_image`.
    """
    if rng is None:
        return resize_image(decode_image(image, name), size)
    augment = augment or Augment()
    # The smallest crop should still have the pixels that the result asks for.
    pixels = decode_image(image, name, min_size=math.ceil(size / math.sqrt(augment.crop_scale)))
    if augment.crop_scale < 1:
        pixels = random_resized_crop(pixels, size, rng, scale=(augment.crop_scale, 1.0))
    else:
        pixels = resize_image(pixels, size)
    if augment.flip and may_flip and rng.random() < 0.5:
        pixels = pixels[:, ::-1]
    operations, magnitude = augment.randaugment
    return rand_augment(pixels, rng, operations, magnitude) if operations else pixels


def _checked_pixels(pixels: np.ndarray, name: str) -> UInt8[np.ndarray, "height width 3"]:
    if pixels.dtype != np.uint8 or pixels.ndim != 3 or pixels.shape[2] != 3 or not pixels.size:
        raise BadRecord(
            name,
            "pixels are expected as uint8 [height, width, 3] and are "
            f"{pixels.dtype} {list(pixels.shape)}",
        )
    return pixels


def _refuse_bomb(picture: Image.Image, name: str) -> None:
    """Refuses a picture whose header promises more pixels than Pillow thinks safe to decode."""
    limit = Image.MAX_IMAGE_PIXELS
    if limit is not None and picture.width * picture.height > limit:
        raise BadRecord(
            name,
            f"{picture.width} × {picture.height} pixels are too many; at most {limit:,} are read",
        )


def to_rgb(picture: Image.Image, name: str) -> Image.Image:
    """A picture of any mode as RGB, transparency on white; raises BadRecord where none is meant."""
    if picture.mode.startswith("I;16"):
        picture = Image.fromarray((np.asarray(picture) >> 8).astype(np.uint8))
    elif picture.mode in ("I", "F"):
        raise BadRecord(name, f"pixels of mode {picture.mode!r} have no range that is known")
    if picture.has_transparency_data:
        picture = picture.convert("RGBA")
        picture = Image.alpha_composite(Image.new("RGBA", picture.size, "white"), picture)
    return picture.convert("RGB")


def _centre_crop(
    image: UInt8[np.ndarray, "height width 3"], ratio: tuple[float, float]
) -> UInt8[np.ndarray, "crop_height crop_width 3"]:
    """The middle of the picture, cut only as far as `ratio` (width by height) demands."""
    height, width = image.shape[:2]
    crop_width = max(1, min(width, round(height * ratio[1])))
    crop_height = max(1, min(height, round(width / ratio[0])))
    top, left = (height - crop_height) // 2, (width - crop_width) // 2
    return image[top : top + crop_height, left : left + crop_width]
