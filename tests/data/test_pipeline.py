import threading
from concurrent.futures import ThreadPoolExecutor
from itertools import islice

import numpy as np
import pytest
from absl import logging

from mmjax.data import pipeline
from mmjax.data.examples import CaptionExample, QuestionExample
from mmjax.data.flickr8k import Flickr8k
from mmjax.data.image import Augment, BadRecord
from mmjax.data.pipeline import (
    EveryCaption,
    TextExample,
    evaluation_batches,
    train_batches,
)
from mmjax.data.tokenizer import TextTokenizer
from mmjax.errors import InputError

WORDS = ["red", "green", "blue", "dog", "cat", "left", "right", "a", "what", "is", "it"]
TOKENIZER = TextTokenizer.train(WORDS * 2, 200)


class Pictures:
    """Tiny records, each telling its row by its pixels; rows in `bad` are truncated."""

    def __init__(self, length, bad=(), size=12):
        self.length, self.bad, self.size = length, frozenset(bad), size
        self.lock = threading.Lock()
        self.reads = []

    def __len__(self):
        return self.length

    def __getitem__(self, row):
        with self.lock:
            self.reads.append(row)
        image = np.random.default_rng(row).integers(0, 256, (self.size, self.size, 3), np.uint8)
        image[0, 0] = row
        return {
            "image": b"\xff\xd8 cut off" if row in self.bad else image,
            "image_id": 100 + row,
            "name": f"picture {row}",
            "captions": [f"{WORDS[row % 3]} dog", "a cat", "is it"][: 1 + row % 3],
            "question": "what is it",
            "answers": {"dog": 1.0, "cat": 0.3, "unlisted": 0.6},
        }

    def __getstate__(self):
        return {**self.__dict__, "lock": None}

    def __setstate__(self, state):
        self.__dict__.update(state, lock=threading.Lock())


CHANGING = CaptionExample(TOKENIZER, 8, 6, Augment(crop_scale=0.3, flip=True))
PLAIN = CaptionExample(TOKENIZER, 12, 6)


def take(count, source, transform=CHANGING, *, batch_size=8, seed=3, **options):
    batches = train_batches(source, transform, batch_size=batch_size, seed=seed, **options)
    taken = list(islice(batches, count))
    batches.close()
    return taken


def assert_equal_batches(actual, expected):
    assert len(actual) == len(expected)
    for a, b in zip(actual, expected, strict=True):
        assert a.keys() == b.keys()
        for field in a:
            np.testing.assert_array_equal(a[field], b[field], err_msg=field)


def join(parts):
    """The global batches of several processes' batches."""
    return [
        {field: np.concatenate([batch[field] for batch in step]) for field in step[0]}
        for step in zip(*parts, strict=True)
    ]


def test_fields_shapes_and_types():
    (batch,) = take(1, Pictures(20))
    assert {field: (array.shape, array.dtype.name) for field, array in batch.items()} == {
        "image": ((8, 8, 8, 3), "uint8"),
        "text": ((8, 6), "int32"),
        "text_mask": ((8, 6), "bool"),
        "image_id": ((8,), "int32"),
        "index": ((8,), "int32"),
        "valid": ((8,), "bool"),
        "substituted": ((8,), "bool"),
    }
    np.testing.assert_array_equal(batch["image_id"], batch["index"] + 100)
    assert batch["valid"].all()
    assert not batch["substituted"].any()


@pytest.mark.parametrize("processes", [2, 4])
def test_global_batch_is_the_same_for_any_process_count(processes):
    """Row for row, with augmentation, bad records and epochs that end within a batch."""
    source = Pictures(13, bad=[4, 9])
    parts = [take(6, source, process_index=i, process_count=processes) for i in range(processes)]
    assert_equal_batches(join(parts), take(6, source))


@pytest.mark.parametrize("options", [{"threads": 0}, {"threads": 1, "prefetch": 1}])
def test_threads_change_nothing(options):
    assert_equal_batches(take(5, Pictures(13), **options), take(5, Pictures(13)))


@pytest.mark.parametrize("process_count", [1, 2])
def test_resumed_stream_is_the_uninterrupted_one(process_count):
    options = {"process_index": process_count - 1, "process_count": process_count}
    whole = take(7, Pictures(13, bad=[2]), **options)
    assert_equal_batches(take(3, Pictures(13, bad=[2]), start_step=4, **options), whole[4:])


def test_worker_processes_change_nothing():
    source = Pictures(13, bad=[2])
    whole = take(6, source)
    assert_equal_batches(take(4, source, start_step=2, workers=2, threads=1), whole[2:])


