"""ViT and BERT side by side in `transformers`: VisionTextDualEncoderModel."""

from typing import Any

from mmjax.errors import InputError
from mmjax.models.heads import ContrastiveConfig
from mmjax.models.two_tower import TwoTower, TwoTowerConfig
from mmjax.weights.families import bert, vit
from mmjax.weights.families.clip import CONTRASTIVE
from mmjax.weights.family import Family, Source
from mmjax.weights.names import Table, under

_TOWERS = {"vision_config": "vit", "text_config": "bert"}


def _read(source: Source) -> TwoTowerConfig:
    for part, kind in _TOWERS.items():
        if (found := source.json.get(part, {}).get("model_type")) != kind:
            raise InputError(
                f"{source.origin}: {part}.model_type is {found!r}; only {kind!r} is supported."
            )
    image, text = (source.json[part] for part in _TOWERS)
    return TwoTowerConfig(
        image=vit.read_encoder(image, f"{source.origin}: vision_config", pooler=True),
        text=bert.read_encoder(text, f"{source.origin}: text_config", pooler=True),
        contrastive=ContrastiveConfig(source.json.get("projection_dim", 512), bias=False),
    )


def _write(config: Any) -> dict[str, Any]:
    return {
        "architectures": ["VisionTextDualEncoderModel"],
        "model_type": "vision-text-dual-encoder",
        "projection_dim": config.contrastive.width,
        "vision_config": vit.write_encoder(config.image),
        "text_config": bert.write_encoder(config.text),
    }


def _table(config: TwoTowerConfig) -> Table:
    return (
        *under(vit.ENCODER, "image/", "vision_model."),
        *under(bert.ENCODER, "text/", "text_model."),
        *under(CONTRASTIVE, "contrastive/", ""),
    )


def _is_member(config: Any) -> bool:
    return (
        vit.is_encoder(config.image)
        and bert.is_encoder(config.text)
        and config.image.pooler
        and config.text.pooler
        and config.contrastive == ContrastiveConfig(config.contrastive.width, bias=False)
    )


FAMILY = Family(
    name="vision-text-dual-encoder",
    model=TwoTower,
    config=TwoTowerConfig,
    table=_table,
    read=_read,
    write=_write,
    is_member=_is_member,
    unused=bert.UNUSED,
)
