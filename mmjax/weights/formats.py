"""One weight file, opened by its format: safetensors, numpy's `.npz`, PyTorch's archives.

Opening reads the table of contents and checks it against the file's size, and nothing more; each
tensor is read when it is asked for. Nothing in a file is ever executed.
"""

import dataclasses
import math
import re
import textwrap
import warnings
import zipfile
import zlib
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from pickle import UnpicklingError
from types import ModuleType
from typing import Any, NamedTuple

import ml_dtypes
import numpy as np

from mmjax.errors import InputError
from mmjax.json_files import MAX_JSON_BYTES, checked_size, parse_json

# `.th` is VisualBERT's, `.model` VL-BERT's.
TORCH_SUFFIXES = (".bin", ".pt", ".pth", ".ckpt", ".th", ".model")
SUFFIXES = (".safetensors", ".npz", *TORCH_SUFFIXES)

FLOATS = ("float32", "float16", "bfloat16", "float64")
DTYPES = (*FLOATS, "int8", "int16", "int32", "int64", "uint8", "uint16", "uint32", "uint64", "bool")

_MAX_RANK = 32  # numpy 1 knows no array of more dimensions
# What damaged bytes raise on their way through zipfile, numpy and torch.
DAMAGE = (OSError, ValueError, RuntimeError, MemoryError, EOFError, zipfile.BadZipFile, zlib.error)


@dataclasses.dataclass(frozen=True)
class Stored:
    """A tensor where it lies: what its file says of it, and how to read it."""

    file: Path
    name: str
    shape: tuple[int, ...]
    dtype: np.dtype
    read: Callable[[], np.ndarray]


def open_file(path: Path) -> list[Stored]:
    """The tensors of one file, chosen by its suffix.

    Raises:
      InputError: the file is absent, damaged, of another suffix, needs code to be executed, or
        holds a type that no weight has.
    """
    size = checked_size(path)
    suffix = path.suffix.lower()
    try:
        if suffix == ".safetensors":
            return _open_safetensors(path, size)
        if suffix == ".npz":
            return _open_npz(path)
        if suffix in TORCH_SUFFIXES:
            return _open_torch(path)
    except InputError:
        raise
    except DAMAGE as error:
        raise InputError(
            f"{path}: no intact {suffix} file ({type(error).__name__}: {str(error)[:200]}). "
            "Download it again."
        ) from error
    raise InputError(f"{path}: weights end in {', '.join(SUFFIXES)}; found {suffix!r}.")


def known_dtype(kind: str, name: str, path: Path) -> np.dtype:
    """The type that numpy calls `kind`, if it is one of `DTYPES`."""
    if kind not in DTYPES:
        raise InputError(
            f"{path}: the tensor {name!r} is of type {kind}; weights are of {', '.join(DTYPES)}."
        )
    return np.dtype(ml_dtypes.bfloat16 if kind == "bfloat16" else kind)


def _check_bytes(
    path: Path, name: str, shape: tuple[int, ...], dtype: np.dtype, found: int
) -> None:
    if min(shape, default=0) < 0 or math.prod(shape) * dtype.itemsize != found:
        raise InputError(
            f"{path}: the tensor {name!r} of shape {shape} in {dtype} does not take the "
            f"{found:,} bytes that it has. The file is damaged."
        )


def check_finite(array: np.ndarray, name: str, path: Path) -> None:
    """Raises `InputError` if a value is NaN or infinite."""
    bad = array.size - np.count_nonzero(np.isfinite(array))
    if bad:
        raise InputError(
            f"{path}: of the {array.size:,} values of the tensor {name!r}, {bad:,} are NaN or "
            "infinite in float32. Take a checkpoint from before the training diverged."
        )


# Safetensors. Its own reader for numpy knows no bfloat16, hence the format is read here:
# https://github.com/huggingface/safetensors#format

_SAFETENSORS_DTYPES = {
    "F32": "float32",
    "F16": "float16",
    "BF16": "bfloat16",
    "F64": "float64",
    "BOOL": "bool",
    **{
        f"{sign}{bits}": f"{kind}{bits}"
        for sign, kind in (("I", "int"), ("U", "uint"))
        for bits in (8, 16, 32, 64)
    },
}


