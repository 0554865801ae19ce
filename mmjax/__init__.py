"""mmjax: cross-modal (vision-language) Transformers in JAX."""

from typing import Any

_LAZY = {
    "load": "mmjax.weights",
    "save_huggingface": "mmjax.weights",
    "load_processor": "mmjax.processing",
}
__all__ = ["load", "load_processor", "save_huggingface"]


def __getattr__(name: str) -> Any:
    """The package's own functions, imported when first asked for: they bring all models along."""
    if name not in _LAZY:
        raise AttributeError(f"module 'mmjax' has no attribute {name!r}")
    import importlib

    return getattr(importlib.import_module(_LAZY[name]), name)
