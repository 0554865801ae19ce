"""Questions for the study of fusions: `:KIND` is the fusion that `init_from` was trained with."""

from configs.finetune import quickstart_vqa
from configs.study import four_fusions


def get_config(arg="co_attention"):
    config, model = quickstart_vqa.get_config(), four_fusions.get_config(arg).model
    for part in ("image", "text", "fusion"):
        config.model[part] = model[part]
    config.total_steps = 300
    config.eval.every = 0
    config.checkpoint.every = 150
    return config
