"""Retrieval both ways, re-ranked by image-text matching, and matching by itself."""

from mmjax.config import evaluation_config


def get_config(arg=None):
    config = evaluation_config()
    config.retrieval.run = True
    config.retrieval.rerank = 32
    config.matching.run = True
    return config
