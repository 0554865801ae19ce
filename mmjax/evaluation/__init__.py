"""Scores of a model on held-out data: retrieval, image-text matching, question answering."""