def _open_safetensors(path: Path, size: int) -> list[Stored]:
    with path.open("rb") as file:
        length = int.from_bytes(file.read(8), "little")
        if size < 8 or length > min(size - 8, MAX_JSON_BYTES):
            raise InputError(
                f"{path}: no safetensors file, or one cut short: its first 8 bytes announce a "
                f"header of {length:,} bytes, and the file has {size:,}. Download it again."
            )
        header = parse_json(file.read(length), f"{path}, header")
    header.pop("__metadata__", None)
    entries = [_safetensors_entry(path, name, entry) for name, entry in header.items()]

    claimed = max((entry.end for entry in entries), default=0)
    if claimed != (found := size - 8 - length):
        raise InputError(
            f"{path}: by its header the tensors take {claimed:,} bytes, but {found:,} are there: "
            "the file is cut short or damaged. Download it again."
        )
    stored, free = [], 0
    for entry in sorted(entries, key=lambda entry: (entry.begin, entry.end)):
        if entry.begin != free:
            raise InputError(
                f"{path}: the tensor {entry.name!r} begins at byte {entry.begin:,} of the data, "
                f"and the one before it ends at {free:,}. Tensors follow each other without gap "
                "or overlap: the file is damaged."
            )
        free = entry.end
        read = partial(_read_bytes, path, 8 + length, entry)
        stored.append(Stored(path, entry.name, entry.shape, entry.dtype, read))
    return stored


class _Entry(NamedTuple):
    """What the header says of a tensor; its bytes are counted from the end of the header."""

    name: str
    dtype: np.dtype
    shape: tuple[int, ...]
    begin: int
    end: int


def _safetensors_entry(path: Path, name: str, entry: Any) -> _Entry:
    match entry:
        case {"dtype": str(code), "shape": [*shape], "data_offsets": [begin, end]} if (
            len(shape) <= _MAX_RANK
            and all(type(n) is int and 0 <= n < 2**63 for n in (*shape, begin, end))
            and begin <= end
        ):
            dtype = known_dtype(_SAFETENSORS_DTYPES.get(code, f"{code} (safetensors)"), name, path)
            _check_bytes(path, name, tuple(shape), dtype, end - begin)
            return _Entry(name, dtype, tuple(shape), begin, end)
    raise InputError(
        f"{path}: the header must give the tensor {name!r} a dtype, a shape and data_offsets, "
        f"found {str(entry)[:120]}. The file is damaged."
    )


def _read_bytes(path: Path, data_begins: int, entry: _Entry) -> np.ndarray:
    with path.open("rb") as file:
        file.seek(data_begins + entry.begin)
        values = np.fromfile(file, np.uint8, entry.end - entry.begin)
    return values.view(entry.dtype).reshape(entry.shape)


# numpy's .npz, which big_vision publishes


def _open_npz(path: Path) -> list[Stored]:
    with zipfile.ZipFile(path) as archive:
        return [_npz_entry(path, archive, member) for member in archive.infolist()]


def _npz_entry(path: Path, archive: zipfile.ZipFile, member: zipfile.ZipInfo) -> Stored:
    name = member.filename.removesuffix(".npy")
    with archive.open(member) as file:
        version = np.lib.format.read_magic(file)
        if version == (1, 0):
            shape, _, dtype = np.lib.format.read_array_header_1_0(file)
        else:
            shape, _, dtype = np.lib.format.read_array_header_2_0(file)
        data_size = member.file_size - file.tell()
    if dtype.hasobject:
        raise InputError(
            f"{path}: the entry {name!r} holds Python objects, which only executing code could "
            "read; weights are plain arrays. Save it again without it."
        )
    # numpy has no name for bfloat16 and stores it as two bytes of anything.
    known = known_dtype("bfloat16" if dtype == "V2" else dtype.name, name, path)
    _check_bytes(path, name, shape, known, data_size)
    return Stored(path, name, shape, known, partial(_read_npy, path, member.filename, known))


