"""Folders on disks and in object storage, by one name: `runs/mine`, `gs://BUCKET/mine`."""

import os

from etils import epath

from mmjax.errors import InputError

Folder = str | os.PathLike[str]


def is_remote(folder: Folder) -> bool:
    """Whether it is an address in object storage, where nothing is appended to."""
    return "://" in str(folder)


def absolute(folder: Folder) -> epath.Path:
    """The folder from the root of its disk; an address in object storage as it is.

    (`epath.Path.resolve` makes a local folder `gs:` of the latter.)

    Raises:
      InputError: the package that reads such addresses is missing.
    """
    path = epath.Path(folder)
    if not is_remote(path):
        return path.expanduser().resolve()
    try:
        path.exists()
    except ImportError as error:
        raise InputError(
            f"{path}: {error}. Object storage is an extra: pip install 'mmjax[gcs]' for gs://, "
            "'mmjax[s3]' for s3://."
        ) from error
    return path


def move(source: Folder, target: epath.Path) -> None:
    """Move a folder of files from a disk, as into object storage."""
    for parent, _, names in os.walk(source):
        for name in names:
            file = epath.Path(parent) / name
            moved = target / file.relative_to(source)
            moved.parent.mkdir(parents=True, exist_ok=True)
            moved.write_bytes(file.read_bytes())
    epath.Path(source).rmtree()
