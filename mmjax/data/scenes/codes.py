"""What a picture's patches show, a code each: what a discrete tokenizer of images would say."""

import numpy as np
from jaxtyping import Int32

from mmjax.data.scenes.drawing import pixel_box, silhouette
from mmjax.data.scenes.world import PAIRS, Scene

IMAGE_CODES = 1 + len(PAIRS)


def image_codes(scene: Scene, image_size: int, grid: int) -> Int32[np.ndarray, " patches"]:
    """The codes of a scene's `grid * grid` patches, row by row, each below `IMAGE_CODES`.

    The code is what most pixels of the patch show: 0 is the background, 1 + i an object of the
    color and shape `PAIRS[i]`.
    """
    pixels = np.zeros((image_size, image_size), np.int32)
    for thing in scene.objects:
        left, top, right, bottom = pixel_box(thing, image_size)
        pixels[top:bottom, left:right][silhouette(thing, image_size)] = 1 + PAIRS.index(thing.pair)
    band = np.arange(image_size) * grid // image_size
    patch = band[:, None] * grid + band
    counts = np.bincount((patch * IMAGE_CODES + pixels).ravel(), minlength=grid**2 * IMAGE_CODES)
    return counts.reshape(grid**2, IMAGE_CODES).argmax(axis=1).astype(np.int32)
