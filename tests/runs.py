"""What several tests of training begin with."""

from pathlib import Path

import jax
from jax.sharding import AxisType, Mesh
from ml_collections import ConfigDict

from mmjax.data import Source, load_source
from mmjax.training.checkpoints import Checkpointer
from mmjax.training.program import Program
from mmjax.training.start import load_tokenizer, resolve, start_state
from mmjax.training.state import TrainState


def one_device() -> Mesh:
    return jax.make_mesh(
        (1, 1, 1), ("data", "fsdp", "tensor"), (AxisType.Auto,) * 3, devices=jax.devices()[:1]
    )


def begin(config: ConfigDict, workdir: Path, mesh: Mesh) -> tuple[Program, TrainState, Source]:
    """A new run before its first step, as `train.train` begins it; call it under the mesh."""
    source = load_source(config.data.to_dict())
    tokenizer = load_tokenizer(config, source, workdir, resume=False)
    program = Program.build(resolve(config, tokenizer, source), tokenizer, mesh)
    with Checkpointer(workdir, **config.checkpoint) as checkpointer:
        state = start_state(program.config, program.contents, mesh, checkpointer)
    return program, state, source
