"""mmjax: cross-modal (vision-language) Transformers in JAX."""
