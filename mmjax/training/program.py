"""What a resolved config says, assembled and ready to be compiled."""

import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import optax
from absl import logging
from flax import nnx
from jax.sharding import Mesh
from ml_collections import ConfigDict

from mmjax.config import model_config
from mmjax.data.tokenizer import TextTokenizer
from mmjax.models import ModelConfig
from mmjax.objectives import Objective, build_objectives
from mmjax.training import flops
from mmjax.training.optimizer import learning_rates, make_optimizer
from mmjax.training.state import TrainState, abstract_params, graph_of
from mmjax.training.step import compile_train_step, make_eval_step, make_train_step


@dataclass(frozen=True)
class Program:
    """A model, what it is trained on, and how it is updated."""

    config: ConfigDict
    model: ModelConfig
    graph: nnx.GraphDef
    objectives: tuple[Objective, ...]
    optimizer: optax.GradientTransformation
    tokenizer: TextTokenizer
    mesh: Mesh

    @classmethod
    def build(cls, config: ConfigDict, tokenizer: TextTokenizer, mesh: Mesh) -> "Program":
        """Raises InputError where parts of the config do not fit each other."""
        model = model_config(config.model.to_dict())
        objectives = build_objectives(config.objectives.to_dict(), model, tokenizer)
        params = abstract_params(model, mesh)
        optimizer = make_optimizer(config.optimizer.to_dict(), params, config.total_steps)
        return cls(config, model, graph_of(model), objectives, optimizer, tokenizer, mesh)

    def compile_step(self, state: TrainState, batch: Any) -> tuple[Callable[..., Any], float]:
        """The compiled training step, and its model FLOPs (see `mmjax.training.flops`).

        State and batch may be abstract.
        """
        optimizer = self.config.optimizer.to_dict()
        step = make_train_step(
            self.graph,
            self.objectives,
            self.optimizer,
            seed=self.config.seed,
            rates=learning_rates(optimizer, state.params),
            accumulate=optimizer["accumulate"],
            ema_decay=optimizer["ema_decay"],
        )
        forward = make_eval_step(self.objectives)
        step_flops = flops.train_flops(
            lambda params: forward(nnx.merge(self.graph, params), batch), state.params
        )
        start = time.perf_counter()
        compiled = compile_train_step(step, state, self.mesh).lower(state, batch).compile()
        memory = compiled.memory_analysis()
        logging.info(
            "Compiled in %.0f s: %.3g model TFLOPs a step; a device holds %.2f GiB of state and "
            "batch and %.2f GiB of temporary memory.",
            time.perf_counter() - start,
            step_flops / 1e12,
            memory.argument_size_in_bytes / 2**30,
            memory.temp_size_in_bytes / 2**30,
        )
        return compiled, step_flops

    @property
    def assets(self) -> dict[str, Any]:
        """What goes into every checkpoint beside the state."""
        return {"config": self.config.to_dict(), "tokenizer": self.tokenizer.to_json()}
