"""ViLT: ViltModel and its classes in `transformers`; and the files of dandelin/ViLT.

Of the classes ViltForTokenClassification is not supported. `max_image_length` is not read: patches
above a maximum, which are dropped at random there, all stay here.
"""

from math import isqrt
from typing import Any

import jax.numpy as jnp
import numpy as np

from mmjax.errors import InputError
from mmjax.models.vilt import Vilt, ViltConfig, stretch
from mmjax.weights.families import bert, meter, timm, vit
from mmjax.weights.family import Family, Source
from mmjax.weights.keys import ACTIVATIONS, Fixed, Key, read_keys, write_keys
from mmjax.weights.names import Entry, Table, modules, under

KEYS = (
    Key("vocab_size", "vocabulary_size", 30522),
    Key("hidden_size", "width", 768),
    Key("num_hidden_layers", "depth", 12),
    Key("num_attention_heads", "heads", 12),
    Key("intermediate_size", "mlp_width", 3072),
    Key("hidden_act", "activation", "gelu", ACTIVATIONS),
    Key("hidden_dropout_prob", "dropout", 0.0),
    Key("layer_norm_eps", "epsilon", 1e-12),
    Key("qkv_bias", "qkv_bias", True),
    Key("max_position_embeddings", "max_length", 40),
    Key("type_vocab_size", "types", 2),
    Key("modality_type_vocab_size", "modalities", 2),
    Key("pad_token_id", "padding", None, null=-1),
    Key("image_size", "image_size", 384),
    Key("patch_size", "patch_size", 32),
    Fixed("num_channels", 3),
)


def resize_positions(table: np.ndarray, shape: tuple[int, ...]) -> np.ndarray:
    """The table for pictures of another size, stretched as for one picture."""
    old, new = (isqrt(length - 1) for length in (len(table), shape[0]))
    side = jnp.full(1, new)
    grid = stretch(jnp.asarray(table[1:].reshape(old, old, -1)), side, side, (new, new))
    return np.concatenate([table[:1], np.asarray(grid).reshape(new**2, -1)])


# The class of each head.
_CLASSES = {
    "masked_language": "ViltForMaskedLM",
    "ranking": "ViltForImageAndTextRetrieval",
    "answers": "ViltForQuestionAnswering",
    "labels": "ViltForImagesAndTextClassification",
}
_POSITIONS = "image_embeddings/position_embedding"


def _read(source: Source) -> ViltConfig:
    fields = read_keys(KEYS, source.json, source.origin)
    return ViltConfig(
        **fields,
        text_epsilon=fields["epsilon"],
        masked_language=source.has("mlm_score.transform.dense.weight"),
        tied=not source.has("mlm_score.decoder.weight"),
        ranking=source.has("rank_output.weight"),
        **(_read_classifier(source) if source.has("classifier.0.weight") else {}),
    )


def _read_classifier(source: Source) -> dict[str, Any]:
    """What the classifier is for: its tensors have the same names in two classes."""
    pictures, labels = source.json.get("num_images", -1), vit.read_labels(source.json)
    if pictures not in (-1, 2):
        raise InputError(
            f"{source.origin}: num_images is {pictures!r}; classifiers of one picture (-1) and of "
            "two are supported."
        )
    return {"answers" if pictures == -1 else "labels": labels}


def _write(config: ViltConfig) -> dict[str, Any]:
    labels = config.answers or config.labels
    return {
        "architectures": [_CLASSES[task] for task in config.tasks] or ["ViltModel"],
        "model_type": "vilt",
        **write_keys(KEYS, config),
        **({"num_images": 2} if config.labels else {}),
        **(vit.write_labels(labels) if labels else {}),
    }


def _is_member(config: ViltConfig) -> bool:
    return (
        config.norm == "pre"
        and config.epsilon == config.text_epsilon
        and not config.matching
        and len(config.tasks) < 2
    )


def _table(config: ViltConfig) -> Table:
    prefix = "vilt." if config.tasks else ""
    return (
        *under(bert.EMBEDDINGS, "text_embeddings/", prefix + "embeddings.text_embeddings."),
        Entry(
            _POSITIONS,
            prefix + "embeddings.position_embeddings",
            leading=1,
            resize=resize_positions,
        ),
        # A ViT's names, of which one part of ours has what is below the layers, another the rest.
        *under(vit.ENCODER, "image_embeddings/", prefix),
        *under(vit.ENCODER, "fusion/", prefix),
        *modules({"modality_embedding": prefix + "embeddings.token_type_embeddings"}),
        Entry("masked_language/bias", "mlm_score.decoder.bias", resize=bert.resize_rows),
        *under(meter.MASKED_LANGUAGE, "masked_language/", "mlm_score."),
        *modules({"ranking": "rank_output"}),
        *under(meter.CLASSIFIER, "answering/", "classifier."),
        *under(meter.CLASSIFIER, "reasoning/", "classifier."),
    )


_ORIGINAL: Table = (
    *under(bert.EMBEDDINGS, "text_embeddings/", "text_embeddings."),
    Entry(_POSITIONS, "transformer.pos_embed", leading=1, resize=resize_positions),
    *under(timm.ENCODER, "image_embeddings/", "transformer."),
    *under(timm.ENCODER, "fusion/", "transformer."),
    *modules({"modality_embedding": "token_type_embeddings", "fusion/pooler": "pooler.dense"}),
    *under(meter.MASKED_LANGUAGE, "masked_language/", "mlm_score."),
    *modules({"matching/classifier": "itm_score.fc", "ranking": "rank_output"}),
    *under(meter.CLASSIFIER, "answering/", "vqa_classifier."),
    *under(meter.CLASSIFIER, "reasoning/", "nlvr2_classifier."),
)

FAMILY = Family(
    name="vilt",
    model=Vilt,
    config=ViltConfig,
    table=_table,
    read=_read,
    write=_write,
    is_member=_is_member,
    prefix="vilt.",
    tied={"mlm_score.bias": "mlm_score.decoder.bias"},
    unused=bert.UNUSED,
)
ORIGINAL = Family(
    name="vilt-original",
    model=Vilt,
    config=ViltConfig,
    table=lambda config: _ORIGINAL,
    unused=bert.UNUSED,
)
