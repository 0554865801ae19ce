"""Scenes: an embedded data set of drawn pictures with captions, questions, statements and regions.

Pictures of two to four objects are drawn on the fly from (split, seed, number), so there is nothing
to download, and every text comes with a scene graph that says why it is true. Three sources share
the same pictures:

- `Scenes`: a picture and five captions a record;
- `SceneQuestions`: a question with its answer a record, balanced so that its text tells little;
- `SceneStatements`: a true or false statement a record, the false ones one word away from true.

The splits `train`, `validation` and `test` share no set of (color, shape) pairs. Every scene of the
fourth, `composition`, shows at least one pair of `HELD_OUT`, which the other three never show.

`python -m mmjax.data.scenes --output=FOLDER` draws a sheet of them to look at.
"""

from mmjax.data.scenes.codes import IMAGE_CODES, image_codes
from mmjax.data.scenes.drawing import draw, pixel_box
from mmjax.data.scenes.language import captions, statement_pair
from mmjax.data.scenes.questions import ANSWERS, QUESTION_TYPES, Question, ask
from mmjax.data.scenes.regions import (
    REGION_ATTRIBUTES,
    REGION_FEATURES,
    REGION_LABELS,
    blank_regions,
    region_annotations,
)
from mmjax.data.scenes.sources import SceneQuestions, Scenes, SceneStatements
from mmjax.data.scenes.world import (
    COLORS,
    HELD_OUT,
    MAX_OBJECTS,
    PATTERNS,
    RELATIONS,
    SHAPES,
    SIZES,
    SPLITS,
    Scene,
    SceneObject,
    make_scene,
)

__all__ = [
    "ANSWERS",
    "COLORS",
    "HELD_OUT",
    "IMAGE_CODES",
    "MAX_OBJECTS",
    "PATTERNS",
    "QUESTION_TYPES",
    "REGION_ATTRIBUTES",
    "REGION_FEATURES",
    "REGION_LABELS",
    "RELATIONS",
    "SHAPES",
    "SIZES",
    "SPLITS",
    "Question",
    "Scene",
    "SceneObject",
    "SceneQuestions",
    "SceneStatements",
    "Scenes",
    "ask",
    "blank_regions",
    "captions",
    "draw",
    "image_codes",
    "make_scene",
    "pixel_box",
    "region_annotations",
    "statement_pair",
]
