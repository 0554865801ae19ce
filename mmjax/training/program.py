"""What a resolved config says, assembled and ready to be compiled."""

import functools
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import optax
from absl import logging
from flax import nnx
from jax.sharding import Mesh
from jax.stages import Lowered
from ml_collections import ConfigDict

from mmjax.config import model_config
from mmjax.data.tokenizer import TextTokenizer
from mmjax.errors import InputError
from mmjax.objectives import Adversarial, Masking, Task, build_objectives
from mmjax.schema import build
from mmjax.training import flops
from mmjax.training.optimizer import learning_rates, make_optimizer
from mmjax.training.state import (
    Parameters,
    StateConfig,
    TrainState,
    abstract_model,
    abstract_params,
)
from mmjax.training.step import compile_train_step, make_eval_step, make_train_step
from mmjax.training.teacher import load_teacher


@dataclass(frozen=True)
class Program:
    """A model, what it is trained on, and how it is updated."""

    config: ConfigDict
    model: Any  # its config
    task: Task
    reference: Parameters | None  # of the model that teaches
    optimizer: optax.GradientTransformation
    mesh: Mesh

    @classmethod
    def build(cls, config: ConfigDict, tokenizer: TextTokenizer, mesh: Mesh) -> "Program":
        """Raises InputError where parts of the config do not fit each other."""
        model = model_config(config.model.to_dict())
        abstract = abstract_model(model)
        objectives = build_objectives(config.objectives.to_dict(), abstract)
        teacher = load_teacher(config, objectives, tokenizer, mesh)
        task = Task(
            graph=nnx.split(abstract)[0],
            objectives=objectives,
            tokenizer=tokenizer,
            masking=build(Masking, config.masking.to_dict(), "masking"),
            adversarial=build(Adversarial, config.adversarial.to_dict(), "adversarial"),
            reference=None if teacher is None else teacher.graph,
        )
        if task.adversarial.steps:
            task.adversarial.check(abstract)
        learners = [name for name, term in task.objectives.items() if term.needs_average]
        if learners and not config.optimizer.ema_decay:
            raise InputError(
                f"objectives.{learners[0]} learns from the moving average of the parameters: set "
                "optimizer.ema_decay (ALBEF: 0.995)."
            )
        params = abstract_params(model, mesh)
        optimizer = make_optimizer(config.optimizer.to_dict(), params, config.total_steps)
        reference = None if teacher is None else teacher.params
        return cls(config, model, task, reference, optimizer, mesh)

    @property
    def contents(self) -> StateConfig:
        """What its training state is made of."""
        memory = functools.partial(
            self.task.memory, abstract_model(self.model), self.config.batch_size
        )
        options = self.config.optimizer
        return StateConfig(
            self.model,
            self.optimizer,
            ema=options.ema_decay > 0,
            sharded=options.sharded,
            memory=memory,
        )

    def compile_step(self, state: TrainState, batch: Any) -> tuple[Callable[..., Any], float]:
        """The compiled training step, and its model FLOPs."""
        start = time.perf_counter()
        compiled = self.lower_step(state, batch).compile()
        step_flops = self.step_flops(state, batch)
        memory: Any = compiled.memory_analysis()
        logging.info(
            "Compiled in %.0f s: %.3g model TFLOPs a step; a device holds %.2f GiB of state and "
            "batch and %.2f GiB of temporary memory.",
            time.perf_counter() - start,
            step_flops / 1e12,
            memory.argument_size_in_bytes / 2**30,
            memory.temp_size_in_bytes / 2**30,
        )
        return lambda state, batch: compiled(state, batch, self.reference), step_flops

    def lower_step(self, state: TrainState, batch: Any) -> Lowered:
        """The training step for this state and batch, which may be abstract, to be compiled."""
        for name, objective in self.task.objectives.items():
            objective.check_batch(name, batch)
        optimizer = self.config.optimizer.to_dict()
        step = make_train_step(
            self.task,
            self.optimizer,
            seed=self.config.seed,
            rates=learning_rates(optimizer, state.params),
            bounds=optimizer["bounds"],
            accumulate=optimizer["accumulate"],
            ema_decay=optimizer["ema_decay"],
            sharded=optimizer["sharded"],
        )
        jitted = compile_train_step(step, state, self.mesh, self.reference)
        return jitted.lower(state, batch, self.reference)

    def step_flops(self, state: TrainState, batch: Any) -> float:
        """Model FLOPs of a step (see `mmjax.training.flops`); state and batch may be abstract."""
        forward = make_eval_step(self.task, self.reference)
        return flops.train_flops(
            lambda params: forward(nnx.merge(self.task.graph, params), batch), state.params
        )

    @property
    def assets(self) -> dict[str, Any]:
        """What goes into every checkpoint beside the state."""
        return {"config": self.config.to_dict(), "tokenizer": self.task.tokenizer.to_json()}
