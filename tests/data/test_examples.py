"""What the fields of an example hold, with everything that a recipe may ask for."""

import pickle

import numpy as np
import pytest

from mmjax.data.examples import CaptionExample, QuestionExample, StatementExample
from mmjax.data.image import Augment, BadRecord
from mmjax.data.pipeline import TextExample, evaluation_batches, train_batches
from mmjax.data.tokenizer import TextTokenizer

WORDS = ["red", "green", "blue", "dog", "cat", "left", "right", "a", "what", "is", "it", "one"]
TOKENIZER = TextTokenizer.train(WORDS * 2, 200)
ARRAYS = {
    "boxes": np.zeros((2, 4), np.float32),
    "region_mask": np.array([True, False]),
    "image_codes": np.zeros(9, np.int32),
}
TAGS = ("dog cat", "cat", "red dog", "blue", "green")


class Pictures:
    """Five small pictures with all that a record may have; `each` captions a picture."""

    def __init__(self, each=3):
        self.each = each

    def __len__(self):
        return 5

    def __getitem__(self, row):
        return {
            "image": np.random.default_rng(row).integers(0, 256, (8, 8, 3), np.uint8),
            "image_id": 100 + row,
            "name": f"picture {row}",
            "captions": [f"{word} {TAGS[row]}" for word in WORDS[: self.each]],
            "question": "what is it",
            "answers": {"cat": 0.3, "dog": 1.0, "unlisted": 0.6},
            "statement": "it is a dog",
            "label": row % 2,
            "tags": TAGS[row].split(),
            "boxes": np.full((2, 4), row, np.float32),
            "region_mask": np.array([True, True]),
            "image_codes": np.full(9, row, np.int32),
        }


RECORD = Pictures()[0]


def rng(seed=0):
    return np.random.default_rng(seed)


def read(example):
    """The tokens of an example, and the types of those that are not padding."""
    count = example["text_mask"].sum()
    assert example["text_mask"][:count].all()
    types = example["text_type"].tolist() if "text_type" in example else None
    assert types is None or not any(types[count:])
    return " ".join(TOKENIZER.tokens(example["text"][:count])), types and types[:count]


CAPTION = CaptionExample(TOKENIZER, 8, 12)
TRANSFORMS = [
    CAPTION,
    CaptionExample(TOKENIZER, 8, 12, Augment(0.5, flip=True, randaugment=(2, 7)), prompt="a"),
    CaptionExample(TOKENIZER, 8, 12, arrays=ARRAYS, tags=True, others=Pictures()),
    CaptionExample(TOKENIZER, 8, 12, second_caption=True, others=Pictures()),
    QuestionExample(TOKENIZER, 8, 12, answers=("cat",)),
    QuestionExample(
        TOKENIZER, 8, 12, arrays=ARRAYS, tags=True, blind=True, answer_length=5, answer_count=2
    ),
    StatementExample(TOKENIZER, 8, 12, arrays=ARRAYS, tags=True),
    TextExample(TOKENIZER, 6),
]


@pytest.mark.parametrize("transform", TRANSFORMS)
def test_transforms_travel_and_fill_their_own_shapes(transform):
    again = pickle.loads(pickle.dumps(transform))
    for seed in range(4):
        example, blank = transform(RECORD, rng(seed)), transform.blank()
        same = again(RECORD, rng(seed))
        assert blank.keys() == example.keys() == same.keys()
        for field, value in example.items():
            assert (blank[field].shape, blank[field].dtype) == (value.shape, value.dtype)
            np.testing.assert_array_equal(same[field], value, err_msg=field)
        assert blank["image_id"] == -1


@pytest.mark.parametrize("transform", TRANSFORMS)
def test_global_batch_is_the_same_for_any_process_count(transform):
    def batches(index, count):
        stream = train_batches(
            Pictures(), transform, batch_size=4, seed=1, process_index=index, process_count=count
        )
        taken = [next(stream) for _ in range(4)]
        stream.close()
        return taken

    for whole, first, second in zip(batches(0, 1), batches(0, 2), batches(1, 2), strict=True):
        for field, rows in whole.items():
            np.testing.assert_array_equal(np.concatenate([first[field], second[field]]), rows)


