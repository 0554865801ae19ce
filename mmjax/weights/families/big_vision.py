"""The `.npz` files of google-research/big_vision: ViTs, and two towers as of SigLIP and LiT.

They carry no config. big_vision's own models have activation='gelu_tanh' and epsilon=1e-6.
"""

from dataclasses import replace

from mmjax.models.encoders import ImageModel, ImageModelConfig
from mmjax.models.two_tower import TwoTower, TwoTowerConfig
from mmjax.weights.families.bert import resize_rows
from mmjax.weights.families.vit import resize_positions
from mmjax.weights.family import Family
from mmjax.weights.names import Entry, Table, modules, under

_ATTENTION = "MultiHeadDotProductAttention_0/"
_LAYER = {
    "self_attention/norm": "LayerNorm_0",
    **{
        f"self_attention/attention/{name}": _ATTENTION + name
        for name in ("query", "key", "value", "out")
    },
    "mlp/norm": "LayerNorm_1",
    "mlp/up": "MlpBlock_0/Dense_0",
    "mlp/down": "MlpBlock_0/Dense_1",
}
_POOLING = {
    **{f"attention/{name}": _ATTENTION + name for name in ("query", "key", "value", "out")},
    "mlp/norm": "LayerNorm_0",
    "mlp/up": "MlpBlock_0/Dense_0",
    "mlp/down": "MlpBlock_0/Dense_1",
}


def _flax(names: dict[str, str], ours: str = "", theirs: str = "") -> Table:
    return under(modules(names), ours, theirs, flax=True)


IMAGE: Table = (
    Entry("class_token", "cls", leading=1),
    Entry("position_embedding", "pos_embedding", leading=1, resize=resize_positions),
    *_flax({"patch": "embedding", "norm": "Transformer/encoder_norm"}),
    *_flax(_LAYER, "blocks/layers/", "Transformer/encoderblock_{n}/"),
    Entry("pooling/query", "MAPHead_0/probe", leading=1),
    *_flax(_POOLING, "pooling/", "MAPHead_0/"),
)
TEXT: Table = (
    Entry("token_embedding/embedding", "Embed_0/embedding", resize=resize_rows),
    Entry("position_embedding/embedding", "pos_embedding", leading=1),
    *_flax(_LAYER, "blocks/layers/", "Encoder_0/encoderblock_{n}/"),
    *_flax({"norm": "Encoder_0/encoder_norm", "head": "head"}),
)

VIT = Family(
    name="big_vision",
    model=ImageModel,
    config=ImageModelConfig,
    table=lambda config: (*under(IMAGE, "image/", ""), *_flax({"classifier": "head"})),
    is_member=lambda config: False,
    prefix="params/",
)
TWO_TOWERS = replace(
    VIT,
    name="big_vision_two_towers",
    model=TwoTower,
    config=TwoTowerConfig,
    table=lambda config: (
        *under(IMAGE, "image/", "img/"),
        *_flax({"contrastive/image_projection": "img/head"}),
        *under(TEXT, "text/", "txt/"),
        Entry("contrastive/logit_scale", "t", leading=1),
        Entry("contrastive/logit_bias", "b", leading=1),
    ),
)
