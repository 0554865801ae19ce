"""What every objective is: options from a config, and a function of the features of a batch."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar

import jax
from jaxtyping import Array

from mmjax.errors import InputError
from mmjax.objectives.loss import Loss

if TYPE_CHECKING:
    from mmjax.objectives.features import Features

# What gives a field of the batch: a key of `config.data`.
_GIVEN_BY = {
    "answer": "data.task='questions'",
    "answer_text": "data.answer_length",
    "image_codes": "data.code_grid",
    "label": "data.second_caption or data.false_tags",
    "regions": "data.regions",
    "region_labels": "data.regions",
    "region_attributes": "data.regions",
    "region_distributions": "data.regions",
}
# What sets a part of the model that an objective reads: a key of its config.
_SET_BY = {
    "contrastive": "embedding_width",
    "answering": "answers",
    "matcher": "matching",
    "text_decoder": "decoder_depth",
}


@dataclass(frozen=True)
class Objective:
    """One term of the training loss. Its fields are its options in `config.objectives.NAME`.

    The class variables say what `docs/objectives.md` shows and what the loss asks for.
    """

    weight: float = 0.0  # of this term in the sum; 0: off

    formula: ClassVar[str] = ""
    source: ClassVar[str] = ""  # paper and section
    needs: ClassVar[tuple[str, ...]] = ()  # parts of the model: attributes that are not None
    fields: ClassVar[tuple[str, ...]] = ()  # of the batch, beside picture and text
    # Whether it compares the examples of a batch, so that splitting the batch changes the loss.
    compares_examples: ClassVar[bool] = False
    # Whether it does so by the embeddings of pictures and texts alone, which can be known before.
    compares_embeddings: ClassVar[bool] = False
    needs_reference: ClassVar[bool] = False  # it learns from another model

    @property
    def needs_average(self) -> bool:
        """Whether it learns from the moving average of the parameters."""
        return False

    def prepare(self, features: "Features", key: jax.Array) -> None:
        """Ask the walks over the global batch (`features.walk`) for what the loss will need.

        All objectives are prepared before the first is called, so that they share the walks.
        """

    def __call__(self, features: "Features", key: jax.Array) -> Loss:
        """The loss of one batch; `key` draws what it leaves to chance, by example."""
        raise NotImplementedError

    def check(self, name: str, model: Any) -> None:
        """Raise InputError where `model` (abstract) lacks what `config.objectives.NAME` needs."""
        for part in self.needs:
            if getattr(model, part, None) is None:
                raise InputError(
                    f"objectives.{name} needs a part that the model lacks: set "
                    f"model.{_SET_BY.get(part, part)}, or take a model that has {part}."
                )

    def check_batch(self, name: str, batch: Mapping[str, Any]) -> None:
        """Raise InputError where a batch lacks a field that `config.objectives.NAME` reads."""
        for field in self.fields:
            if field not in batch:
                key = _GIVEN_BY.get(field, "")
                raise InputError(
                    f"objectives.{name} reads {field!r}, which the data do not give"
                    + (f": set {key}, if the source has it." if key else ".")
                )

    def memory(self, model: Any, batch_size: int) -> dict[str, Array]:
        """What it carries from step to step, at its start. It is saved with every checkpoint.

        `features.memory` holds the current values, and the loss returns the next ones.
        """
        return {}
