"""RandAugment (Cubuk et al. 2020) with the operations and strengths of ALBEF, drawn by Pillow.

ALBEF's own code draws with OpenCV, whose pixels differ a little at the edges.
"""

from collections.abc import Callable

import numpy as np
from jaxtyping import UInt8
from PIL import Image, ImageEnhance, ImageOps

MAX_MAGNITUDE = 10
_GREY = (128, 128, 128)

# A picture, and how strongly to change it: from 0 to 1, or to -1 the other way round.
Operation = Callable[[Image.Image, float], Image.Image]


def rand_augment(
    image: UInt8[np.ndarray, "height width 3"],
    rng: np.random.Generator,
    operations: int,
    magnitude: float,
) -> UInt8[np.ndarray, "height width 3"]:
    """The picture after some of `OPERATIONS`, each at the same magnitude.

    Args:
      image: the picture.
      rng: draws the operations, whether each is carried out, as half of them are, and its sign.
      operations: how many to draw, with replacement.
      magnitude: from 0 to `MAX_MAGNITUDE`.
    """
    picture = Image.fromarray(image)
    for name in rng.choice(list(OPERATIONS), operations):
        is_applied, is_positive = rng.random(2) < 0.5
        if is_applied:
            strength = magnitude / MAX_MAGNITUDE
            picture = OPERATIONS[name](picture, strength if is_positive else -strength)
    return np.asarray(picture)


def _brightness(picture: Image.Image, strength: float) -> Image.Image:
    return ImageEnhance.Brightness(picture).enhance(_factor(strength))


def _sharpness(picture: Image.Image, strength: float) -> Image.Image:
    return ImageEnhance.Sharpness(picture).enhance(_factor(strength))


def _factor(strength: float) -> float:
    """From 0.1 to 1.9; 1 changes nothing."""
    return 0.1 + 1.8 * abs(strength)


def _moved(
    picture: Image.Image, *, x_by_y: float = 0, y_by_x: float = 0, x: float = 0, y: float = 0
) -> Image.Image:
    """The picture sheared about its upper left corner or shifted by pixels, grey where it is not.

    Pillow asks where a pixel of the result comes from, which is the other way round.
    """
    places = (1, -x_by_y, -x, -y_by_x, 1, -y)
    return picture.transform(
        picture.size, Image.Transform.AFFINE, places, Image.Resampling.BILINEAR, fillcolor=_GREY
    )


def _rotate(picture: Image.Image, strength: float) -> Image.Image:
    return picture.rotate(30 * strength, Image.Resampling.BILINEAR, fillcolor=_GREY)


OPERATIONS: dict[str, Operation] = {
    "identity": lambda picture, _: picture,
    "auto_contrast": lambda picture, _: ImageOps.autocontrast(picture),
    "equalize": lambda picture, _: ImageOps.equalize(picture),
    "brightness": _brightness,
    "sharpness": _sharpness,
    "shear_x": lambda picture, strength: _moved(picture, x_by_y=0.3 * strength),
    "shear_y": lambda picture, strength: _moved(picture, y_by_x=0.3 * strength),
    "translate_x": lambda picture, strength: _moved(picture, x=10 * strength),
    "translate_y": lambda picture, strength: _moved(picture, y=10 * strength),
    "rotate": _rotate,
}
