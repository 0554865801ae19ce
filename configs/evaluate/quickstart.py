"""What the quickstart is scored on: held-out scenes.

`:captions` (the default) for the pre-trained model, 500 pictures with a caption each;
`:composition` the same on scenes with combinations of color and shape that training never showed;
`:questions` for the fine-tuned model, 2,000 questions.
"""

from configs.evaluate import retrieval, vqa
from mmjax.errors import InputError


def get_config(arg=None):
    if arg not in (None, "captions", "composition", "questions"):
        raise InputError(f"quickstart.py takes captions, composition or questions, not {arg!r}.")
    config = (vqa if arg == "questions" else retrieval).get_config()
    config.data.split = "composition" if arg == "composition" else "test"
    config.data.size = 2000 if arg == "questions" else 500
    config.retrieval.captions = 1
    return config
