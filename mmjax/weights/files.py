"""Weights on disk, read safely: name -> array, whatever the format; and written as safetensors."""

import contextlib
import json
import os
import re
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path

import numpy as np
from safetensors import SafetensorError
from safetensors.numpy import save_file

from mmjax.errors import InputError
from mmjax.json_files import read_json
from mmjax.weights.formats import (
    DAMAGE,
    FLOATS,
    Stored,
    check_finite,
    known_dtype,
    open_file,
)

# What a folder is searched for, in this order: what needs no torch comes first. The `open_clip_`
# names are those of LAION's and DataComp's repositories.
WEIGHT_FILES = (
    "model.safetensors",
    "model.safetensors.index.json",
    "open_clip_model.safetensors",
    "pytorch_model.bin",
    "pytorch_model.bin.index.json",
    "open_clip_pytorch_model.bin",
)

_INDEX = ".index.json"
_PYTORCH = {"format": "pt"}  # transformers refuses a file that does not say so


class Tensors(Mapping[str, np.ndarray]):
    """The tensors of a file or folder by name, each read when it is asked for.

    Names are those on disk, but for two habits that carry no meaning: `module.`, which
    DataParallel puts before every name, is taken off, and the `LayerNorm.gamma` and `.beta` of
    early BERTs are called `.weight` and `.bias`.

    Attributes:
      origin: the file or folder, for messages.
    """

    def __init__(self, origin: str, stored: Iterable[Stored]):
        """Raises `InputError` where there is no tensor, or two would have the same name."""
        self.origin = origin
        self._stored: dict[str, Stored] = {}
        stored = list(stored)
        if not stored:
            raise InputError(f"{origin}: there are no tensors in it.")
        parallel = all(tensor.name.startswith("module.") for tensor in stored)
        for tensor in stored:
            name = tensor.name.removeprefix("module.") if parallel else tensor.name
            name = re.sub(r"\bLayerNorm\.gamma$", "LayerNorm.weight", name)
            name = re.sub(r"\bLayerNorm\.beta$", "LayerNorm.bias", name)
            other = self._stored.setdefault(name, tensor)
            if other is not tensor:
                raise InputError(
                    f"{origin}: the tensor {name!r} is there twice, as {other.name!r} in "
                    f"{other.file.name} and as {tensor.name!r} in {tensor.file.name}."
                )

    def __getitem__(self, name: str) -> np.ndarray:
        """The tensor in float32 if it is of floats, else as it is stored.

        Raises:
          InputError: it cannot be read, or a value is NaN or infinite.
        """
        tensor = self._stored[name]
        try:
            array = tensor.read()
        except DAMAGE as error:
            raise InputError(
                f"{tensor.file}: the tensor {tensor.name!r} cannot be read: {error}. "
                "The file is damaged, or was changed while it was open."
            ) from error
        if tensor.dtype.name in FLOATS:
            with np.errstate(over="ignore"):  # a float64 too large becomes infinite, and is told
                array = array.astype(np.float32, copy=False)
            check_finite(array, tensor.name, tensor.file)
        return array

    def __contains__(self, name: object) -> bool:
        return name in self._stored  # Mapping's own would read the tensor

    def __iter__(self) -> Iterator[str]:
        return iter(self._stored)

    def __len__(self) -> int:
        return len(self._stored)

    def shape(self, name: str) -> tuple[int, ...]:
        """The tensor's shape, from its file's table of contents."""
        return self._stored[name].shape

    def dtype(self, name: str) -> np.dtype:
        """The type in which the file stores the tensor; floats are read as float32 from any."""
        return self._stored[name].dtype


def open_tensors(path: str | os.PathLike[str]) -> Tensors:
    """The tensors of a weight file or of a Hugging Face folder.

    A file is safetensors, an index of safetensors or of PyTorch shards, a PyTorch archive (with
    torch installed, and only what `torch.load(weights_only=True)` reads) or numpy's `.npz`. In a
    folder the first of `WEIGHT_FILES` is taken.

    Raises:
      InputError: there are no weights, or they are damaged, contradict their index, need code to
        be executed, or are of a type that no weight has.
    """
    path = Path(path)
    file = _weight_file(path) if os.path.isdir(path) else path
    stored = _open_shards(file) if file.name.endswith(_INDEX) else open_file(file)
    return Tensors(str(path), stored)


