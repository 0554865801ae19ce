"""Visual question answering on drawn scenes, from the quickstart's pre-trained model.

`:question_only` trains the same model on grey pictures: what the questions alone give away.
"""

from configs import quickstart
from configs.sizes import sized


def get_config(arg=None):
    config = quickstart.get_config()
    config.total_steps = 500
    config.optimizer.learning_rate = 1e-3
    config.checkpoint.every = config.eval.every = 250
    config.init_from = "runs/quickstart/pretrain"
    config.data.task = "questions"
    config.data.size = 40000
    for objective in config.objectives.values():
        objective.weight = 0.0
    config.objectives.answering.weight = 1.0
    config.model.embedding_width = 0
    config.model.matching = False
    config.model.masked_language = False
    if arg == "question_only":
        config.question_only = True
        return config
    return sized(config, arg)