@pytest.mark.parametrize("transform", TRANSFORMS)
def test_no_mask_of_a_blank_example_is_without_a_token(transform):
    masks = {name: mask for name, mask in transform.blank().items() if name.endswith("mask")}
    for name, mask in masks.items():
        assert mask.any(axis=-1).all(), name


@pytest.mark.parametrize("captions", [[], ["  "]])
def test_empty_caption_is_a_bad_record(captions):
    with pytest.raises(BadRecord, match="picture 0: a caption is empty"):
        CAPTION({**RECORD, "captions": captions})


def test_empty_question_and_statement_are_bad_records():
    with pytest.raises(BadRecord, match="picture 0: the question is empty"):
        QuestionExample(TOKENIZER, 8, 6)({**RECORD, "question": " "})
    with pytest.raises(BadRecord, match="picture 0: the statement is empty"):
        StatementExample(TOKENIZER, 8, 6)({**RECORD, "statement": " "})


def test_no_flip_where_a_text_speaks_of_sides():
    flip = Augment(flip=True)

    def flips(transform, **changes):
        images = [transform({**RECORD, **changes}, rng(i))["image"] for i in range(20)]
        assert all(
            (image == RECORD["image"]).all() or (image == RECORD["image"][:, ::-1]).all()
            for image in images
        )
        return sum((image != RECORD["image"]).any() for image in images)

    captions = CaptionExample(TOKENIZER, 8, 6, flip)
    assert flips(captions) > 0
    assert flips(captions, captions=["bright red dog"]) > 0
    assert flips(captions, captions=["a dog LEFT of a cat"]) == 0
    assert flips(captions, captions=["the rightmost dog"]) == 0
    pairs = CaptionExample(TOKENIZER, 8, 9, flip, second_caption=True)
    assert flips(pairs) > 0
    assert flips(pairs, captions=["a dog", "left of it"]) == 0
    questions = QuestionExample(TOKENIZER, 8, 6, flip)
    assert flips(questions) > 0
    assert flips(questions, answers={"left": 1.0}) == 0
    statements = StatementExample(TOKENIZER, 8, 6, flip)
    assert flips(statements) > 0
    assert flips(statements, statement="it is left") == 0


def test_arrays_are_those_of_the_record_unless_nothing_may_be_seen():
    for transform in (CaptionExample, QuestionExample, StatementExample):
        example = transform(TOKENIZER, 8, 12, arrays=ARRAYS)({**RECORD, **Pictures()[3]})
        for name in ARRAYS:
            np.testing.assert_array_equal(example[name], Pictures()[3][name])
    blind = QuestionExample(TOKENIZER, 8, 12, arrays=ARRAYS, tags=True, blind=True)(RECORD)
    assert (blind["image"] == 128).all()
    for name, value in ARRAYS.items():
        np.testing.assert_array_equal(blind[name], value)
    assert read(blind)[0] == "[CLS] what is it [SEP] [SEP]"
    assert blind["image_id"] == 100


def test_a_prompt_stands_before_every_caption():
    prompted = CaptionExample(TOKENIZER, 8, 12, prompt="what is")
    assert read(prompted(RECORD))[0] == "[CLS] what is red dog cat [SEP]"
    assert TOKENIZER.count("what is") == 2
    paired = CaptionExample(TOKENIZER, 8, 12, prompt="what is", tags=True)
    assert read(paired(RECORD))[0] == "[CLS] what is red dog cat [SEP] dog cat [SEP]"


def test_tags_are_a_second_text():
    for transform, text in (
        (CaptionExample, "red dog cat"),
        (QuestionExample, "what is it"),
        (StatementExample, "it is a dog"),
    ):
        example = transform(TOKENIZER, 8, 12, tags=True)(RECORD)
        first = len(text.split()) + 2
        assert read(example) == (f"[CLS] {text} [SEP] dog cat [SEP]", [0] * first + [1] * 3)
        assert example["text_type"].dtype == np.int32


def test_half_of_the_tags_are_those_of_another_picture():
    transform = CaptionExample(TOKENIZER, 8, 12, tags=True, others=Pictures())
    labels = []
    for seed in range(200):
        example = transform(RECORD, rng(seed))
        second = read(example)[0].split(" [SEP]")[1].strip()
        assert (second == TAGS[0]) == (example["label"] == 1)
        assert second in TAGS
        labels.append(example["label"])
    assert 70 < sum(labels) < 130
    assert example["label"].dtype == np.int32
    assert "label" not in CaptionExample(TOKENIZER, 8, 12, tags=True)(RECORD)


