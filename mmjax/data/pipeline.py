"""From a source to batches: records become examples, in a fixed order, and examples batches.

The order of a training stream and every random draw in it depend on the seed and the position in
the stream alone. So the global batch of a step is the same, row for row, on any number of
processes, threads and workers, and a run is resumed by its step.
"""

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any, Literal, Protocol

import grain
import numpy as np
from absl import flags, logging

from mmjax.data.image import BadRecord
from mmjax.data.tokenizer import TextTokenizer
from mmjax.errors import InputError

Record = dict[str, Any]
Example = dict[str, Any]
Batch = dict[str, np.ndarray]
OnBadRecord = Literal["replace", "raise"]

MAX_ATTEMPTS = 16  # at a tenth of bad records, one row in 10^16 finds no substitute
_logged: set[str] = set()  # names of the bad records that this process has logged


class Source(Protocol):
    """Records by row number: deterministic, safe between threads, picklable.

    A record has `image` (encoded bytes, a path, or uint8 [H, W, 3]), `image_id` (equal ids mean
    the same picture), `name` for messages, and what its task needs: `captions` (texts), or
    `question`, `answers` (a soft score in [0, 1] by answer), `question_type` and `question_id`, or
    `statement` and `label`. What a detector or an image tokenizer found in the picture comes as
    arrays of one shape, and as `tags` (words).
    """

    def __len__(self) -> int: ...

    def texts(self) -> Iterable[str]:
        """The texts to learn a vocabulary from."""

    def __getitem__(self, row: int, /) -> Record: ...


class Transform(Protocol):
    """Makes examples of records; all of them have the same fields and shapes."""

    def __call__(self, record: Record, rng: np.random.Generator | None) -> Example:
        """The example of a record; without `rng`, in evaluation, nothing is random."""

    def blank(self) -> Example:
        """An example that only fills a batch.

        Its text is that of an empty caption, so that no attention mask is without a token.
        """


@dataclass(frozen=True)
class TextExample:
    """A caption without its picture: what a text encoder needs to embed a list of captions."""

    tokenizer: TextTokenizer
    text_length: int

    def __call__(self, record: Record, rng: np.random.Generator | None = None) -> Example:
        """Fields: text, text_mask, image_id."""
        ids, mask = self.tokenizer.encode(record["captions"][0], self.text_length)
        return {"text": ids, "text_mask": mask, "image_id": np.int32(record["image_id"])}

    def blank(self) -> Example:
        """An example without content."""
        return self({"captions": [""], "image_id": -1})


@dataclass(frozen=True)
class First:
    """The first `size` records of a source."""

    source: Source
    size: int

    def __len__(self) -> int:
        return self.size

    def __getitem__(self, row: int) -> Record:
        return self.source[range(self.size)[row]]

    def texts(self) -> Iterable[str]:
        """Those of the whole source."""
        return self.source.texts()


class EveryCaption:
    """The captions of a source as a source of their own, a record each and without the picture.

    All of them, or the first `each` of every record where that is not 0, in the order of the source
    and of each record. Every record of `source` is read once, here; one that cannot be read is
    logged and has no captions.
    """

    def __init__(self, source: Source, each: int = 0):
        self._records: list[Record] = []
        for row in range(len(source)):
            try:
                record = source[row]
            except BadRecord as error:
                _log_once(error)
                continue
            self._records += [
                {"captions": [caption], "image_id": record["image_id"], "name": record["name"]}
                for caption in record["captions"][: each or None]
            ]

    def __len__(self) -> int:
        return len(self._records)

    def texts(self) -> Iterable[str]:
        """Every caption."""
        return (record["captions"][0] for record in self._records)

    def __getitem__(self, row: int) -> Record:
        return self._records[row]


def train_batches(
    source: Source,
    transform: Transform,
    *,
    batch_size: int,
    seed: int,
    process_index: int = 0,
    process_count: int = 1,
    start_step: int = 0,
    threads: int = 4,
    prefetch: int = 6,
    workers: int = 0,
    on_bad_record: OnBadRecord = "replace",
) -> grain.DatasetIterator[Batch]:
    """An endless stream of batches: each epoch has every record once, in an order of its own.

    Epochs follow each other without a seam, so that a batch may hold the end of one and the start
    of the next, and a source smaller than a batch is simply repeated. Close the iterator to stop
    its threads and workers.

    Args:
      source: the records.
      transform: makes an example of a record.
      batch_size: rows of the global batch; this process gets `batch_size // process_count` of
        them, those from `process_index * (batch_size // process_count)` on.
      seed: decides the order and all augmentation.
      process_index: which process this is.
      process_count: how many processes share the global batch.
      start_step: how many batches of the stream were consumed before.
      threads: threads that prepare batches, each a batch; 0 prepares them in the caller's.
      prefetch: batches in the making or ready ahead of their use; they lie in memory.
      workers: processes that each run `threads` and `prefetch`; 0 runs them in this process.
      on_bad_record: 'replace' puts another record, drawn at random, in the place of a bad one and
        sets its `substituted`; 'raise' stops.

    Yields:
      The fields of the transform, stacked; `index` int32 [B], the row of the record in the source
      (of the substitute, where there is one); `valid` and `substituted`, bool [B].

    Raises:
      InputError: at once if a setting is impossible; from the iterator if a record is bad and
        `on_bad_record` is 'raise', or if no substitute is found either.
    """
    rows = _rows_per_process(source, batch_size, process_index, process_count)
    _check_on_bad_record(on_bad_record)
    if not 0 <= seed < 2**32:
        raise InputError(f"seed = {seed} is not between 0 and 2^32 - 1.")
    example = _TrainingExample(source, transform, seed, on_bad_record)
    batches = (
        grain.MapDataset.range(len(source))
        .seed(seed)
        .shuffle()
        .repeat()
        .map_with_index(example)
        .batch(rows)
    )
    # A slice, and not Grain's own position, because the latter knows no worker processes.
    batches = batches[start_step * process_count + process_index :: process_count]
    return _iterate(batches, threads, prefetch, workers)


