"""Every family, by `model_type`; where configs are of one class, the first that fits is written."""

from mmjax.weights import align, bert, clip, resnet, siglip, swin, vit
from mmjax.weights import vision_text_dual_encoder as dual_encoder

FAMILIES = {
    family.name: family
    for family in (
        vit.FAMILY,
        swin.FAMILY,
        resnet.FAMILY,
        bert.FAMILY,
        clip.FAMILY,
        siglip.FAMILY,
        siglip.FAMILY_2,
        align.FAMILY,
        align.IMAGE_FAMILY,
        dual_encoder.FAMILY,
    )
}
