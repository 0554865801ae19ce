"""Public weights in and out: Hugging Face folders and original checkpoints <-> our parameters."""

from mmjax.weights.loading import load
from mmjax.weights.saving import save_checkpoint, save_huggingface

__all__ = ["load", "save_checkpoint", "save_huggingface"]