def test_the_second_caption_is_another_one_and_the_label_says_whose():
    transform = CaptionExample(TOKENIZER, 8, 14, second_caption=True, others=Pictures())
    labels, seconds = [], set()
    for seed in range(200):
        example = transform(RECORD, rng(seed))
        first, second = (part.split() for part in read(example)[0].split(" [SEP]")[:2])
        assert " ".join(first[2:]) == TAGS[0]
        assert (" ".join(second[1:]) == TAGS[0]) == (example["label"] == 1)
        assert first[1:] != second
        labels.append(example["label"])
        seconds.add(" ".join(second))
    assert 70 < sum(labels) < 130
    assert seconds == {f"{word} {tags}" for word in WORDS[:3] for tags in TAGS}


def test_in_evaluation_the_second_caption_belongs_to_the_picture():
    transform = CaptionExample(TOKENIZER, 8, 14, second_caption=True, others=Pictures())
    source = Pictures()
    (once,), (again,) = (list(evaluation_batches(source, transform, batch_size=5)) for _ in "ab")
    np.testing.assert_array_equal(once["text"], again["text"])
    np.testing.assert_array_equal(once["label"], again["label"])
    labels = [transform({**RECORD, "image_id": number})["label"] for number in range(200)]
    assert 70 < sum(labels) < 130


def test_a_second_caption_must_be_there():
    transform = CaptionExample(TOKENIZER, 8, 14, second_caption=True)
    with pytest.raises(BadRecord, match="picture 0: there is no second caption"):
        transform(Pictures(each=1)[0])

    class Alone(Pictures):
        def __len__(self):
            return 1

    transform = CaptionExample(TOKENIZER, 8, 14, second_caption=True, others=Alone())
    with pytest.raises(BadRecord, match="picture 0: there is no other picture"):
        [transform(RECORD, rng(seed)) for seed in range(20)]


def test_question_scores_follow_the_answer_list():
    transform = QuestionExample(TOKENIZER, 8, 6, answers=("cat", "yes", "dog"))
    (batch,) = evaluation_batches(Pictures(), transform, batch_size=5)
    assert batch["answer"].dtype == np.float32
    np.testing.assert_allclose(batch["answer"], [[0.3, 0, 1]] * 5)
    assert TOKENIZER.decode(batch["text"][0]) == "what is it"


def test_answers_are_written_best_first_with_their_scores():
    transform = QuestionExample(TOKENIZER, 8, 6, answer_length=4, answer_count=4)
    example = transform({**RECORD, "answers": {"cat": 0.3, "red dog": 1.0, "one": 0.3}})
    assert example["answer_text"].dtype == np.int32
    texts = [TOKENIZER.tokens(row[mask]) for row, mask in zip(*fields(example), strict=True)]
    assert texts == [
        ["[CLS]", "red", "dog", "[SEP]"],
        ["[CLS]", "cat", "[SEP]"],
        ["[CLS]", "one", "[SEP]"],
        ["[CLS]", "[SEP]"],
    ]
    np.testing.assert_allclose(example["answer_weight"], [1.0, 0.3, 0.3, 0.0])
    assert example["answer_weight"].dtype == np.float32


def fields(example):
    return example["answer_text"], example["answer_text_mask"]


def test_the_worst_answers_are_left_out_and_all_end():
    tokenizer = TOKENIZER.with_end_token(False)
    example = QuestionExample(tokenizer, 8, 6, answer_length=3)(RECORD)
    assert tokenizer.tokens(example["answer_text"][0]) == ["[CLS]", "dog", "[SEP]"]
    assert example["answer_weight"].tolist() == [1.0]
    assert tokenizer.tokens(example["text"][:5]) == ["[CLS]", "what", "is", "it", "[PAD]"]


def test_statements_have_their_label():
    source = Pictures()
    transform = StatementExample(TOKENIZER, 8, 8)
    labels = [transform(source[row])["label"] for row in range(3)]
    assert labels == [0, 1, 0]
    assert labels[0].dtype == np.int32
    assert read(transform(source[0]))[0] == "[CLS] it is a dog [SEP]"