def write_safetensors(
    path: str | os.PathLike[str],
    arrays: Mapping[str, np.ndarray],
    metadata: Mapping[str, str] = _PYTORCH,
    max_shard_bytes: int = 5_000_000_000,
) -> None:
    """Writes arrays as `path`, or as shards with an index where they exceed `max_shard_bytes`.

    The shards of `model.safetensors` are `model-00001-of-00002.safetensors` and on, beside
    `model.safetensors.index.json`. No file gets its name before all are complete, and what an
    earlier writing to the same path left is removed at the end: a reader would prefer it.

    Raises:
      InputError: a value is NaN or infinite, a type is none of weights, or the disk refuses.
    """
    path = Path(path)
    # In C order, because safetensors writes memory as it lies.
    arrays = {name: np.asarray(array, order="C") for name, array in arrays.items()}
    for name, array in arrays.items():
        if known_dtype(array.dtype.name, name, path).name in FLOATS:
            check_finite(array, name, path)
    shards = _split(arrays, max_shard_bytes)
    files = _shard_files(path, len(shards))
    index = path.with_name(path.name + _INDEX)
    unfinished = {file: file.with_name(file.name + ".tmp") for file in (*files, index)}
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        for file, shard in zip(files, shards, strict=True):
            _save(shard, unfinished[file], metadata)
        if len(shards) > 1:
            unfinished[index].write_text(_index(files, shards), "utf-8")
            files.append(index)
        for file in files:
            os.replace(unfinished[file], file)
        for file in _written_before(path):
            if file not in files:
                file.unlink()
    except (OSError, SafetensorError) as error:
        raise InputError(f"{path}: the weights cannot be written: {error}.") from error
    finally:
        for file in unfinished.values():
            with contextlib.suppress(OSError):
                file.unlink()


def _weight_file(folder: Path) -> Path:
    for name in WEIGHT_FILES:
        if os.path.lexists(folder / name):  # a link without its target is told when it is opened
            return folder / name
    there = sorted(entry.name for entry in folder.iterdir())
    shown = ", ".join(there[:20]) + (f" and {len(there) - 20} more" if len(there) > 20 else "")
    raise InputError(
        f"{folder}: there are no weights under a name that is looked for "
        f"({', '.join(WEIGHT_FILES)}). The folder holds: {shown or 'nothing'}. If the weights are "
        "among these, pass that file instead of the folder."
    )


def _open_shards(index: Path) -> list[Stored]:
    weight_map = read_json(index).get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        raise InputError(
            f"{index}: 'weight_map' must be an object from tensor names to files, found "
            f"{str(weight_map)[:60]}."
        )
    suffix = Path(index.name.removesuffix(_INDEX)).suffix
    for name, shard in weight_map.items():
        # Only the written name counts: the Hub's cache is made of links that lead elsewhere.
        if not (isinstance(shard, str) and re.fullmatch(rf"[^/\\:\0]+{re.escape(suffix)}", shard)):
            raise InputError(
                f"{index}: the tensor {name!r} is said to be in {shard!r}. A shard is a "
                f"{suffix} file beside the index, named without a path."
            )
    shards = sorted(set(weight_map.values()))
    missing = [shard for shard in shards if not os.path.isfile(index.parent / shard)]
    if missing:
        raise InputError(
            f"{index}: of {len(shards)} shards these are not there: {', '.join(missing)}. "
            "Download the folder again."
        )
    stored = [tensor for shard in shards for tensor in open_file(index.parent / shard)]
    found = {(tensor.name, tensor.file.name) for tensor in stored}
    absent = [f"{name!r} in {shard}" for name, shard in weight_map.items() - found]
    if absent:
        raise InputError(
            f"{index}: {len(absent)} tensors are not where it says, as {min(absent)}. "
            "Index and shards are not of one checkpoint; download the folder again."
        )
    return stored


def _split(arrays: dict[str, np.ndarray], max_bytes: int) -> list[dict[str, np.ndarray]]:
    """Consecutive runs of at most `max_bytes`; an array above that has a shard of its own."""
    shards: list[dict[str, np.ndarray]] = [{}]
    size = 0
    for name, array in arrays.items():
        if shards[-1] and size + array.nbytes > max_bytes:
            shards.append({})
            size = 0
        shards[-1][name] = array
        size += array.nbytes
    return shards


def _save(arrays: dict[str, np.ndarray], file: Path, metadata: Mapping[str, str]) -> None:
    file.touch()
    mode = file.stat().st_mode  # of any new file; safetensors 0.8 lets nobody else read its own
    save_file(arrays, file, dict(metadata))
    file.chmod(mode)


def _shard_files(path: Path, count: int) -> list[Path]:
    if count == 1:
        return [path]
    return [
        path.with_name(f"{path.stem}-{number:05d}-of-{count:05d}{path.suffix}")
        for number in range(1, count + 1)
    ]


def _index(files: list[Path], shards: list[dict[str, np.ndarray]]) -> str:
    arrays = [array for shard in shards for array in shard.values()]
    index = {
        "metadata": {
            "total_parameters": sum(array.size for array in arrays),
            "total_size": sum(array.nbytes for array in arrays),
        },
        "weight_map": {
            name: file.name for file, shard in zip(files, shards, strict=True) for name in shard
        },
    }
    return json.dumps(index, indent=2, sort_keys=True) + "\n"


def _written_before(path: Path) -> list[Path]:
    stem, suffix = re.escape(path.stem), re.escape(path.suffix)
    names = re.compile(rf"{stem}(-\d{{5}}-of-\d{{5}})?{suffix}|{stem}{suffix}{re.escape(_INDEX)}")
    return [file for file in path.parent.iterdir() if names.fullmatch(file.name)]
