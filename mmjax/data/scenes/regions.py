"""What a detector would say about a scene: boxes, features, labels, attributes, tags."""

from typing import Any

import numpy as np
from jaxtyping import Float

from mmjax.data.scenes.drawing import pixel_box
from mmjax.data.scenes.world import (
    ATTRIBUTES,
    COLORS,
    MAX_OBJECTS,
    SHAPES,
    Scene,
    SceneObject,
    make_scene,
)

REGION_LABELS = SHAPES
REGION_ATTRIBUTES = COLORS
REGION_FEATURES = 64

_VALUES = [value for values in ATTRIBUTES.values() for value in values]
# RandomState's streams are frozen for good; those of numpy's newer generators may change.
_PROJECTION = np.random.RandomState(0).standard_normal((len(_VALUES), REGION_FEATURES)) / 2
_FEATURE_NOISE = 0.05
_LABEL_CONFIDENCE = 4.0  # log-odds, as soft as a good detector's


def region_annotations(scene: Scene, image_size: int = 64) -> dict[str, Any]:
    """The regions of a scene, one an object, padded to `MAX_OBJECTS` rows (R) with zeros.

    Returns:
      `boxes` float32 [R, 4]: x1, y1, x2, y2 as fractions of width and height, tight around the
        pixels drawn at `image_size`.
      `regions` float32 [R, `REGION_FEATURES`]: a fixed random projection of the attributes, with a
        little noise that belongs to the scene.
      `region_mask` bool [R]: True where there is an object.
      `region_labels` int32 [R]: into `REGION_LABELS`; 0 in padding.
      `region_attributes` int32 [R]: into `REGION_ATTRIBUTES`; 0 in padding.
      `region_distributions` float32 [R, len(REGION_LABELS)]: soft labels, highest at the true one;
        each object's row sums to 1.
      `tags` list[str]: the label word of each object, not padded.
    """
    rng = np.random.RandomState(scene.random("regions").getrandbits(32))
    count = len(scene.objects)
    labels = [SHAPES.index(thing.shape) for thing in scene.objects]
    attributes = [COLORS.index(thing.color) for thing in scene.objects]
    boxes = np.array([pixel_box(thing, image_size) for thing in scene.objects]) / image_size
    one_hot = np.array([_one_hot(thing) for thing in scene.objects])
    features = one_hot @ _PROJECTION
    features += _FEATURE_NOISE * rng.standard_normal(features.shape)
    logits = _LABEL_CONFIDENCE * np.eye(len(SHAPES))[labels]
    logits += rng.uniform(-0.5, 0.5, logits.shape)
    distributions = np.exp(logits) / np.exp(logits).sum(axis=1, keepdims=True)
    return {
        "boxes": _padded(boxes, np.float32),
        "regions": _padded(features, np.float32),
        "region_mask": np.arange(MAX_OBJECTS) < count,
        "region_labels": _padded(labels, np.int32),
        "region_attributes": _padded(attributes, np.int32),
        "region_distributions": _padded(distributions, np.float32),
        "tags": [thing.shape for thing in scene.objects],
    }


def blank_regions() -> dict[str, np.ndarray]:
    """The arrays of `region_annotations` where there is no picture: zeros.

    The mask is True on the first region, because attention needs something to look at.
    """
    annotations = region_annotations(make_scene("train", 0))
    del annotations["tags"]
    blank = {name: np.zeros_like(array) for name, array in annotations.items()}
    blank["region_mask"][0] = True
    return blank


def _one_hot(thing: SceneObject) -> Float[np.ndarray, " values"]:
    own = [getattr(thing, name) for name in ATTRIBUTES]
    return np.array([value in own for value in _VALUES], np.float64)


def _padded(rows: Any, dtype: Any) -> np.ndarray:
    rows = np.asarray(rows, dtype)
    padded = np.zeros((MAX_OBJECTS, *rows.shape[1:]), dtype)
    padded[: len(rows)] = rows
    return padded
