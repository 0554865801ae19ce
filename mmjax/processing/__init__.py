"""Pictures and texts as a pretrained model was trained to get them."""

from mmjax.processing.processor import (
    PROCESSOR,
    Processor,
    load_pixels,
    load_processor,
    save_processor,
)

__all__ = ["PROCESSOR", "Processor", "load_pixels", "load_processor", "save_processor"]
