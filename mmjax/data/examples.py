"""From records to examples: a picture, a text, and what the task asks of the two."""

import functools
import itertools
import re
from collections.abc import Mapping
from dataclasses import dataclass, field

import numpy as np
from jaxtyping import Float32

from mmjax.data.image import Augment, BadRecord, load_image
from mmjax.data.pipeline import Example, Record, Source
from mmjax.data.tokenizer import TextTokenizer

_GREY = 128
_SIDES = re.compile(r"\b(left|right)", re.IGNORECASE)


@dataclass(frozen=True)
class PictureExample:
    """What the examples of all tasks share: a picture and a text.

    The fields are image, text, text_mask, image_id, those of `arrays`, and, where there are two
    texts, text_type.

    Attributes:
      tokenizer: makes token ids of texts.
      image_size: pixels a side.
      text_length: tokens, special ones included.
      augment: the random changes to the picture in training.
      arrays: what records say about the picture in arrays, regions and codes: fields by name, as
        they are where there is no picture.
      tags: read a record's `tags` as a second text (Li et al. 2020, Oscar, section 3).
      blind: every picture is the same mid-grey, with nothing found in it, and none is read: what
        can be answered then, the text alone gives away.
    """

    tokenizer: TextTokenizer
    image_size: int
    text_length: int
    augment: Augment | None = None
    arrays: Mapping[str, np.ndarray] = field(default_factory=dict)
    tags: bool = False
    blind: bool = False

    def _picture(self, record: Record, rng: np.random.Generator | None, spoken: str) -> Example:
        """`spoken` is everything said about the picture, which may speak of its sides."""
        image_id = {"image_id": np.int32(record["image_id"])}
        if self.blind:
            return self._no_picture() | image_id
        image = load_image(
            record["image"],
            record["name"],
            self.image_size,
            augment=self.augment,
            rng=rng,
            may_flip=_SIDES.search(spoken) is None,
        )
        return {"image": image, **{name: record[name] for name in self.arrays}, **image_id}

    def _no_picture(self) -> Example:
        grey = np.full((self.image_size, self.image_size, 3), _GREY, np.uint8)
        return {"image": grey, **self.arrays, "image_id": np.int32(-1)}

    def _text(self, text: str, second: str | None) -> Example:
        if second is None:
            ids, mask = self.tokenizer.encode(text, self.text_length)
            return {"text": ids, "text_mask": mask}
        ids, mask, types = self.tokenizer.encode_pair(text, second, self.text_length)
        return {"text": ids, "text_mask": mask, "text_type": types}

    def _tags(self, record: Record) -> str | None:
        if not self.tags:
            return None
        return "" if self.blind else " ".join(record["tags"])

    def _no_text(self) -> Example:
        return self._text("", "" if self._two_texts else None)

    @property
    def _two_texts(self) -> bool:
        return self.tags


@dataclass(frozen=True)
class CaptionExample(PictureExample):
    """A picture with one of its captions: any in training, the first in evaluation.

    With `others` the second text, tags or a caption, is in half of the examples that of another
    picture, and `label` int32 says whether it is this one's: 1 or 0 (Oscar, section 3, of tags;
    VisualBERT, section 3.3, of captions). In evaluation that draw belongs to the picture.

    Attributes:
      prompt: words put before every caption.
      second_caption: read another caption of the picture as a second text.
      others: the source of second texts that are not the picture's.
    """

    prompt: str = ""
    second_caption: bool = False
    others: Source | None = None

    def __call__(self, record: Record, rng: np.random.Generator | None = None) -> Example:
        """The example of a record. Raises `BadRecord`."""
        captions = record["captions"]
        if not captions or not all(caption.strip() for caption in captions):
            raise BadRecord(record["name"], "a caption is empty or there is none")
        caption = captions[0] if rng is None else captions[rng.integers(len(captions))]
        second, label = self._second(record, caption, rng)
        picture = self._picture(record, rng, spoken=f"{caption} {second or ''}")
        text = self._text(f"{self.prompt} {caption}" if self.prompt else caption, second)
        return {**picture, **text, **label}

    def blank(self) -> Example:
        """An example without content."""
        label = {} if self.others is None else {"label": np.int32(0)}
        return {**self._no_picture(), **self._no_text(), **label}

    @property
    def _two_texts(self) -> bool:
        return self.tags or self.second_caption

    def _second(
        self, record: Record, first: str, rng: np.random.Generator | None
    ) -> tuple[str | None, Example]:
        """The second text, if there is to be one, and the label that says whose it is."""
        if not self._two_texts:
            return None, {}
        draws = np.random.default_rng(record["image_id"]) if rng is None else rng
        own = self._second_of(record, draws, besides=first)
        if self.others is None:
            return own, {}
        is_own = draws.random() < 0.5
        second = own if is_own else self._second_of_another(record, own, draws)
        return second, {"label": np.int32(is_own)}

    def _second_of(self, record: Record, rng: np.random.Generator, besides: str = "") -> str:
        if (tags := self._tags(record)) is not None:
            return tags
        captions = [caption for caption in record["captions"] if caption != besides]
        if not captions:
            raise BadRecord(record["name"], "there is no second caption")
        return captions[rng.integers(len(captions))]

    def _second_of_another(self, record: Record, own: str, rng: np.random.Generator) -> str:
        """From a row drawn at random, or the first after it with another picture and text."""
        assert self.others is not None
        rows = len(self.others)
        start = int(rng.integers(rows))
        for row in itertools.chain(range(start, rows), range(start)):
            other = self.others[row]
            second = self._second_of(other, rng)
            if other["image_id"] != record["image_id"] and second != own:
                return second
        raise BadRecord(record["name"], "there is no other picture to take a second text from")


