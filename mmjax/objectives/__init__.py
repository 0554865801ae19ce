"""Objectives: features -> loss. Each a sum over the global batch with its weight.

What a loss means never depends on how many devices or processes computed it.
"""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float, Key

from mmjax.data.tokenizer import TextTokenizer
from mmjax.errors import InputError, near_misses
from mmjax.objectives.adversarial import Adversarial
from mmjax.objectives.answer_generation import AnswerGeneration
from mmjax.objectives.answering import Answering, AnswerLabels
from mmjax.objectives.captioning import Captioning, PrefixLanguage
from mmjax.objectives.contrastive import Contrastive, SigmoidContrastive, TokenContrastive
from mmjax.objectives.distillation import (
    AnswerDistillation,
    MatchingDistillation,
    SimilarityDistillation,
    WordDistillation,
)
from mmjax.objectives.feature_distillation import (
    AttentionDistillation,
    EmbeddingDistillation,
    RelationDistillation,
)
from mmjax.objectives.features import Features
from mmjax.objectives.loss import Loss, purpose_key
from mmjax.objectives.masked_codes import MaskedCodes, MaskedCodesAlone
from mmjax.objectives.masked_language import MaskedLanguage, MaskedLanguageAlone
from mmjax.objectives.masked_regions import (
    RegionAttributes,
    RegionDistributions,
    RegionFeatures,
    RegionLabels,
)
from mmjax.objectives.masking import Masking
from mmjax.objectives.matching import Matching
from mmjax.objectives.momentum import MomentumContrastive
from mmjax.objectives.objective import Objective
from mmjax.objectives.pairing import LabelledPairing, Pairing
from mmjax.objectives.ranking import MarginRanking, Ranking
from mmjax.schema import build

__all__ = [
    "OBJECTIVES",
    "Adversarial",
    "Features",
    "Loss",
    "Masking",
    "Objective",
    "Task",
    "build_objectives",
]

# By their name in `config.objectives`. A new objective is a class, and a line here.
OBJECTIVES: dict[str, type[Objective]] = {
    "contrastive": Contrastive,
    "sigmoid_contrastive": SigmoidContrastive,
    "token_contrastive": TokenContrastive,
    "momentum_contrastive": MomentumContrastive,
    "matching": Matching,
    "pairing": Pairing,
    "labelled_pairing": LabelledPairing,
    "ranking": Ranking,
    "margin_ranking": MarginRanking,
    "masked_language": MaskedLanguage,
    "masked_language_alone": MaskedLanguageAlone,
    "masked_codes": MaskedCodes,
    "masked_codes_alone": MaskedCodesAlone,
    "region_features": RegionFeatures,
    "region_labels": RegionLabels,
    "region_attributes": RegionAttributes,
    "region_distributions": RegionDistributions,
    "captioning": Captioning,
    "prefix_language": PrefixLanguage,
    "answering": Answering,
    "answer_labels": AnswerLabels,
    "answer_generation": AnswerGeneration,
    "similarity_distillation": SimilarityDistillation,
    "matching_distillation": MatchingDistillation,
    "word_distillation": WordDistillation,
    "answer_distillation": AnswerDistillation,
    "embedding_distillation": EmbeddingDistillation,
    "relation_distillation": RelationDistillation,
    "attention_distillation": AttentionDistillation,
}


def build_objectives(config: Mapping[str, Mapping[str, Any]], model: Any) -> dict[str, Objective]:
    """The terms of `config.objectives` with a positive weight, by name.

    Raises InputError where a term needs a part that the (abstract) model lacks.
    """
    objectives = {}
    for name, options in config.items():
        if name not in OBJECTIVES:
            raise InputError(f"objectives.{name} is unknown.{near_misses(name, OBJECTIVES)}")
        objective = build(OBJECTIVES[name], options, f"objectives.{name}")
        if objective.weight > 0:
            objective.check(name, model)
            objectives[name] = objective
    if not objectives:
        raise InputError("every weight in config.objectives is 0: there is nothing to train.")
    return objectives


@dataclass(frozen=True)
class Task:
    """What is learnt: a model's structure, and the objectives that it is trained on."""

    graph: nnx.GraphDef
    objectives: Mapping[str, Objective]
    tokenizer: TextTokenizer
    masking: Masking = field(default_factory=Masking)
    adversarial: Adversarial = field(default_factory=Adversarial)
    reference: nnx.GraphDef | None = None  # the structure of the model that teaches, if any

    def features(
        self,
        model: Any,
        batch: Mapping[str, Array],
        key: Key[Array, ""],
        dropout_key: Key[Array, ""] | None = None,
        **context: Any,
    ) -> Features:
        """What the objectives share of one batch.

        `key` draws masks and negatives, by example; `dropout_key` dropout (None: evaluation);
        `context` are the further arguments of `Features`.
        """
        return Features(
            model,
            batch,
            dropout_key,
            draws=key,
            tokenizer=self.tokenizer,
            masking=self.masking,
            **context,
        )

    def losses(self, features: Features, names: Iterable[str] | None = None) -> dict[str, Loss]:
        """The loss of every objective, or of those named.

        Without a reference, what is learnt from it alone is left out.
        """
        asked = {
            name: (self.objectives[name], purpose_key(features.draws, name))
            for name in (self.objectives if names is None else names)
            if features.reference is not None or not self.objectives[name].needs_reference
        }
        for objective, key in asked.values():
            objective.prepare(features, key)
        losses = {}
        for name, (objective, key) in asked.items():
            with jax.named_scope(name):
                losses[name] = objective(features, key)
        return losses

    def total(
        self, losses: Mapping[str, Loss], weights: Mapping[str, Float[Array, ""]]
    ) -> Float[Array, ""]:
        """The weighted sum of the objectives' means: each sum over its weight in the batch."""
        terms = [
            self.objectives[name].weight * loss.total / weights[name]
            for name, loss in losses.items()
        ]
        return jnp.stack(terms).sum() if terms else jnp.zeros(())

    def memory(self, model: Any, batch_size: int) -> dict[str, dict[str, Array]]:
        """What the objectives remember, at the start."""
        memories = {
            name: objective.memory(model, batch_size) for name, objective in self.objectives.items()
        }
        return {name: memory for name, memory in memories.items() if memory}
