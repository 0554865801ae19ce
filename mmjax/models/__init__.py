"""Encoders, fusions, heads, and the models made of them."""

from typing import Any

from flax import nnx

from mmjax.models.albef import Albef, AlbefConfig
from mmjax.models.bert import BertConfig, BertEncoder
from mmjax.models.blip import Blip, BlipConfig
from mmjax.models.bridgetower import BridgeTower, BridgeTowerConfig
from mmjax.models.captioner import Captioner, CaptionerConfig
from mmjax.models.coca import Coca, CocaConfig
from mmjax.models.features import Encoded, Fused
from mmjax.models.flava import Flava, FlavaConfig
from mmjax.models.fusion import CoAttention, CoAttentionConfig, FusionConfig
from mmjax.models.lxmert import Lxmert, LxmertConfig
from mmjax.models.meter import Meter, MeterConfig
from mmjax.models.model import Model
from mmjax.models.oscar import Oscar, OscarConfig
from mmjax.models.two_tower import TwoTower, TwoTowerConfig
from mmjax.models.uniter import Uniter, UniterConfig
from mmjax.models.vilt import Vilt, ViltConfig
from mmjax.models.vision_language import VisionLanguageConfig, VisionLanguageModel
from mmjax.models.visualbert import VisualBert, VisualBertConfig
from mmjax.models.vit import ViT, ViTConfig, resize_position_embedding
from mmjax.models.vl_bert import VlBert, VlBertConfig

__all__ = [
    "MODELS",
    "BertConfig",
    "BertEncoder",
    "CoAttention",
    "CoAttentionConfig",
    "Encoded",
    "Fused",
    "FusionConfig",
    "Model",
    "ViT",
    "ViTConfig",
    "VisionLanguageConfig",
    "VisionLanguageModel",
    "build_model",
    "model_class",
    "resize_position_embedding",
]

# What can be trained, by `config.model.kind`: the config and its model.
MODELS: dict[str, tuple[type, Any]] = {
    "vision_language": (VisionLanguageConfig, VisionLanguageModel),
    "two_tower": (TwoTowerConfig, TwoTower),
    "albef": (AlbefConfig, Albef),
    "blip": (BlipConfig, Blip),
    "bridgetower": (BridgeTowerConfig, BridgeTower),
    "captioner": (CaptionerConfig, Captioner),
    "coca": (CocaConfig, Coca),
    "flava": (FlavaConfig, Flava),
    "lxmert": (LxmertConfig, Lxmert),
    "meter": (MeterConfig, Meter),
    "oscar": (OscarConfig, Oscar),
    "uniter": (UniterConfig, Uniter),
    "vilt": (ViltConfig, Vilt),
    "visualbert": (VisualBertConfig, VisualBert),
    "vl_bert": (VlBertConfig, VlBert),
}


def build_model(config: Any, rngs: nnx.Rngs) -> Model:
    """The model that a config of MODELS describes, with fresh parameters."""
    return model_class(config)(config, rngs)


def model_class(config: Any) -> Any:
    """The class of that model."""
    for config_class, found in MODELS.values():
        if type(config) is config_class:
            return found
    raise TypeError(f"{type(config).__name__} is no config of mmjax.models.MODELS.")
