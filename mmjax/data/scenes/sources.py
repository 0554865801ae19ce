"""The scenes as sources: random access to records, each made when it is asked for."""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from mmjax.data.scenes.codes import image_codes
from mmjax.data.scenes.drawing import draw
from mmjax.data.scenes.language import captions, statement_pair
from mmjax.data.scenes.questions import ANSWERS, ask
from mmjax.data.scenes.regions import region_annotations
from mmjax.data.scenes.world import (
    OBJECT_COUNTS,
    Scene,
    check_object_counts,
    check_split,
    make_scene,
)
from mmjax.errors import InputError

SMALLEST_IMAGE = 64
_SCENES_FOR_VOCABULARY = 1000


@dataclass(frozen=True)
class _SceneSource:
    """What the three sources share.

    Attributes:
      split: one of `SPLITS`.
      size: the number of records.
      seed: a seed is a data set; records of equal (split, seed, index) are equal for any size.
      image_size: width and height of the pictures, 64 pixels or more.
      regions: whether records carry the keys of `region_annotations` too.
      code_grid: if not 0, records carry `image_codes` too, those of so many patches a side.
    """

    split: str
    size: int
    seed: int = 0
    image_size: int = 64
    regions: bool = False
    code_grid: int = 0

    def __post_init__(self) -> None:
        check_split(self.split)
        if self.size < 1:
            raise InputError(f"size={self.size}: expected at least 1 record of scenes.")
        if self.image_size < SMALLEST_IMAGE:
            raise InputError(
                f"image_size={self.image_size}: scenes are drawn at {SMALLEST_IMAGE} pixels or"
                " more; below that patterns blur."
            )
        if not 0 <= self.code_grid <= self.image_size:
            raise InputError(
                f"code_grid={self.code_grid}: expected 0, or patches a side of {self.image_size}"
                " pixels."
            )

    def __len__(self) -> int:
        return self.size

    def texts(self) -> Iterator[str]:
        """Captions and questions to learn a vocabulary from: enough to see every word."""
        for number in range(_SCENES_FOR_VOCABULARY):
            yield from captions(make_scene(self.split, number, self.seed))
            yield ask(self.split, number, self.seed).text

    def _checked(self, index: int) -> int:
        if not 0 <= index < self.size:
            raise IndexError(f"record {index} of {self.size} in scenes/{self.split}")
        return int(index)

    def _picture(self, scene: Scene) -> dict[str, Any]:
        record: dict[str, Any] = {
            "image": draw(scene, self.image_size),
            "image_id": scene.number,
            "name": scene.name,
        }
        if self.regions:
            record |= region_annotations(scene, self.image_size)
        if self.code_grid:
            record["image_codes"] = image_codes(scene, self.image_size, self.code_grid)
        return record


@dataclass(frozen=True)
class Scenes(_SceneSource):
    """Pictures with captions: record i shows scene number i and adds `captions`, five of them.

    Attributes:
      object_counts: number of objects (2 to 4) of consecutive scenes, repeated.
    """

    object_counts: tuple[int, ...] = OBJECT_COUNTS

    def __post_init__(self) -> None:
        super().__post_init__()
        check_object_counts(self.object_counts)

    def __getitem__(self, index: int) -> dict[str, Any]:
        """The captions record of scene number `index`."""
        number = self._checked(index)
        scene = make_scene(self.split, number, self.seed, self.object_counts)
        return self._picture(scene) | {"captions": captions(scene)}


@dataclass(frozen=True)
class SceneQuestions(_SceneSource):
    """Questions: record i adds `question`, `answers`, `question_type` and `question_id`.

    The pictures are those of `Scenes` with the same split and seed: `image_id` is the scene's
    number, equal to the question's or a little beyond, so one picture may be asked about twice.
    """

    def __getitem__(self, index: int) -> dict[str, Any]:
        """The question record of this index."""
        index = self._checked(index)
        question = ask(self.split, index, self.seed)
        return self._picture(question.scene) | {
            "question": question.text,
            "answers": {question.answer: 1.0},
            "question_type": question.type,
            "question_id": index,
        }

    def answer_list(self) -> list[str]:
        """Every answer there is, in a fixed order."""
        return list(ANSWERS)


@dataclass(frozen=True)
class SceneStatements(_SceneSource):
    """True and false statements: record i adds `statement`, `label` (1, 0) and `statement_type`.

    Records 2k and 2k + 1 speak of scene number k: a true statement and the false one nearest to it.
    """

    def __getitem__(self, index: int) -> dict[str, Any]:
        """The statement record of this index."""
        number, is_false = divmod(self._checked(index), 2)
        scene = make_scene(self.split, number, self.seed)
        kind, true, false = statement_pair(scene)
        return self._picture(scene) | {
            "statement": false if is_false else true,
            "label": 1 - is_false,
            "statement_type": kind,
        }
