"""Convert weights between published formats and checkpoints of our own, and show every tensor.

    python -m mmjax.weights SOURCE DESTINATION

SOURCE is a Hugging Face folder, its Hub name (hf://owner/name, hf://owner/name@revision), a file of
original weights (with --family and --config), or one of our checkpoints (WORKDIR, WORKDIR@STEP,
WORKDIR@best). From a checkpoint of ours DESTINATION becomes a Hugging Face folder; from anything
else a checkpoint of ours; train.py takes the parts that its model shares with it
(--config.init_from=DESTINATION), as an image encoder of the same sizes.
"""

import argparse
import json
import logging
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

from flax import nnx

from mmjax.errors import InputError
from mmjax.models.model import Model
from mmjax.processing import PROCESSOR, load_processor
from mmjax.weights.loading import load, open_source
from mmjax.weights.names import Pair, pairs_of
from mmjax.weights.saving import family_of, save_checkpoint, save_huggingface


def main() -> int:
    """Parse the arguments and convert."""
    parser = argparse.ArgumentParser(
        prog="python -m mmjax.weights",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("source", metavar="SOURCE")
    parser.add_argument("destination", metavar="DESTINATION")
    parser.add_argument("--family", default="", help="of original weights: albef, uniter, …")
    parser.add_argument(
        "--config", type=json.loads, metavar="JSON", help="that family's config; docs/models.md"
    )
    parser.add_argument("--image_size", type=int, help="resize position embeddings for this size")
    parser.add_argument("--vocab_size", type=int, help="cut or fill up the word table")
    parser.add_argument(
        "--allow_differences",
        action="store_true",
        help="leave what the source lacks at its initial value, and what the model lacks out",
    )
    arguments = parser.parse_args()
    logging.basicConfig(level=logging.WARNING, format="%(message)s")
    try:
        convert(**vars(arguments))
    except InputError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    return 0


def convert(
    source: str,
    destination: str,
    *,
    family: str = "",
    config: dict[str, Any] | None = None,
    image_size: int | None = None,
    vocab_size: int | None = None,
    allow_differences: bool = False,
) -> None:
    """Read SOURCE, write DESTINATION, print the table of tensors."""
    opened = open_source(source, family=family, config=config)
    if isinstance(opened, Model):
        model, folder = opened, Path(destination)
        save_huggingface(model, destination)
    else:
        if (Path(destination) / "checkpoints").exists():
            raise InputError(f"{destination} holds a checkpoint already; name another folder.")
        folder = Path(destination) / PROCESSOR
        model = load(
            source,
            family=family,
            config=config,
            image_size=image_size,
            vocab_size=vocab_size,
            strict=not allow_differences,
        )
        save_checkpoint(model, destination)
    _copy_processor(source, folder, image_size)
    pairs = pairs_of(family_of(model).table(model.config), nnx.to_pure_dict(nnx.state(model)))
    print(table(pairs))
    print(f"{family_of(model).name}: {len(pairs)} parameters written to {destination}")


def _copy_processor(source: str, folder: Path, image_size: int | None) -> None:
    """Weights without their vocabulary are of little use."""
    try:
        processor = load_processor(source)
        if image_size is not None and processor.pixels is not None:
            processor = replace(processor, pixels=processor.pixels.resized_to(image_size))
        processor.save(folder)
    except InputError as error:
        print(f"No processor goes along: {error}")


def table(pairs: list[Pair]) -> str:
    """Aligned lines: the name there, the name here, the shape here, and what is done on the way."""
    rows = [("there", "here", "shape", "what is done")]
    for pair in pairs:
        shape = "×".join(map(str, pair.shape)) or "scalar"
        rows.append((pair.title, pair.path, shape, pair.describe()))
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return "\n".join(
        "  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip()
        for row in rows
    )


if __name__ == "__main__":
    sys.exit(main())
