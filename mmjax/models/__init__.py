"""Encoders, fusions, heads, and the model assembled of them."""

from mmjax.models.bert import BertConfig, BertEncoder
from mmjax.models.features import Encoded, Fused
from mmjax.models.fusion import CoAttention, CoAttentionConfig
from mmjax.models.vision_language import ModelConfig, VisionLanguageModel
from mmjax.models.vit import ViT, ViTConfig, resize_position_embedding

__all__ = [
    "BertConfig",
    "BertEncoder",
    "CoAttention",
    "CoAttentionConfig",
    "Encoded",
    "Fused",
    "ModelConfig",
    "ViT",
    "ViTConfig",
    "VisionLanguageModel",
    "resize_position_embedding",
]