@dataclass(frozen=True)
class QuestionExample(PictureExample):
    """A picture, a question about it and its answers with their soft scores.

    The fields are `answer` float32 [A], a score for each of the closed list `answers`, where others
    score nothing: they cannot be given; and, for models that write their answers, if
    `answer_length` is not 0: `answer_text` int32 [K, L] and `answer_text_mask` bool [K, L], the
    best `answer_count` answers, which all end in `[SEP]`, and their scores `answer_weight` float32
    [K], 0 where there are fewer. ALBEF's weights are the shares of annotators (Li et al. 2021,
    section 5).
    """

    answers: tuple[str, ...] = ()
    answer_length: int = 0
    answer_count: int = 1

    def __call__(self, record: Record, rng: np.random.Generator | None = None) -> Example:
        """The example of a record. Raises `BadRecord`."""
        question, scores = record["question"], record["answers"]
        if not question.strip():
            raise BadRecord(record["name"], "the question is empty")
        picture = self._picture(record, rng, spoken=" ".join([question, *scores]))
        return {**picture, **self._text(question, self._tags(record)), **self._answers(scores)}

    def blank(self) -> Example:
        """An example without content."""
        return {**self._no_picture(), **self._no_text(), **self._answers({})}

    def _answers(self, scores: Mapping[str, float]) -> Example:
        chosen = {"answer": self._scores(scores)}
        return {**chosen, **self._written(scores)} if self.answer_length else chosen

    def _scores(self, answers: Mapping[str, float]) -> Float32[np.ndarray, " answers"]:
        scores = np.zeros(len(self.answers), np.float32)
        for answer, score in answers.items():
            if answer in self._columns:
                scores[self._columns[answer]] = score
        return scores

    @functools.cached_property
    def _columns(self) -> dict[str, int]:
        return {answer: column for column, answer in enumerate(self.answers)}

    def _written(self, scores: Mapping[str, float]) -> Example:
        best = sorted(scores, key=lambda answer: -scores[answer])[: self.answer_count]
        rows = best + [""] * (self.answer_count - len(best))
        encode = functools.partial(self.tokenizer.encode, length=self.answer_length, end_token=True)
        ids, masks = zip(*map(encode, rows), strict=True)
        weights = np.zeros(self.answer_count, np.float32)
        weights[: len(best)] = [scores[answer] for answer in best]
        return {
            "answer_text": np.stack(ids),
            "answer_text_mask": np.stack(masks),
            "answer_weight": weights,
        }


@dataclass(frozen=True)
class StatementExample(PictureExample):
    """A picture and a statement about it; `label` int32 is 1 where that is true, otherwise 0."""

    def __call__(self, record: Record, rng: np.random.Generator | None = None) -> Example:
        """The example of a record. Raises `BadRecord`."""
        statement = record["statement"]
        if not statement.strip():
            raise BadRecord(record["name"], "the statement is empty")
        picture = self._picture(record, rng, spoken=statement)
        text = self._text(statement, self._tags(record))
        return {**picture, **text, "label": np.int32(record["label"])}

    def blank(self) -> Example:
        """An example without content."""
        return {**self._no_picture(), **self._no_text(), "label": np.int32(0)}
