"""Visual question answering over the checkpoint's own list of answers."""

from mmjax.config import evaluation_config


def get_config(arg=None):
    config = evaluation_config()
    config.vqa.run = True
    return config
