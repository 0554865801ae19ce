"""UNITER (ChenRocks/UNITER) and VILLA (zhegan27/VILLA), whose files have the same names."""

from mmjax.models.uniter import Uniter, UniterConfig
from mmjax.weights.families import bert
from mmjax.weights.family import Family
from mmjax.weights.names import Entry, Table, fused_attention, modules, under

ENCODER: Table = (
    *under(bert.EMBEDDINGS, "text_embeddings/", "embeddings."),
    *under(
        modules(
            {
                "features": "img_linear",
                "features_norm": "img_layer_norm",
                "box": "pos_linear",
                "box_norm": "pos_layer_norm",
                "mask_embedding": "mask_embedding",
                "norm": "LayerNorm",
            }
        ),
        "region_embeddings/",
        "img_embeddings.",
    ),
    *under(bert.LAYER, "fusion/blocks/layers/", "encoder.layer.{n}."),
    *modules({"fusion/pooler": "pooler.dense"}),
)
PRETRAINING: Table = (
    *under(bert.MASKED_LANGUAGE, "masked_language/", "cls.predictions."),
    Entry("feature_regression/bias", "feat_regress.bias"),
    *modules(
        {
            "feature_regression/transform": "feat_regress.net.0",
            "feature_regression/norm": "feat_regress.net.2",
            "region_classification/hidden": "region_classifier.net.0",
            "region_classification/norm": "region_classifier.net.2",
            "region_classification/classifier": "region_classifier.net.3",
            "matching/classifier": "itm_output",
        }
    ),
)
TASKS: Table = (
    *modules(
        {
            "ranking": "rank_output",
            "answering/hidden": "vqa_output.0",
            "answering/norm": "vqa_output.2",
            "answering/classifier": "vqa_output.3",
            "reasoning": "nlvr2_output",
            "reasoning/classifier": "nlvr2_output",
            "reasoning/merge": "fc.0",
            "reasoning/pool": "attn_pool.fc.0",
        }
    ),
    *fused_attention("reasoning/first", "attn1.in_proj_{leaf}"),
    *fused_attention("reasoning/second", "attn2.in_proj_{leaf}"),
    Entry("reasoning/first/out", "attn1.out_proj", inputs=2),
    Entry("reasoning/second/out", "attn2.out_proj", inputs=2),
)
TABLE: Table = (*under(ENCODER, "", "uniter."), *PRETRAINING, *TASKS)
TIED = {
    "cls.predictions.decoder.weight": "uniter.embeddings.word_embeddings.weight",
    "feat_regress.weight": "uniter.img_embeddings.img_linear.weight",
}

FAMILY = Family(
    name="uniter", model=Uniter, config=UniterConfig, table=lambda config: TABLE, tied=TIED
)
VILLA = Family(
    name="villa", model=Uniter, config=UniterConfig, table=lambda config: TABLE, tied=TIED
)
