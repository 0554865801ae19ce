"""The study of fusions (`benchmarks/four_fusions.py`): the quickstart's model, `:KIND` the fusion.

Everything but the fusion is the quickstart's: scenes, objectives, optimizer, steps. A layer of
each kind has its own number of parameters, so depths differ to make the models equal in size;
without a fusion the encoders get its share.
"""

from configs import quickstart
from mmjax.errors import InputError, near_misses

# Layers of the picture's encoder, the text's, and the fusion. A layer of a plain Transformer has
# 12 w² parameters, one with a cross-attention 16 w², one of co-attention 32 w².
DEPTHS = {
    "none": (6, 5, 1),  # (the last is not used)
    "merged": (3, 3, 5),
    "co_attention": (3, 3, 2),
    "cross_attention": (3, 3, 4),
}


def get_config(arg="co_attention"):
    if arg not in DEPTHS:
        raise InputError(f"four_fusions.py takes a fusion.{near_misses(str(arg), DEPTHS)}")
    config = quickstart.get_config()
    config.model.fusion.kind = arg
    depths = zip(("image", "text", "fusion"), DEPTHS[arg], strict=True)
    for part, depth in depths:
        config.model[part].depth = depth
    config.total_steps = 400
    config.eval.every = 0
    config.checkpoint.every = 200
    return config
