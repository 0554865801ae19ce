"""Two encoders whose vectors meet on a sphere: CLIP, SigLIP, ALIGN, any image and text encoder."""

from dataclasses import dataclass, field
from typing import Any

from flax import nnx
from jaxtyping import Array, Bool, Float, Int, Key, UInt8

from mmjax.errors import InputError
from mmjax.layers import split_key
from mmjax.models.bert import BertConfig
from mmjax.models.encoders import ImageConfig, TextConfig, image_encoder, text_encoder
from mmjax.models.features import Encoded
from mmjax.models.heads import ContrastiveConfig, ContrastiveHead, unit
from mmjax.models.model import PictureModel


@dataclass(frozen=True)
class TwoTowerConfig:
    """An image encoder, a text encoder, and how they are compared."""

    image: ImageConfig
    text: TextConfig
    contrastive: ContrastiveConfig = field(default_factory=ContrastiveConfig)


class TwoTower(PictureModel):
    """Similarities of every picture with every text of a batch."""

    def __init__(self, config: TwoTowerConfig, rngs: nnx.Rngs):
        self.config = config
        self.image = image_encoder(config.image, rngs)
        self.text = text_encoder(config.text, rngs)
        self.contrastive = ContrastiveHead(
            config.image.width, config.text.width, config.contrastive, rngs
        )

    def encode_text(
        self,
        text: Int[Array, "batch length"],
        text_mask: Bool[Array, "batch length"] | None = None,
        text_type: Int[Array, "batch length"] | None = None,
        key: Key[Array, ""] | None = None,
        text_shift: Float[Array, "batch length width"] | None = None,
    ) -> Encoded:
        """Features of token ids; types are for a BERT alone.

        `text_shift` is added to the words' vectors.
        """
        if text_type is None:
            return self.text(text, text_mask, key=key, shift=text_shift)
        if not isinstance(self.config.text, BertConfig):
            raise InputError("this text encoder has no token types: leave text_type out.")
        return self.text(text, text_mask, text_type, key=key, shift=text_shift)

    def embed_text(self, text: Encoded) -> Float[Array, "batch embedding"]:
        """Unit vectors of encoded texts."""
        return self.contrastive.text(self._summary(text))

    def forward(
        self,
        image: Float[Array, "pictures height width 3"]
        | UInt8[Array, "pictures height width 3"]
        | None = None,
        text: Int[Array, "texts length"] | None = None,
        text_mask: Bool[Array, "texts length"] | None = None,
        text_type: Int[Array, "texts length"] | None = None,
        regions: Float[Array, "pictures regions features"] | None = None,
        boxes: Float[Array, "pictures regions 4"] | None = None,
        region_mask: Bool[Array, "pictures regions"] | None = None,
        key: Key[Array, ""] | None = None,
    ) -> dict[str, Any]:
        """Of pictures `image_embeds [B,E]`, of texts `text_embeds`, of both `logits_per_image`.

        The encoders' own outputs are under `vision_model_output` and `text_model_output`.
        """
        image_key, text_key = split_key(key, 2)
        out: dict[str, Any] = {}
        if image is not None or regions is not None:
            found = {"regions": regions, "boxes": boxes, "region_mask": region_mask}
            encoded = self.encode_image(image, image_key, **found)
            vector = self.contrastive.project_image(encoded.pooled)
            out["vision_model_output"] = self._describe(encoded, vector, self.config.image)
            out["image_embeds"] = unit(vector)
        if text is not None:
            encoded = self.encode_text(text, text_mask, text_type, text_key)
            vector = self.contrastive.project_text(self._summary(encoded))
            out["text_model_output"] = self._describe(encoded, vector, self.config.text)
            out["text_embeds"] = unit(vector)
        if "image_embeds" in out and "text_embeds" in out:
            logits = self.contrastive.logits(out["image_embeds"], out["text_embeds"])
            out["logits_per_image"], out["logits_per_text"] = logits, logits.T
        return out

    def _summary(self, text: Encoded) -> Float[Array, "batch width"]:
        """What stands for a text where it is compared."""
        return text.tokens[:, 0] if self.config.contrastive.text_token else text.pooled

    def _describe(self, encoded, vector, config):
        """What Hugging Face calls pooler_output is the encoder's pooler, or else the projection."""
        pooled = encoded.pooled if getattr(config, "pooler", False) else vector
        return {"last_hidden_state": encoded.tokens, "pooler_output": pooled}