def test_every_epoch_has_every_record_once_in_another_order():
    rows = np.concatenate([batch["index"] for batch in take(15, Pictures(24))])
    epochs = rows.reshape(5, 24)
    np.testing.assert_array_equal(np.sort(epochs, axis=1), np.tile(np.arange(24), (5, 1)))
    assert len({tuple(epoch) for epoch in epochs}) == 5


def test_seed_decides_the_order_and_the_augmentation():
    first, again, other = (take(1, Pictures(24), seed=seed)[0] for seed in (3, 3, 4))
    assert_equal_batches([first], [again])
    assert (first["index"] != other["index"]).any()


def test_augmentation_of_a_record_differs_between_epochs():
    batches = take(2, Pictures(8))
    by_row = [dict(zip(b["index"].tolist(), b["image"], strict=True)) for b in batches]
    assert sum((by_row[0][row] != by_row[1][row]).any() for row in range(8)) >= 7


def test_a_source_smaller_than_a_batch_is_repeated():
    (batch,) = take(1, Pictures(3), batch_size=8)
    assert np.bincount(batch["index"]).tolist() in ([3, 3, 2], [3, 2, 3], [2, 3, 3])


def test_a_process_reads_only_its_own_rows():
    source = Pictures(64)
    (batch,) = take(1, source, process_index=1, process_count=4, threads=0)
    assert len(batch["index"]) == 2
    assert source.reads == batch["index"].tolist()


def test_resuming_reads_nothing_of_what_it_skips():
    source = Pictures(64)
    (batch,) = take(1, source, start_step=1000, threads=0)
    assert source.reads == batch["index"].tolist()


def test_training_draws_all_captions_and_evaluation_takes_the_first():
    source = Pictures(3)
    firsts = {TOKENIZER.encode(source[2]["captions"][0], 6)[0].tobytes()}
    everything = {TOKENIZER.encode(text, 6)[0].tobytes() for text in source[2]["captions"]}

    def seen(batches):
        return {b["text"][b["index"] == 2][0].tobytes() for b in batches}

    assert seen(take(12, source, batch_size=3)) == everything
    assert seen(evaluation_batches(source, CHANGING, batch_size=3)) == firsts


def test_bad_record_is_replaced_in_place():
    good, bad = take(4, Pictures(13), PLAIN), take(4, Pictures(13, bad=[5]), PLAIN)
    replaced = 0
    for a, b in zip(good, bad, strict=True):
        np.testing.assert_array_equal(b["substituted"], a["index"] == 5)
        kept = ~b["substituted"]
        assert_equal_batches(
            [{field: array[kept] for field, array in b.items()}],
            [{field: array[kept] for field, array in a.items()}],
        )
        assert (b["index"] != 5).all()
        np.testing.assert_array_equal(b["image"][:, 0, 0, 0], b["index"])
        assert b["valid"].all()
        replaced += b["substituted"].sum()
    assert replaced >= 2
    assert_equal_batches(take(4, Pictures(13, bad=[5]), PLAIN), bad)


def test_bad_record_is_logged_once(monkeypatch):
    monkeypatch.setattr(pipeline, "_logged", set())
    lines = []
    monkeypatch.setattr(logging, "warning", lambda text, *values: lines.append(text % values))
    take(6, Pictures(8, bad=[5]), threads=1)
    assert len(lines) == 1
    assert "picture 5: the picture is broken" in lines[0]


def test_source_may_raise_bad_record_itself():
    class Failing(Pictures):
        def __getitem__(self, row):
            if row == 5:
                raise BadRecord("shard 2, member 5", "checksum")
            return super().__getitem__(row)

    (batch,) = take(1, Failing(8))
    assert batch["substituted"].sum() == 1


def test_bad_record_can_stop_the_run():
    with pytest.raises(InputError, match=r"picture 5: .* set data.on_bad_record='replace'"):
        take(1, Pictures(8, bad=[5]), on_bad_record="raise")


def test_only_bad_records_end_in_an_error():
    with pytest.raises(InputError, match="in 16 attempts; bad were picture 0, picture 1"):
        take(1, Pictures(2, bad=[0, 1]))


def test_errors_of_the_code_are_not_taken_for_bad_records():
    class Broken(Pictures):
        def __getitem__(self, row):
            raise KeyError("captions")

    with pytest.raises(KeyError, match="captions"):
        take(1, Broken(8))


