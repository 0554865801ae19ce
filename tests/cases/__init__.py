"""Every comparison with `transformers`, live (`tests/parity`) and recorded (`tests/goldens`)."""

from tests.cases import (
    align,
    bert,
    blip,
    bridgetower,
    clip,
    flava,
    gpt2,
    lxmert,
    resnet,
    swin,
    vilt,
    visualbert,
    vit,
)

CASES = (
    *vit.CASES,
    *swin.CASES,
    *resnet.CASES,
    *bert.CASES,
    *clip.CASES,
    *bridgetower.CASES,
    *align.CASES,
    *blip.CASES,
    *lxmert.CASES,
    *visualbert.CASES,
    *vilt.CASES,
    *flava.CASES,
    *gpt2.CASES,
)
