"""`hf://owner/name`: a repository of the Hugging Face Hub as a local folder, through its cache."""

import os
import re
from fnmatch import fnmatch
from pathlib import Path, PurePosixPath
from types import ModuleType

from mmjax.errors import InputError
from mmjax.weights.formats import SUFFIXES

_SCHEME = "hf://"
# A revision holds no slash, but for that of a pull request.
_SOURCE = re.compile(
    r"hf://(?P<repository>[^/@]+/[^/@]+)"
    r"(@(?P<revision>refs/pr/\d+|[^/@]+))?"
    r"(/(?P<inside>[^/].*?))?/?"
)
# The config, and the files of processors and tokenizers.
_DESCRIPTIONS = ("*.json", "*.txt", "*.model")
# One kind of weights is fetched, the first that a repository has.
_WEIGHTS = (
    ("model.safetensors", "model-*.safetensors"),
    ("open_clip_model.safetensors",),
    ("pytorch_model.bin", "pytorch_model-*.bin"),
    ("open_clip_pytorch_model.bin",),
)


def resolve(source: str | os.PathLike[str], weights: bool = True) -> Path:
    """The local file or folder that `source` names.

    `hf://owner/name`, with `@revision` (a branch, tag or commit) and `/folder` or `/file` at will,
    is fetched into the Hub's cache unless it is there; anything else is a path, and stays as it is.
    Of a repository only one kind of weights is fetched, and none with `weights=False`: config,
    tokenizer and processor are small.

    Raises:
      InputError: there is no such path, repository, revision or file, the repository is closed to
        you, or the Hub cannot be reached and its cache lacks the files.
    """
    source = os.fspath(source)
    if not source.startswith(_SCHEME):
        return _local(source)
    match = _SOURCE.fullmatch(source)
    if match is None or ".." in re.split("[/@]", source):
        raise InputError(
            f"{source}: expected hf://owner/name, hf://owner/name@revision or either with /folder "
            "or /file behind it. The owner is part of the name: hf://google-bert/bert-base-uncased."
        )
    inside = PurePosixPath(match["inside"] or "")
    names_file = inside.suffix in SUFFIXES
    folder = inside.parent if names_file else inside
    wanted: tuple[tuple[str, ...], ...] = _WEIGHTS if weights else ((),)
    if names_file:
        wanted = ((inside.name,),)
    for names in wanted:
        snapshot = _fetch(match["repository"], match["revision"], folder, (*_DESCRIPTIONS, *names))
        there = sorted(os.listdir(snapshot / folder)) if (snapshot / folder).is_dir() else []
        if any(fnmatch(file, name) for file in there for name in names or _DESCRIPTIONS):
            return snapshot / inside
    sought = ", ".join(name for names in wanted for name in names or _DESCRIPTIONS)
    raise InputError(
        f"{source}: of {sought} nothing is there. Files there: {', '.join(there[:20]) or 'none'}. "
        "Name another with hf://owner/name/FILE; where the Hub cannot be reached, its cache may "
        "lack what the repository has."
    )


def _local(source: str) -> Path:
    path = Path(source).expanduser()
    # Our own checkpoints may lie on another file system (gs://) and be selected, as in RUN@best.
    folder = str(path).rpartition("@")[0] or path
    if "://" in source or os.path.lexists(path) or os.path.lexists(folder):
        return path
    owned = re.fullmatch(r"[\w.-]+/[\w.-]+(@[\w.-]+)?", source)
    hint = f" On the Hugging Face Hub that is {_SCHEME}{source}." if owned else ""
    raise InputError(f"{path}: there is no such file or folder.{hint}")


def _fetch(
    repository: str, revision: str | None, folder: PurePosixPath, names: tuple[str, ...]
) -> Path:
    """The snapshot that holds those files of `folder` whose names match one of `names`."""
    hub = _import_hub()
    source = f"{_SCHEME}{repository}" + (f"@{revision}" if revision else "")
    page = f"https://huggingface.co/{repository}"
    try:
        return Path(
            hub.snapshot_download(
                repository,
                revision=revision,
                allow_patterns=[str(folder / name) for name in names],
                ignore_patterns=[str(folder / "*/*")],  # * of the Hub's patterns matches / too
            )
        )
    except hub.errors.GatedRepoError as error:
        raise InputError(
            f"{source}: the repository is gated. Accept its terms on {page}, then log in with "
            "'hf auth login' or set HF_TOKEN."
        ) from error
    except hub.errors.RepositoryNotFoundError as error:
        raise InputError(
            f"{source}: there is no such repository, or it is private and you are not logged in "
            f"('hf auth login', or HF_TOKEN). Look at {page}."
        ) from error
    except hub.errors.RevisionNotFoundError as error:
        raise InputError(
            f"{source}: the repository has no branch, tag or commit {revision!r}. Look at "
            f"{page}/tree/main."
        ) from error
    except hub.errors.HFValidationError as error:
        raise InputError(f"{source}: no name of a repository: {error}") from error
    except (hub.errors.LocalEntryNotFoundError, hub.errors.OfflineModeIsEnabled) as error:
        at = f" --revision {revision}" if revision else ""
        raise InputError(
            f"{source}: the Hub cannot be reached, or HF_HUB_OFFLINE is set, and the cache "
            f"{hub.constants.HF_HUB_CACHE} lacks some of the files. On a connected machine run "
            f"'hf download {repository}{at} --local-dir FOLDER' and pass that folder, or let "
            "HF_HOME name a folder whose cache has them."
        ) from error
    except Exception as error:  # each client library has errors of connection of its own
        # Their text may quote the address of a proxy, password included.
        reason = getattr(error, "strerror", None) or type(error).__name__
        raise InputError(f"{source}: the download failed: {reason}.") from error


def _import_hub() -> ModuleType:
    try:
        import huggingface_hub
        import huggingface_hub.constants
        import huggingface_hub.errors
    except ImportError as error:
        raise InputError(
            "Names on the Hugging Face Hub are looked up by huggingface_hub, which is not "
            "installed. Run 'pip install huggingface_hub', or pass a local folder."
        ) from error
    return huggingface_hub
