"""VL-BERT over precomputed features (jackroos/VL-BERT): its pre-training and its VQA model.

Not supported are files that hold a detector of their own (`image_feature_extractor.backbone`), as
those trained end to end do.
"""

from mmjax.models.vl_bert import VlBert, VlBertConfig
from mmjax.weights.families import bert
from mmjax.weights.family import Family
from mmjax.weights.names import Entry, Table, modules, under

EMBEDDINGS: Table = (
    *under(
        modules(
            {
                "text_embeddings/token_embedding": "word_embeddings",
                "text_embeddings/position_embedding": "position_embeddings",
                "text_embeddings/type_embedding": "token_type_embeddings",
                "text_embeddings/norm": "embedding_LayerNorm",
                "picture_norm": "visual_ln_text",
                "region_embeddings/norm": "visual_ln_object",
            }
        ),
        "",
        "vlbert.",
    ),
    Entry("region_embeddings/projection", "image_feature_extractor.obj_downsample.1"),
    *(
        Entry(ours, f"{theirs}.weight", leading=1)
        for ours, theirs in {
            "end": "vlbert.end_embedding",
            "no_picture": "aux_text_visual_embedding",
            "region_embeddings/word": "object_linguistic_embeddings",
            "region_embeddings/masked_word": "object_mask_word_embedding",
            "region_embeddings/masked_features": "object_mask_visual_embedding",
        }.items()
    ),
)
PRETRAINING: Table = (
    *under(bert.MASKED_LANGUAGE, "masked_language/", "mlm_head.predictions."),
    *modules(
        {
            "region_classification/hidden": "mvrc_head.transform.dense",
            "region_classification/classifier": "mvrc_head.region_cls_pred",
            "matching/classifier": "relationsip_head.caption_image_relationship",
        }
    ),
)
ANSWERING: dict[str, Table] = {
    "mlm": modules({"hidden": "0.dense", "norm": "0.LayerNorm", "classifier": "2"}),
    "2fc": modules({"hidden": "1", "classifier": "4"}),
}


def _table(config: VlBertConfig) -> Table:
    return (
        *EMBEDDINGS,
        *under(bert.LAYER, "fusion/blocks/layers/", "vlbert.encoder.layer.{n}."),
        *modules({"fusion/pooler": "vlbert.pooler.dense"}),
        *under(PRETRAINING, "", "vlbert."),
        *under(ANSWERING[config.classifier], "answering/", "final_mlp."),
    )


FAMILY = Family(
    name="vl_bert",
    model=VlBert,
    config=VlBertConfig,
    table=_table,
    tied={"vlbert.mlm_head.predictions.decoder.weight": "vlbert.word_embeddings.weight"},
)
