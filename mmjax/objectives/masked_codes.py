"""Masked image modelling (MIM): the discrete codes of patches that are hidden."""

from dataclasses import dataclass
from math import prod
from typing import ClassVar

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from mmjax.errors import InputError
from mmjax.objectives.features import Features
from mmjax.objectives.loss import Loss, weighted
from mmjax.objectives.masked_language import word_loss
from mmjax.objectives.objective import Objective


@dataclass(frozen=True)
class MaskedCodes(Objective):
    """Cross-entropy of the codes of hidden patches, given the others and the text.

    The picture's half of FLAVA's masked multimodal modelling, which hides words in the same pass
    (`masking.conditional=False`). `image_codes [B,N]` come from a tokenizer of pictures.
    """

    formula: ClassVar[str] = "−log p(code | other patches, text), mean over hidden patches"
    source: ClassVar[str] = "Singh et al. 2022, FLAVA, section 3.2"
    needs: ClassVar[tuple[str, ...]] = ("masked_image",)
    fields: ClassVar[tuple[str, ...]] = ("image_codes",)

    def __call__(self, features: Features, key: jax.Array) -> Loss:
        """Which patches are hidden is `features.masking`'s."""
        codes, masked = _codes(features), features.patches_masked
        # (class tokens stand in front of the patches)
        patches = masked.fused.image_tokens[:, -codes.shape[1] :]
        logits = features.model.score_codes(patches)
        return loss_of_codes("masked_codes", logits, codes, masked.chosen)


@dataclass(frozen=True)
class MaskedCodesAlone(MaskedCodes):
    """The same before the picture has met its text: BEiT's objective, FLAVA's of pictures."""

    formula: ClassVar[str] = "−log p(code | other patches), mean over hidden patches"
    source: ClassVar[str] = "Bao et al. 2022, BEiT, section 2.3"
    needs: ClassVar[tuple[str, ...]] = ("masked_image_alone",)

    def __call__(self, features: Features, key: jax.Array) -> Loss:
        """Which patches are hidden is `features.masking`'s, the same as for MaskedCodes."""
        codes, masked = _codes(features), features.patches_masked
        patches = masked.image.tokens[:, -codes.shape[1] :]
        logits = features.model.score_codes_alone(patches)
        return loss_of_codes("masked_codes_alone", logits, codes, masked.chosen)


def _codes(features: Features) -> Int[Array, "batch patches"]:
    """The codes of the batch, one a patch."""
    codes, grid = features.batch["image_codes"], features.model.config.image.grid
    if codes.shape[1] != prod(grid):
        raise InputError(
            f"the batch has {codes.shape[1]} image_codes a picture and the model {grid[0]} × "
            f"{grid[1]} patches: set data.code_grid to the patches of a side."
        )
    return codes


def loss_of_codes(
    name: str,
    logits: Float[Array, "batch patches codes"],
    codes: Int[Array, "batch patches"],
    chosen: Bool[Array, "batch patches"],
) -> Loss:
    """The mean over hidden patches, with the accuracy."""
    total, weight = weighted(word_loss(logits, codes), chosen)
    metrics = {f"{name}/accuracy": weighted(logits.argmax(axis=-1) == codes, chosen)}
    return Loss(total, weight, metrics, scores=(logits, chosen.astype(jnp.float32)))
