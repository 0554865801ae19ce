"""Texts from decoders: greedy, by sampling and by beam search, over cached keys and values."""

from mmjax.decoding.cache import Cache
from mmjax.decoding.config import GenerationConfig
from mmjax.decoding.decoder import Decoder, Generated
from mmjax.decoding.search import generate

__all__ = ["Cache", "Decoder", "Generated", "GenerationConfig", "generate"]
