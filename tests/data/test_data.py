"""What the keys of `config.data` make of the records."""

import numpy as np
import pytest

from mmjax.data import load_source, make_transform
from mmjax.data.pipeline import evaluation_batches, train_batches
from mmjax.data.scenes import IMAGE_CODES, REGION_FEATURES
from mmjax.data.tokenizer import TextTokenizer
from mmjax.errors import InputError

DATA = {
    "source": "scenes",
    "task": "captions",
    "root": "",
    "split": "train",
    "size": 6,
    "image_size": 64,
    "text_length": 40,
    "regions": False,
    "tags": False,
    "false_tags": False,
    "second_caption": False,
    "code_grid": 0,
    "prompt": "",
    "answer_length": 0,
    "answer_count": 1,
    "crop_scale": 1.0,
    "flip": False,
    "randaugment": (0, 0),
}
EVERYTHING = {
    "regions": True,
    "tags": True,
    "false_tags": True,
    "code_grid": 8,
    "prompt": "a picture of ",
    "answer_length": 6,
    "answer_count": 2,
}
PLAIN = {
    "image": ((4, 64, 64, 3), "uint8"),
    "text": ((4, 40), "int32"),
    "text_mask": ((4, 40), "bool"),
    "image_id": ((4,), "int32"),
    "index": ((4,), "int32"),
    "valid": ((4,), "bool"),
    "substituted": ((4,), "bool"),
}
REGIONS = {
    "boxes": ((4, 4, 4), "float32"),
    "regions": ((4, 4, REGION_FEATURES), "float32"),
    "region_mask": ((4, 4), "bool"),
    "region_labels": ((4, 4), "int32"),
    "region_attributes": ((4, 4), "int32"),
    "region_distributions": ((4, 4, 6), "float32"),
}
CODES = {"image_codes": ((4, 64), "int32")}
TYPES = {"text_type": ((4, 40), "int32")}
LABEL = {"label": ((4,), "int32")}
ANSWER = {"answer": ((4, 2), "float32")}
WRITTEN = {
    "answer_text": ((4, 2, 6), "int32"),
    "answer_text_mask": ((4, 2, 6), "bool"),
    "answer_weight": ((4, 2), "float32"),
}


@pytest.fixture(scope="module")
def tokenizer():
    return TextTokenizer.train(load_source(DATA).texts(), 400)


def batches(data, tokenizer, *, training, processes=1, process=0):
    source = load_source(data)
    transform = make_transform(data, tokenizer, ("yes", "no"), augment=training)
    options = {"batch_size": 4, "process_index": process, "process_count": processes}
    if not training:
        return list(evaluation_batches(source, transform, **options))
    stream = train_batches(source, transform, seed=5, **options)
    taken = [next(stream) for _ in range(3)]
    stream.close()
    return taken


CASES = [
    ({}, PLAIN),
    ({"regions": True}, PLAIN | REGIONS),
    ({"code_grid": 8}, PLAIN | CODES),
    ({"tags": True}, PLAIN | TYPES),
    ({"tags": True, "false_tags": True}, PLAIN | TYPES | LABEL),
    ({"second_caption": True}, PLAIN | TYPES | LABEL),
    (EVERYTHING, PLAIN | REGIONS | CODES | TYPES | LABEL),
    ({"task": "questions"}, PLAIN | ANSWER),
    (
        {"task": "questions", **EVERYTHING},
        PLAIN | REGIONS | CODES | TYPES | ANSWER | WRITTEN,
    ),
    ({"task": "statements"}, PLAIN | LABEL),
    ({"task": "statements", **EVERYTHING}, PLAIN | REGIONS | CODES | TYPES | LABEL),
    ({"crop_scale": 0.2, "flip": True, "randaugment": [2, 7]}, PLAIN),
]


