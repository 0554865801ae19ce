"""The quickstart's pre-trained model on 500 scenes it has not seen, one caption each."""

from configs.evaluate import retrieval


def get_config(arg=None):
    config = retrieval.get_config()
    config.data.split = "test"
    config.data.size = 500
    config.retrieval.captions = 1
    return config
