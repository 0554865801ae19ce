"""What the tests of distillation share: a student, its teachers, and losses on devices."""

from functools import cache

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.sharding import AxisType

from mmjax.models import VisionLanguageConfig
from mmjax.objectives import Features, Masking, Task
from mmjax.sharding import to_device
from mmjax.training.state import graph_of, init_params
from tests.models.reference import random_params, tiny_batch, tiny_model, tiny_tokenizer

ANSWERS = ("yes", "no", "red", "two")
STUDENT = tiny_model(answers=ANSWERS)
# Deeper and wider, with more heads; only the contrastive space is as wide as the student's.
WIDE = {"width": 48, "depth": 3, "heads": 6}
WIDE_TEACHER = tiny_model(
    answers=ANSWERS,
    **{f"image_{key}": value for key, value in WIDE.items()},
    **{f"text_{key}": value for key, value in WIDE.items()},
    **{f"fusion_{key}": value for key, value in WIDE.items()},
)
ROWS = 16


@cache
def parts_of(config: VisionLanguageConfig, seed: int = 0) -> tuple[nnx.GraphDef, dict]:
    abstract = jax.eval_shape(lambda: init_params(config, jax.random.key(0)))
    return graph_of(config), random_params(abstract, seed)


def features_of(student: VisionLanguageConfig, teacher: VisionLanguageConfig | None) -> Features:
    """A student's of a small batch, for what shapes alone tell: in `jax.eval_shape`."""
    models = [None if x is None else nnx.merge(*parts_of(x)) for x in (student, teacher)]
    batch = jax.tree.map(jnp.asarray, tiny_batch(student, 4))
    return Features(models[0], batch, tokenizer=tiny_tokenizer(), reference=models[1])


def one_row_of_devices(count: int) -> jax.sharding.Mesh:
    names, devices = ("data", "fsdp", "tensor"), jax.devices()[:count]
    return jax.make_mesh((count, 1, 1), names, (AxisType.Auto,) * 3, devices=devices)


class Lesson:
    """The losses of objectives, compiled once, for a student and a teacher like it."""

    def __init__(self, objectives):
        graph = graph_of(STUDENT)
        task = Task(graph, objectives, tiny_tokenizer(), Masking(words=0.4))

        def losses_of(student, teacher, batch):
            model, reference = nnx.merge(graph, student), nnx.merge(graph, teacher)
            losses = task.losses(
                task.features(model, batch, jax.random.key(5), reference=reference)
            )
            mean = sum(loss.total / jnp.maximum(loss.weight, 1) for loss in losses.values())
            return mean, {name: (x.total, x.weight, x.metrics) for name, x in losses.items()}

        self.mesh = one_row_of_devices(1)
        self.compiled = jax.jit(jax.grad(losses_of, argnums=(0, 1), has_aux=True))

    def __call__(self, batch, seeds=(0, 1)):
        """Slopes by student and teacher of the sum of means, and each (sum, weight, metrics)."""
        params = [parts_of(STUDENT, seed)[1] for seed in seeds]
        with jax.set_mesh(self.mesh):
            placed = to_device(jax.tree.map(np.asarray, batch), self.mesh)
            return jax.device_get(self.compiled(*params, placed))
