"""CLIP under its original names: OpenAI's own files, and open_clip's (LAION, DataComp).

OpenAI's models have QuickGELU; most of open_clip's have the exact GELU, as their config says.
"""

from collections.abc import Mapping
from typing import Any

from mmjax.errors import InputError
from mmjax.models.heads import ContrastiveConfig
from mmjax.models.text_tower import TextTowerConfig
from mmjax.models.two_tower import TwoTower, TwoTowerConfig
from mmjax.models.vit import ViTConfig
from mmjax.weights.families.bert import resize_rows
from mmjax.weights.families.vit import resize_positions
from mmjax.weights.family import Family, Source
from mmjax.weights.keys import Fixed, Key, read_keys
from mmjax.weights.names import Entry, Table, fused_attention, modules, under

# What open_clip writes beside the weights, instead of a config.json or next to one.
CONFIG = "open_clip_config.json"

LAYER: Table = (
    *fused_attention("self_attention/attention", "attn.in_proj_{leaf}"),
    *modules(
        {
            "self_attention/attention/out": "attn.out_proj",
            "self_attention/norm": "ln_1",
            "mlp/up": "mlp.c_fc",
            "mlp/down": "mlp.c_proj",
            "mlp/norm": "ln_2",
        }
    ),
)
BLOCKS: Table = under(LAYER, "blocks/layers/", "transformer.resblocks.{n}.")
IMAGE: Table = (
    Entry("class_token", "class_embedding", leading=-1),
    Entry("position_embedding", "positional_embedding", resize=resize_positions),
    *modules({"patch": "conv1", "embedding_norm": "ln_pre", "norm": "ln_post"}),
    *BLOCKS,
)
# Entries that go down to our leaf are plain parameters there, without a module around them. Such
# matrices lie there as here, [in, out].
TEXT: Table = (
    Entry("token_embedding", "token_embedding", resize=resize_rows),
    Entry("position_embedding/embedding", "positional_embedding"),
    *modules({"norm": "ln_final"}),
    *BLOCKS,
)
CONTRASTIVE: Table = (
    Entry("image_projection/kernel", "visual.proj"),
    Entry("text_projection/kernel", "text_projection"),
    Entry("logit_scale", "logit_scale"),
)

# The fixed ones are options of open_clip that the names and shapes of the tensors do not tell, or
# not as clearly.
_TOWER_KEYS = (
    Key("layers", "depth", 12),
    Key("mlp_ratio", "mlp_ratio", 4.0),
    Fixed("final_ln_after_pool", False),
    Fixed("act_kwargs", None),
    Fixed("norm_kwargs", None),
)
_IMAGE_KEYS = (
    *_TOWER_KEYS,
    Key("width", "width", 768),
    Key("head_width", "head_width", 64),
    Key("image_size", "image_size", 224),
    Key("patch_size", "patch_size", 16),
    Fixed("timm_model_name", None),
    Fixed("no_ln_pre", False),
    Fixed("attentional_pool", False),
    Fixed("pos_embed_type", "learnable"),
    Fixed("pool_type", "tok"),
)
_TEXT_KEYS = (
    *_TOWER_KEYS,
    Key("width", "width", 512),
    Key("heads", "heads", 8),
    Key("vocab_size", "vocabulary_size", 49408),
    Key("context_length", "max_length", 77),
    Fixed("hf_model_name", None),
    Fixed("no_causal_mask", False),
    Fixed("pool_type", "argmax"),
)
_MODEL_KEYS = (
    Key("embed_dim", "width", 512),
    Key("quick_gelu", "quick_gelu", False),
    Fixed("custom_text", False),
)


def is_named_so(names: Any) -> bool:
    """Whether these are names of OpenAI's and open_clip's code."""
    return any(name.startswith("visual.") for name in names)


def read(source: Source) -> TwoTowerConfig:
    """The model that an open_clip_config.json describes."""
    description = _part(source.json, "model_cfg", source.origin)
    origin = f"{source.origin}: model_cfg"
    model = read_keys(_MODEL_KEYS, description, origin)
    layer = {"epsilon": 1e-5, "activation": "quick_gelu" if model["quick_gelu"] else "gelu"}
    return TwoTowerConfig(
        image=_read_image(
            _part(description, "vision_cfg", origin),
            source.json.get("preprocess_cfg") or {},
            f"{origin}: vision_cfg",
            **layer,
        ),
        text=_read_text(_part(description, "text_cfg", origin), f"{origin}: text_cfg", **layer),
        contrastive=ContrastiveConfig(width=model["width"], bias=False),
    )


def _read_image(json: Any, pixels: Any, origin: str, **layer: Any) -> ViTConfig:
    if isinstance(layers := json.get("layers"), list):
        raise InputError(
            f"{origin}: layers is {layers}, those of CLIP's ResNets; only its ViTs are supported."
        )
    fields = read_keys(_IMAGE_KEYS, json, origin)
    fields["heads"] = fields["width"] // fields.pop("head_width")
    fields |= {name: tuple(pixels[name]) for name in ("mean", "std") if name in pixels}
    return ViTConfig(
        **_with_mlp_width(fields),
        **layer,
        patch_bias=False,
        embedding_norm=True,
        norm_tokens=False,
    )


def _read_text(json: Any, origin: str, **layer: Any) -> TextTowerConfig:
    fields = read_keys(_TEXT_KEYS, json, origin)
    return TextTowerConfig(**_with_mlp_width(fields), **layer, pool="largest")


def _with_mlp_width(fields: dict[str, Any]) -> dict[str, Any]:
    ratio = fields.pop("mlp_ratio")
    return {**fields, "mlp_width": int(fields["width"] * ratio)}


def _part(json: Mapping[str, Any], name: str, origin: str) -> Mapping[str, Any]:
    part = json.get(name)
    if not isinstance(part, Mapping):
        raise InputError(f"{origin}: expected an object {name!r} in it, found {part!r}.")
    return part


FAMILY = Family(
    name="open_clip",
    model=TwoTower,
    config=TwoTowerConfig,
    table=lambda config: (
        *under(IMAGE, "image/", "visual."),
        *under(TEXT, "text/", ""),
        *under(CONTRASTIVE, "contrastive/", ""),
    ),
    is_member=lambda config: False,  # `transformers` has it: a new model is written as CLIPModel
    # The causal mask, and three numbers that OpenAI's archives carry.
    unused=("attn_mask", "input_resolution", "context_length", "vocab_size"),
)