@pytest.mark.parametrize(("changes", "expected"), CASES)
def test_fields_of_the_batches(changes, expected, tokenizer):
    data = DATA | changes
    for training in (True, False):
        for batch in batches(data, tokenizer, training=training):
            found = {name: (value.shape, value.dtype.name) for name, value in batch.items()}
            assert found == expected
            assert all(
                value.any(axis=-1).all() for name, value in batch.items() if name.endswith("mask")
            )
    assert batch["valid"].tolist() == [True, True, False, False]


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("changes", [changes for changes, _ in CASES])
def test_two_processes_share_the_batches_of_one(changes, training, tokenizer):
    data = DATA | changes
    wholes = batches(data, tokenizer, training=training)
    halves = [batches(data, tokenizer, training=training, processes=2, process=i) for i in range(2)]
    for whole, first, second in zip(wholes, *halves, strict=True):
        for field, rows in whole.items():
            joined = np.concatenate([first[field], second[field]])
            np.testing.assert_array_equal(joined, rows, err_msg=field)


def test_fields_hold_what_the_scene_shows(tokenizer):
    data = DATA | EVERYTHING | {"false_tags": False}
    source = load_source(data)
    (batch, _) = batches(data, tokenizer, training=False)
    for row in range(4):
        record = source[row]
        for name in (*REGIONS, *CODES):
            np.testing.assert_array_equal(batch[name][row], record[name])
        text, mask = batch["text"][row], batch["text_mask"][row]
        second = tokenizer.decode(text[mask & (batch["text_type"][row] == 1)])
        assert second == " ".join(record["tags"])
        assert tokenizer.decode(text).startswith("a picture of ")
    assert 0 < batch["image_codes"].max() < IMAGE_CODES


def test_question_only_shows_nothing(tokenizer):
    data = DATA | EVERYTHING | {"task": "questions"}
    example = make_transform(data, tokenizer, question_only=True)(load_source(data)[0])
    assert (example["image"] == 128).all()
    assert not example["regions"].any()
    assert not example["image_codes"].any()
    assert example["text_type"].sum() == 1


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"tags": True, "second_caption": True}, r"data\.tags and data\.second_caption"),
        ({"false_tags": True}, r"data\.false_tags .* data\.tags=True"),
        ({"regions": True, "flip": True}, r"data\.regions .* data\.flip=False"),
        ({"regions": True, "crop_scale": 0.5}, r"data\.regions .* data\.crop_scale=1\.0"),
        ({"code_grid": 8, "randaugment": (1, 3)}, r"data\.code_grid .* data\.randaugment"),
        ({"randaugment": (2, 70)}, r"data\.randaugment"),
    ],
)
def test_keys_that_cannot_go_together_are_refused(changes, message, tokenizer):
    with pytest.raises(InputError, match=message):
        make_transform(DATA | changes, tokenizer, augment=True)


def test_pictures_that_are_not_changed_may_have_regions(tokenizer):
    make_transform(DATA | {"regions": True, "flip": True}, tokenizer)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"task": "caption"}, r"data\.task is 'caption'\. Did you mean captions"),
        ({"source": "scene"}, r"data\.source is 'scene'\. Did you mean scenes"),
        ({"source": "flickr8k"}, r"data\.root is empty"),
        ({"source": "flickr8k", "task": "statements"}, "captions only"),
        *(
            (
                {"source": "flickr8k", "root": "/", key: value},
                rf"data\.{key} is {value}.*to {off}\.",
            )
            for key, value, off in (
                ("regions", True, False),
                ("tags", True, False),
                ("code_grid", 7, 0),
            )
        ),
    ],
)
def test_sources_refuse_what_they_have_not(changes, message):
    with pytest.raises(InputError, match=message):
        load_source(DATA | changes)


def test_flickr8k_has_second_captions(shared):
    data = DATA | {"source": "flickr8k", "root": str(shared / "data/flickr8k"), "split": "dev"}
    data |= {"second_caption": True, "size": 16, "text_length": 64}
    source = load_source(data)
    tokenizer = TextTokenizer.train(source.texts(), 2000)
    labels = []
    for batch in batches(data, tokenizer, training=True):
        for index, text, types, label in zip(
            *(batch[name] for name in ("index", "text", "text_type", "label")), strict=True
        ):
            first, second = (text[(types == kind) & (text != tokenizer.pad_id)] for kind in (0, 1))
            own = [tokenizer.encode(caption, 64) for caption in source[index]["captions"]]
            own = [ids[mask].tolist()[1:] for ids, mask in own]
            assert first.tolist()[1:] in own
            assert (second.tolist() in own) == label
            labels.append(label)
    assert 0 < sum(labels) < len(labels)