def test_blind_questions_see_grey_and_read_no_picture():
    transform = QuestionExample(TOKENIZER, 12, 6, blind=True)
    (batch,) = take(1, Pictures(8, bad=[3]), transform)
    assert (batch["image"] == 128).all()
    assert not batch["substituted"].any()


@pytest.mark.parametrize("processes", [1, 2, 4])
def test_evaluation_is_one_pass_padded_alike_on_all_processes(processes):
    source = Pictures(13, bad=[4])
    parts = [
        list(
            evaluation_batches(
                source, PLAIN, batch_size=8, process_index=i, process_count=processes
            )
        )
        for i in range(processes)
    ]
    assert [len(part) for part in parts] == [2] * processes
    batches = join(parts)
    index = np.concatenate([batch["index"] for batch in batches])
    valid = np.concatenate([batch["valid"] for batch in batches])
    assert index.tolist() == [*range(13), -1, -1, -1]
    assert valid.tolist() == [row in range(13) and row != 4 for row in index]
    for batch in batches:
        assert not batch["substituted"].any()
        assert batch["text_mask"].any(axis=1).all()
        np.testing.assert_array_equal(
            batch["image_id"], np.where(batch["valid"], batch["index"] + 100, -1)
        )


def test_evaluation_may_stop_at_a_bad_record():
    with pytest.raises(InputError, match="picture 4: "):
        list(evaluation_batches(Pictures(6, bad=[4]), PLAIN, batch_size=2, on_bad_record="raise"))


def test_every_caption_comes_once_and_reads_no_picture():
    source = Pictures(5, bad=[1])
    captions = EveryCaption(source)
    batches = list(evaluation_batches(captions, TextExample(TOKENIZER, 6), batch_size=4))
    assert "image" not in batches[0]
    valid = np.concatenate([batch["valid"] for batch in batches])
    texts = np.concatenate([batch["text"] for batch in batches])[valid]
    ids = np.concatenate([batch["image_id"] for batch in batches])[valid]
    index = np.concatenate([batch["index"] for batch in batches])[valid]
    expected = [(100 + row, text) for row in range(5) for text in source[row]["captions"]]
    assert [(i, TOKENIZER.decode(t)) for i, t in zip(ids, texts, strict=True)] == expected
    assert index.tolist() == list(range(len(captions)))


@pytest.mark.parametrize("make", [train_batches, evaluation_batches])
def test_impossible_settings_are_refused_at_once(make):
    seed = {"seed": 0} if make is train_batches else {}
    with pytest.raises(InputError, match=r"batch_size = 6 .* multiple .* 4"):
        make(Pictures(8), PLAIN, batch_size=6, process_count=4, **seed)
    with pytest.raises(InputError, match="batch_size = 0"):
        make(Pictures(8), PLAIN, batch_size=0, **seed)
    with pytest.raises(InputError, match="no record"):
        make(Pictures(0), PLAIN, batch_size=2, **seed)
    with pytest.raises(InputError, match="on_bad_record = 'skip'"):
        make(Pictures(8), PLAIN, batch_size=2, on_bad_record="skip", **seed)


@pytest.mark.parametrize("seed", [-1, 2**32])
def test_seed_out_of_range_is_refused(seed):
    with pytest.raises(InputError, match=f"seed = {seed}"):
        train_batches(Pictures(8), PLAIN, batch_size=2, seed=seed)


def test_real_photographs(shared):
    source = Flickr8k(shared / "data/flickr8k", "dev")
    tokenizer = TextTokenizer.train(
        [caption for record in source for caption in record["captions"]], 600
    )
    transform = CaptionExample(tokenizer, 64, 24, Augment(crop_scale=0.5, flip=True))
    (batch,) = take(1, source, transform, batch_size=16)
    assert not batch["substituted"].any()
    assert batch["image"].std(axis=(1, 2, 3)).min() > 10
    names = {source[row]["name"] for row in batch["index"]}
    assert len(names) == 16
    for row, text in zip(batch["index"], batch["text"], strict=True):
        pieces = [tokenizer.encode(caption, 24)[0] for caption in source[row]["captions"]]
        assert any((text == piece).all() for piece in pieces)


def test_several_streams_at_once():
    """A validation pass runs beside the training stream."""
    with ThreadPoolExecutor(2) as pool:
        training = pool.submit(take, 5, Pictures(13))
        validation = pool.submit(
            lambda: list(evaluation_batches(Pictures(13), CHANGING, batch_size=8))
        )
    assert_equal_batches(training.result(), take(5, Pictures(13)))
    assert len(validation.result()) == 2