def evaluation_batches(
    source: Source,
    transform: Transform,
    *,
    batch_size: int,
    process_index: int = 0,
    process_count: int = 1,
    threads: int = 4,
    prefetch: int = 6,
    workers: int = 0,
    on_bad_record: OnBadRecord = "replace",
) -> grain.DatasetIterator[Batch]:
    """One pass in the order of the source, nothing random, every record exactly once.

    The last batch is filled up with rows that are not `valid`, so that every process gets the same
    number of batches of the same shape. Nothing is ever substituted: under 'replace' the row of a
    bad record is blank and not `valid`, and still has its `index`. Rows that only fill up have
    index -1. The other arguments and fields are those of `train_batches`. To score every caption
    of every picture, pass `EveryCaption(source)` with a `TextExample`.

    Raises:
      InputError: at once if a setting is impossible; from the iterator if a record is bad and
        `on_bad_record` is 'raise'.
    """
    rows = _rows_per_process(source, batch_size, process_index, process_count)
    _check_on_bad_record(on_bad_record)
    padded_length = -(-len(source) // batch_size) * batch_size
    example = _EvaluationExample(source, transform, on_bad_record)
    batches = grain.MapDataset.range(padded_length).map(example).batch(rows)
    return _iterate(batches[process_index::process_count], threads, prefetch, workers)


@dataclass(frozen=True)
class _TrainingExample:
    """The example at a position of the training stream; randomness is keyed by that position."""

    source: Source
    transform: Transform
    seed: int
    on_bad_record: OnBadRecord

    def __call__(self, position: int, row: int) -> Example:
        tried = []
        for attempt in range(MAX_ATTEMPTS):
            rng = np.random.default_rng([self.seed, position, attempt])
            if attempt > 0:
                row = int(rng.integers(len(self.source)))
            try:
                example = self.transform(self.source[row], rng)
            except BadRecord as error:
                _report(error, self.on_bad_record)
                tried.append(error.name)
                continue
            return _with_flags(example, row, valid=True, substituted=attempt > 0)
        raise InputError(
            f"No usable record was found in {MAX_ATTEMPTS} attempts; bad were "
            f"{', '.join(sorted(set(tried)))}. Check that the data are what the recipe expects."
        )


@dataclass(frozen=True)
class _EvaluationExample:
    """The example of a row of the source, or a blank one past its end and for a bad record."""

    source: Source
    transform: Transform
    on_bad_record: OnBadRecord

    def __call__(self, row: int) -> Example:
        if row >= len(self.source):
            return _with_flags(self.transform.blank(), -1, valid=False, substituted=False)
        try:
            example = self.transform(self.source[row], None)
        except BadRecord as error:
            _report(error, self.on_bad_record)
            return _with_flags(self.transform.blank(), row, valid=False, substituted=False)
        return _with_flags(example, row, valid=True, substituted=False)


def _iterate(
    batches: grain.MapDataset[Batch], threads: int, prefetch: int, workers: int
) -> grain.DatasetIterator[Batch]:
    options = grain.ReadOptions(num_threads=threads, prefetch_buffer_size=prefetch)
    stream = batches.to_iter_dataset(options)
    if workers:
        if not flags.FLAGS.is_parsed():  # Grain reads its own flags when it starts a process
            flags.FLAGS.mark_as_parsed()
        stream = stream.mp_prefetch(grain.MultiprocessingOptions(num_workers=workers))
    return iter(stream)


def _rows_per_process(
    source: Source, batch_size: int, process_index: int, process_count: int
) -> int:
    if not len(source):
        raise InputError("The source has no record; at least one is needed to make batches.")
    if batch_size < 1 or batch_size % process_count:
        raise InputError(
            f"batch_size = {batch_size} is global and must be a positive multiple of the number "
            f"of processes, {process_count}."
        )
    if not 0 <= process_index < process_count:
        raise ValueError(f"process_index = {process_index} is not one of {process_count}.")
    return batch_size // process_count


def _check_on_bad_record(on_bad_record: str) -> None:
    if on_bad_record not in ("replace", "raise"):
        raise InputError(f"data.on_bad_record = {on_bad_record!r}; expected 'replace' or 'raise'.")


def _report(error: BadRecord, on_bad_record: OnBadRecord) -> None:
    if on_bad_record == "raise":
        raise InputError(
            f"{error}. Mend or remove the record, or set data.on_bad_record='replace'."
        ) from error
    _log_once(error)


def _log_once(error: BadRecord) -> None:
    if error.name not in _logged:
        _logged.add(error.name)
        logging.warning("Bad record, replaced or left out: %s", error)


def _with_flags(example: Example, row: int, *, valid: bool, substituted: bool) -> Example:
    return {
        **example,
        "index": np.int32(row),
        "valid": np.bool_(valid),
        "substituted": np.bool_(substituted),
    }
