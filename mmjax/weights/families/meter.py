"""METER under the names of its original code (zdou0830/METER)."""

from typing import Any

from mmjax.models.meter import Meter, MeterConfig
from mmjax.weights.families import bert, openai_clip, roberta
from mmjax.weights.family import Family
from mmjax.weights.names import Entry, Table, modules, under

MASKED_LANGUAGE: Table = (
    *bert.MASKED_LANGUAGE,
    Entry("decoder", "decoder", resize=bert.resize_rows),
)


def stream(name: str) -> Table:
    """One of the two streams, 'image' or 'text', of a co-attention layer."""
    return (
        *under(modules(bert.SELF_ATTENTION), f"{name}_self/", "attention."),
        *under(modules(bert.SELF_ATTENTION), f"{name}_cross/", "crossattention."),
        *modules(
            {
                f"{name}_mlp/up": "intermediate.dense",
                f"{name}_mlp/down": "output.dense",
                f"{name}_mlp/norm": "output.LayerNorm",
            }
        ),
    )


# Around the layers, each but the type table once for text and once for pictures.
FUSION: Table = modules(
    {
        "type_embedding": "token_type_embeddings",
        "text_projection": "cross_modal_text_transform",
        "image_projection": "cross_modal_image_transform",
        "text_pooler": "cross_modal_text_pooler.dense",
        "image_pooler": "cross_modal_image_pooler.dense",
    }
)
CLASSIFIER: Table = modules({"hidden": "0", "norm": "1", "classifier": "3"})


def _table(config: Any) -> Table:
    return (
        *under(openai_clip.IMAGE, "image/", "vit_model.visual."),
        *under(roberta.ENCODER, "text/", "text_transformer."),
        *under(FUSION, "fusion/", ""),
        *under(stream("text"), "fusion/blocks/layers/", "cross_modal_text_layers.{n}."),
        *under(stream("image"), "fusion/blocks/layers/", "cross_modal_image_layers.{n}."),
        *modules({"matching/classifier": "itm_score.fc", "ranking": "rank_output"}),
        *under(MASKED_LANGUAGE, "masked_language/", "mlm_score."),
        *under(CLASSIFIER, "answering/", "vqa_classifier."),
        *under(CLASSIFIER, "reasoning/", "nlvr2_classifier."),
        *under(CLASSIFIER, "entailment/", "snli_classifier."),
    )


FAMILY = Family(
    name="meter",
    model=Meter,
    config=MeterConfig,
    table=_table,
    # What the code carries along of CLIP's text encoder and of RoBERTa, and does not run.
    unused=(
        r"vit_model\.(token_embedding\.weight|positional_embedding|ln_final\.(weight|bias))",
        r"text_transformer\.pooler\.dense\.(weight|bias)",
        *bert.UNUSED,
    ),
)
