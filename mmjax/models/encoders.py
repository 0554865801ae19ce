"""One encoder of each modality by the kind of its config, and models of a single encoder."""

from dataclasses import dataclass, field
from typing import Any

import jax
from flax import nnx
from jaxtyping import Array, Bool, Float, Int, Key, UInt8

from mmjax.layers import linear
from mmjax.models.bert import BertConfig, BertEncoder
from mmjax.models.efficientnet import EfficientNet, EfficientNetConfig
from mmjax.models.features import Encoded
from mmjax.models.heads import MaskedLanguageHead
from mmjax.models.model import Model, PictureModel
from mmjax.models.region_encoder import RegionConfig, RegionEncoder
from mmjax.models.resnet import ResNet, ResNetConfig
from mmjax.models.swin import Swin, SwinConfig
from mmjax.models.text_tower import TextTower, TextTowerConfig
from mmjax.models.vit import ViT, ViTConfig

ImageConfig = ViTConfig | SwinConfig | ResNetConfig | EfficientNetConfig | RegionConfig
TextConfig = BertConfig | TextTowerConfig

IMAGE_ENCODERS: dict[type, Any] = {
    ViTConfig: ViT,
    SwinConfig: Swin,
    ResNetConfig: ResNet,
    EfficientNetConfig: EfficientNet,
    RegionConfig: RegionEncoder,
}
TEXT_ENCODERS: dict[type, Any] = {BertConfig: BertEncoder, TextTowerConfig: TextTower}


def image_encoder(config: ImageConfig, rngs: nnx.Rngs) -> Any:
    """The encoder of pictures that `config` describes: pixels or regions in, `Encoded` out."""
    return IMAGE_ENCODERS[type(config)](config, rngs)


def text_encoder(config: TextConfig, rngs: nnx.Rngs) -> Any:
    """The encoder of texts that `config` describes: ids and mask in, `Encoded` out."""
    return TEXT_ENCODERS[type(config)](config, rngs)


@dataclass(frozen=True)
class ImageModelConfig:
    """An image encoder on its own, with a classifier where there are labels."""

    image: ImageConfig
    labels: tuple[str, ...] = field(default=())


class ImageModel(PictureModel):
    """Features of pictures, and scores of labels: ViTModel, ViTForImageClassification and kin."""

    def __init__(self, config: ImageModelConfig, rngs: nnx.Rngs):
        self.config = config
        self.image = image_encoder(config.image, rngs)
        width, labels = config.image.width, len(config.labels)
        self.classifier = linear(width, labels, "float32", rngs) if labels else None

    def forward(
        self,
        image: Float[Array, "batch height width 3"] | UInt8[Array, "batch height width 3"],
        key: Key[Array, ""] | None = None,
    ) -> dict[str, Any]:
        """`last_hidden_state [B,N,D]`, `pooler_output [B,D]`; with labels `logits [B,labels]`."""
        encoded = self.encode_image(image, key)
        out = describe(encoded)
        if self.classifier is not None:
            out["logits"] = self.classifier(encoded.pooled)
        return out


@dataclass(frozen=True)
class TextModelConfig:
    """A BERT on its own, with the heads of its pre-training as wanted."""

    text: BertConfig
    masked_language: bool = False
    next_sentence: bool = False


class TextModel(Model):
    """Features of texts and scores of masked words: BertModel, BertForMaskedLM, …ForPreTraining."""

    def __init__(self, config: TextModelConfig, rngs: nnx.Rngs):
        self.config = config
        text = config.text
        self.text = BertEncoder(text, rngs)
        self.masked_language = (
            MaskedLanguageHead(text.width, text, text.dtype, rngs)
            if config.masked_language
            else None
        )
        self.next_sentence = (
            linear(text.width, 2, "float32", rngs) if config.next_sentence else None
        )

    def encode_text(
        self,
        text: Int[Array, "batch length"],
        text_mask: Bool[Array, "batch length"] | None = None,
        text_type: Int[Array, "batch length"] | None = None,
        key: Key[Array, ""] | None = None,
    ) -> Encoded:
        """Features of token ids."""
        return self.text(text, text_mask, text_type, key=key)

    def forward(
        self,
        text: Int[Array, "batch length"],
        text_mask: Bool[Array, "batch length"] | None = None,
        text_type: Int[Array, "batch length"] | None = None,
        key: Key[Array, ""] | None = None,
    ) -> dict[str, Any]:
        """`last_hidden_state [B,L,D]`, `pooler_output [B,D]`; `logits [B,L,V]` of masked words."""
        encoded = self.encode_text(text, text_mask, text_type, key)
        out = describe(encoded)
        if self.masked_language is not None:
            out["logits"] = self.masked_language(encoded.tokens, self.text.embeddings)
        if self.next_sentence is not None:
            out["seq_relationship_logits"] = self.next_sentence(encoded.pooled)
        return out


def describe(encoded: Encoded) -> dict[str, jax.Array]:
    """An encoder's output under Hugging Face's names."""
    return {"last_hidden_state": encoded.tokens, "pooler_output": encoded.pooled}
