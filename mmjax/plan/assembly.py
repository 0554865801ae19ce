"""A recipe's program and one batch for it, without the recipe's data.

What examples look like follows from `config.data`, whatever the source: drawn scenes take the
place of files, and as many made-up words that of a vocabulary that is still to be learnt.
"""

import dataclasses
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax
from jax.sharding import Mesh
from ml_collections import ConfigDict

from mmjax.data import load_source, make_transform
from mmjax.data.pipeline import First, evaluation_batches
from mmjax.data.tokenizer import SPECIAL_TOKENS, TextTokenizer
from mmjax.sharding import batch_sharding, make_mesh, tree_shardings
from mmjax.training.program import Program
from mmjax.training.start import resolve


def assemble(config: ConfigDict, mesh: Mesh) -> tuple[Program, Any]:
    """The program over a mesh whose devices need not exist, and one abstract batch for it.

    Raises InputError where parts of the config do not fit each other, or a teacher is not there.
    """
    data = {**config.data.to_dict(), "source": "scenes", "root": "", "size": 2}
    source = load_source(data)
    tokenizer = _tokenizer(config)
    # What another source's answers are, scenes cannot tell; `First` shows none.
    known = source if config.data.source == "scenes" else First(source, len(source))
    config = resolve(config, tokenizer, known)
    # A teacher is loaded here, where there are devices to hold it, and forgotten but for its shape.
    program = Program.build(config, tokenizer, make_mesh())
    reference = jax.tree.map(
        lambda leaf, sharding: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding),
        program.reference,
        tree_shardings(program.reference, mesh),
    )
    transform = make_transform(
        data,
        tokenizer,
        getattr(program.model, "answers", ()),
        question_only=config.question_only,
    )
    row = next(evaluation_batches(source, transform, batch_size=1, threads=0))
    batch = {
        name: jax.ShapeDtypeStruct(
            (config.batch_size, *array.shape[1:]), array.dtype, sharding=batch_sharding(mesh)
        )
        for name, array in row.items()
    }
    return dataclasses.replace(program, mesh=mesh, reference=reference), batch


def _tokenizer(config: ConfigDict) -> TextTokenizer:
    """The vocabulary that the recipe names, else one of the size that it says."""
    if config.data.vocabulary:
        tokenizer = TextTokenizer.from_vocabulary(config.data.vocabulary)
    else:
        sizes = [config.data.vocabulary_size, *_vocabulary_sizes(config.model.to_dict())]
        words = (f"word{i}" for i in range(min(sizes) - len(SPECIAL_TOKENS)))
        with tempfile.TemporaryDirectory() as folder:
            path = Path(folder) / "vocab.txt"
            path.write_text("\n".join([*SPECIAL_TOKENS, *words]))
            tokenizer = TextTokenizer.from_vocabulary(path)
    return tokenizer.with_end_token(config.data.end_token)


def _vocabulary_sizes(section: Mapping[str, Any]) -> list[int]:
    """Those that the model's parts say; a part that follows the tokenizer says none."""
    own = [section["vocabulary_size"]] if section.get("vocabulary_size") else []
    parts = [part for part in section.values() if isinstance(part, Mapping)]
    return own + [size for part in parts for size in _vocabulary_sizes(part)]
