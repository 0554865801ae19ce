"""What the quickstart is scored on: held-out scenes.

`:captions` (the default) for the pre-trained model, 500 pictures with a caption each; `:questions`
for the fine-tuned one, 2,000 questions.
"""

from configs.evaluate import retrieval, vqa


def get_config(arg="captions"):
    config = {"captions": retrieval, "questions": vqa}[arg or "captions"].get_config()
    config.data.split = "test"
    config.data.size = {"captions": 500, "questions": 2000}[arg or "captions"]
    config.retrieval.captions = 1
    return config