def _read_npy(path: Path, member: str, dtype: np.dtype) -> np.ndarray:
    with zipfile.ZipFile(path) as archive, archive.open(member) as file:
        array = np.lib.format.read_array(file, allow_pickle=False)
    return array.view(dtype) if array.dtype == "V2" else array.astype(dtype, copy=False)


# PyTorch archives

_NESTS = ("state_dict", "model", "model_state_dict", "module")


def _open_torch(path: Path) -> list[Stored]:
    torch = _import_torch(path)
    archive = _load_torch(torch, path)
    for _ in _NESTS:  # an archive may contain itself
        if not isinstance(archive, Mapping):
            break
        nested = [archive[key] for key in _NESTS if isinstance(archive.get(key), Mapping)]
        archive = nested[0] if nested else archive
    if not isinstance(archive, Mapping):
        raise InputError(
            f"{path}: expected a mapping from names to tensors, found a {type(archive).__name__}."
        )
    return [
        _torch_entry(path, name, tensor)
        for name, tensor in archive.items()
        if isinstance(name, str) and isinstance(tensor, torch.Tensor)
    ]


def _import_torch(path: Path) -> ModuleType:
    try:
        import torch
    except ImportError as error:
        raise InputError(
            f"{path}: PyTorch's own archives are read by torch, which is not installed. "
            "Run 'pip install torch==2.13.0', or convert the file in its folder where torch is:\n"
            + _recipe(path, f"torch.load({path.name!r}, map_location='cpu', weights_only=True)")
        ) from error
    return torch


def _load_torch(torch: ModuleType, path: Path) -> Any:
    mmap = zipfile.is_zipfile(path)  # archives older than torch 1.6 are no zip and read at once
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # they tell of old formats
            return torch.load(path, map_location="cpu", weights_only=True, mmap=mmap)
    except Exception as error:  # damaged bytes can raise anything in an unpickler
        reason = str(error)
        if "TorchScript" in reason:
            load = f"torch.jit.load({path.name!r}, map_location='cpu').state_dict()"
            found = "a TorchScript program, as OpenAI's CLIP archives are"
        elif isinstance(error, UnpicklingError):
            load = f"torch.load({path.name!r}, map_location='cpu', weights_only=False)"
            needed = re.search(r"GLOBAL (\S+)", reason)
            found = f"more than tensors ({needed[1]})" if needed else "damage, or more than tensors"
        else:
            raise InputError(
                f"{path}: no intact PyTorch archive ({type(error).__name__}: {reason[:200]}). "
                "Download it again."
            ) from error
        raise InputError(
            f"{path}: expected an archive of tensors, found {found}. Code in a file is never "
            "executed here. If you trust who made it, convert it in its folder, which does "
            "execute it:\n" + _recipe(path, load)
        ) from error


def _recipe(path: Path, load: str) -> str:
    """Lines of Python that turn an archive into safetensors."""
    name = "model" if path.name == "pytorch_model.bin" else path.stem
    return textwrap.indent(
        f"""\
import torch, safetensors.torch
state = {load}
state = state.get('state_dict', state.get('model', state))
state = {{k: v.clone().contiguous() for k, v in state.items() if torch.is_tensor(v)}}
safetensors.torch.save_file(state, {f"{name}.safetensors"!r}, {{'format': 'pt'}})""",
        "  ",
    )


def _torch_entry(path: Path, name: str, tensor: Any) -> Stored:
    dtype = known_dtype(str(tensor.dtype).removeprefix("torch."), name, path)
    shape = tuple(tensor.shape)
    if "strided" not in str(tensor.layout):
        raise InputError(f"{path}: the tensor {name!r} is sparse; expected a dense one.")
    if math.prod(shape) * dtype.itemsize > tensor.untyped_storage().nbytes():
        raise InputError(
            f"{path}: the tensor {name!r} claims the shape {shape}, for which the file has too "
            "few values."
        )
    return Stored(path, name, shape, dtype, partial(_read_torch, tensor))


def _read_torch(tensor: Any) -> np.ndarray:
    tensor = tensor.detach()
    return (tensor.float() if tensor.is_floating_point() else tensor).numpy()
