"""Every comparison with `transformers`, live (`tests/parity`) and recorded (`tests/goldens`)."""

from tests.cases import align, bert, clip, resnet, swin, vit

CASES = (
    *vit.CASES,
    *swin.CASES,
    *resnet.CASES,
    *bert.CASES,
    *clip.CASES,
    *align.CASES,
)
