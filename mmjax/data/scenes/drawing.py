"""From scene graph to pixels, with Pillow."""

import functools
import math

import numpy as np
from jaxtyping import Bool, UInt8
from PIL import Image, ImageDraw

from mmjax.data.scenes.world import Scene, SceneObject

Point = tuple[float, float]
RGB = tuple[int, int, int]

_INK: dict[str, RGB] = {
    "red": (222, 30, 38),
    "orange": (255, 132, 0),
    "yellow": (248, 212, 0),
    "green": (20, 150, 60),
    "blue": (24, 76, 228),
    "purple": (124, 40, 168),
    "pink": (255, 120, 190),
    "black": (28, 28, 32),
}
_PAPER: RGB = (255, 255, 255)
_SUPERSAMPLING = 8


def draw(scene: Scene, image_size: int = 64) -> UInt8[np.ndarray, "height width 3"]:
    """The picture of a scene, `image_size` (64 or more) pixels wide and high, anti-aliased."""
    corners = Image.new("RGB", (2, 2))
    corners.putdata(scene.background)
    picture = corners.resize((image_size, image_size), Image.Resampling.BILINEAR)
    for thing in scene.objects:
        left, top, right, _ = pixel_box(thing, image_size)
        ink, paper = _stencils(thing.shape, thing.pattern, right - left)
        if paper is not None:
            picture.paste(_PAPER, (left, top), paper)
        picture.paste(_INK[thing.color], (left, top), ink)
    return np.array(picture)


def pixel_box(thing: SceneObject, image_size: int) -> tuple[int, int, int, int]:
    """(left, top, right, bottom) in pixels, tight around what is drawn; the last two exclusive."""
    side = round(thing.extent * image_size)
    left = round(thing.x * image_size - side / 2)
    top = round(thing.y * image_size - side / 2)
    return left, top, left + side, top + side


def silhouette(thing: SceneObject, image_size: int) -> Bool[np.ndarray, "side side"]:
    """Where in its box an object hides the background, with stripes and dots, without hollows."""
    left, _, right, _ = pixel_box(thing, image_size)
    ink, paper = _stencils(thing.shape, thing.pattern, right - left)
    return np.asarray(ink if paper is None else paper) > 127


@functools.lru_cache(maxsize=4096)
def _stencils(shape: str, pattern: str, side: int) -> tuple[Image.Image, Image.Image | None]:
    """Coverage of the object's color and, for striped and dotted ones, of the white below it.

    Every pattern keeps a rim of full color, which shows the shape. Drawing an object is then one or
    two pastes; the few hundred stencils of a picture size are drawn once.
    """
    large = side * _SUPERSAMPLING
    outline = [((x + 1) / 2 * (large - 1), (y + 1) / 2 * (large - 1)) for x, y in _outline(shape)]
    whole = Image.new("1", (large, large))
    ImageDraw.Draw(whole).polygon(outline, fill=1)
    if pattern == "solid":
        return _reduced(whole), None

    rim = 0.16 if pattern == "hollow" else 0.06
    ink = whole.copy()
    pen = ImageDraw.Draw(ink)
    match pattern:
        case "striped":
            for top in (0.16, 0.43, 0.70):
                pen.rectangle((0, top * large, large, (top + 0.13) * large), fill=0)
        case "dotted":
            spacing, radius = 0.28 * large, 0.09 * large
            for row in range(-2, 3):
                for column in range(-2, 3):
                    x = large / 2 + (column + 0.5 * (row % 2)) * spacing
                    y = large / 2 + row * spacing
                    pen.ellipse((x - radius, y - radius, x + radius, y + radius), fill=0)
        case "hollow":
            pen.rectangle((0, 0, large, large), fill=0)
    # A line drawn along the outline is half outside of the shape: cut that half off again.
    pen.line(
        [*outline, outline[0], outline[1]], fill=1, width=round(2 * rim * large), joint="curve"
    )
    ink.paste(0, (0, 0), Image.eval(whole.convert("L"), lambda value: 255 - value).convert("1"))
    return _reduced(ink), None if pattern == "hollow" else _reduced(whole)


def _reduced(stencil: Image.Image) -> Image.Image:
    return stencil.convert("L").reduce(_SUPERSAMPLING)


@functools.cache
def _outline(shape: str) -> tuple[Point, ...]:
    """A polygon whose bounding box is exactly the square from (-1, -1) to (1, 1), y down."""
    turns = [2 * math.pi * i / 96 for i in range(96)]
    points: list[Point]
    match shape:
        case "circle":
            points = [(math.sin(t), math.cos(t)) for t in turns]
        case "square":
            points = [(-1, -1), (1, -1), (1, 1), (-1, 1)]
        case "triangle":
            points = [(0, -1), (1, 1), (-1, 1)]
        case "star":
            points = [
                (radius * math.sin(t), -radius * math.cos(t))
                for t, radius in zip(
                    (math.pi * i / 5 for i in range(10)), (1.0, 0.45) * 5, strict=True
                )
            ]
        case "cross":
            arm = 0.38
            corner = [(-arm, -1), (arm, -1), (arm, -arm), (1, -arm)]
            points = corner + [(-y, x) for x, y in corner]
            points += [(-x, -y) for x, y in points]
        case "heart":
            points = [
                (
                    16 * math.sin(t) ** 3,
                    -13 * math.cos(t) + 5 * math.cos(2 * t) + 2 * math.cos(3 * t) + math.cos(4 * t),
                )
                for t in turns
            ]
        case _:
            raise ValueError(shape)
    xs, ys = _stretched([x for x, _ in points]), _stretched([y for _, y in points])
    return tuple(zip(xs, ys, strict=True))


def _stretched(values: list[float]) -> list[float]:
    low, high = min(values), max(values)
    return [2 * (value - low) / (high - low) - 1 for value in values]
