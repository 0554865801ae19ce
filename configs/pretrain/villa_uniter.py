"""VILLA (Gan et al. 2020): UNITER-base's pre-training, adversarially.

From the paper (section 3.2 and appendix): perturbations of embedded words or regions, in turn,
three steps of size 1e-3 within the l2 norm, from 0, and a divergence of weight 1.5 between clean
and perturbed predictions. The model and its objectives are uniter_base.py's.
"""

from configs.pretrain import uniter_base
from configs.sizes import sized


def get_config(arg=None):
    config = uniter_base.get_config()
    config.adversarial.update(steps=3, modality="alternate", kl_weight=1.5)
    config.adversarial.update(text_step_size=1e-3, image_step_size=1e-3)
    return sized(config, arg, uniter_base.adapt)
