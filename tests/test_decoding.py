"""Generation beside searches written out in numpy, which read the whole text at every step."""

from dataclasses import replace
from functools import cache
from itertools import product
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from mmjax.decoding import GenerationConfig, generate
from mmjax.decoding import cache as caches
from mmjax.decoding.scores import sharpen
from mmjax.errors import InputError
from mmjax.layers import Block, LayerConfig, Stack
from mmjax.models.captioner import Captioner, CaptionerConfig
from mmjax.models.gpt2 import GPT2, GPT2Config
from mmjax.models.vit import ViTConfig
from mmjax.sharding import batch_sharding, make_mesh
from tests.models import reference

WORDS = 11
SMALL = GPT2Config(width=16, depth=2, heads=2, mlp_width=24, vocabulary_size=WORDS, max_length=20)
CAPTIONS = CaptionerConfig(
    image=ViTConfig(width=12, depth=1, heads=2, mlp_width=16, image_size=16, patch_size=8),
    text=SMALL,
    generation=GenerationConfig(eos_token_id=3, bos_token_id=1, max_length=12),
)


@cache
def decoder(seed=0):
    """A decoder whose every token hangs on all before it, and does not repeat the last."""
    graph, params = reference.split(lambda: GPT2(SMALL, nnx.Rngs(0)), seed)
    params["blocks"] = jax.tree.map(lambda x: 2 * x, params["blocks"])
    params["position_embedding"]["embedding"] *= 4
    return nnx.merge(graph, params)


def prompts(rows=3, length=4, seed=0):
    return np.random.default_rng(seed).integers(0, WORDS, (rows, length))


@cache
def _whole(seed):
    return jax.jit(decoder(seed))


@cache
def _logits(seed, text):
    """The text stands in a longer one: what follows is not looked at."""
    whole = np.zeros((1, SMALL.max_length), np.int32)
    whole[0, : len(text)] = text
    return np.asarray(_whole(seed)(whole)[0, len(text) - 1], np.float64)


def logits_behind(text, seed=0):
    """Scores of every word behind a text, all of which is looked at anew."""
    return _logits(seed, tuple(map(int, text))).copy()


def log_probabilities(text, seed=0):
    scores = logits_behind(text, seed)
    return scores - np.log(np.exp(scores).sum())


# ---- searches written out


def constrained(scores, text, config):
    """Scores behind a text, with the penalty of repetition and without an end too early."""
    for word in set(text):
        factor = config.repetition_penalty
        scores[word] = scores[word] * factor if scores[word] < 0 else scores[word] / factor
    if len(text) < config.min_length:
        scores[list(config.eos_token_id)] = -np.inf
    return scores


def greedy(prompt, config, length, seed=0):
    """One text and its score."""
    text, score = list(prompt), 0.0
    while len(text) < length and not (len(text) > len(prompt) and text[-1] in config.eos_token_id):
        scores = constrained(logits_behind(text, seed), text, config)
        text.append(int(scores.argmax()))
        score += scores[text[-1]] - np.log(np.exp(scores).sum())
    return text, score


def exhaustive(prompt, config, length):
    """The best of all texts there are."""
    found = []
    for count in range(1, length - len(prompt) + 1):
        for words in product(range(WORDS), repeat=count):
            ended = words[-1] in config.eos_token_id
            if any(word in config.eos_token_id for word in words[:-1]):
                continue
            if not ended and count < length - len(prompt):
                continue
            text = list(prompt)
            score = 0.0
            for word in words:
                score += log_probabilities(text)[word]
                text.append(word)
            found.append((score / count**config.length_penalty, text))
    return max(found)


def beam_search(prompt, config, length, seed=0):
    """The best text and its score, with lists."""
    beams, ends = config.num_beams, config.eos_token_id
    running, done = [(0.0, list(prompt))], []
    while running:
        grown = [
            (score + step, [*text, word])
            for score, text in running
            for word, step in enumerate(constrained(log_probabilities(text, seed), text, config))
        ]
        grown = sorted(grown, reverse=True)[: beams * (1 + len(ends))]
        new = len(grown[0][1]) - len(prompt)
        over = [text[-1] in ends or len(text) == length for _, text in grown]
        done += [
            (score / new**config.length_penalty, text)
            for (score, text), is_over in list(zip(grown, over, strict=True))[:beams]
            if is_over
        ]
        done = sorted(done, reverse=True)[:beams]
        running = [pair for pair, is_over in zip(grown, over, strict=True) if not is_over][:beams]
        if len(done) == beams and running:
            longest = length - len(prompt)
            never = config.early_stopping == "never" and config.length_penalty > 0
            hoped = running[0][0] / (longest if never else new) ** config.length_penalty
            if config.early_stopping is True or hoped <= done[-1][0]:
                break
    return done[0][::-1]


def padded(texts, fill):
    width = max(map(len, texts))
    return np.array([[*text, *[fill] * (width - len(text))] for text in texts])


# ---- ours beside them


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"min_length": 9},
        {"repetition_penalty": 1.6},
        {"eos_token_id": (3, 5), "pad_token_id": 9, "repetition_penalty": 0.8},
        {"eos_token_id": None},
    ],
    ids=str,
)
def test_greedy_takes_the_likeliest_word(options):
    config = GenerationConfig(eos_token_id=3).changed({"max_length": 12, **options})
    expected = [greedy(prompt, config, 12) for prompt in prompts(6)]
    found = generate(decoder(), config, prompts(6))
    fill = config.pad_token_id or 3
    np.testing.assert_array_equal(found.tokens, padded([text for text, _ in expected], fill))
    np.testing.assert_allclose(found.scores, [score for _, score in expected], rtol=1e-4)


def test_a_wide_beam_finds_the_best_of_all():
    for penalty in (0.0, 1.0):
        config = GenerationConfig(
            num_beams=WORDS**2,
            max_new_tokens=3,
            eos_token_id=(2, 3, 5),
            length_penalty=penalty,
            early_stopping="never",
        )
        found = generate(decoder(), config, prompts(2))
        expected = [exhaustive(prompt, config, 7) for prompt in prompts(2)]
        np.testing.assert_allclose(found.scores, [score for score, _ in expected], rtol=1e-5)
        for row, (_, text) in zip(found.tokens, expected, strict=True):
            assert row[: len(text)].tolist() == list(text)


@pytest.mark.parametrize("early", [False, True, "never"])
@pytest.mark.parametrize(
    "penalty",
    [
        -1.0,
        pytest.param(0.0, marks=pytest.mark.slow),
        1.0,
        pytest.param(2.5, marks=pytest.mark.slow),
    ],
)
def test_beams_are_searched_as_lists_are(early, penalty):
    for beams, ends, constraints in (
        (2, (3,), {}),
        (4, (2, 3, 5), {}),
        (3, (3, 5), {"min_length": 8, "repetition_penalty": 1.4}),
    ):
        config = GenerationConfig(
            num_beams=beams,
            max_length=11,
            eos_token_id=ends,
            length_penalty=penalty,
            early_stopping=early,
            **constraints,
        )
        for seed in range(2):
            found = generate(decoder(seed), config, prompts(5))
            expected = [beam_search(prompt, config, 11, seed) for prompt in prompts(5)]
            texts = padded([text for text, _ in expected], ends[0])
            np.testing.assert_array_equal(found.tokens, texts)
            np.testing.assert_allclose(found.scores, [score for _, score in expected], rtol=1e-4)


@pytest.mark.parametrize("beams", [1, 3])
def test_padding_on_the_left_changes_nothing(beams):
    config = GenerationConfig(eos_token_id=3, num_beams=beams, repetition_penalty=1.2)
    mask = np.arange(5) >= np.array([[0], [2], [3]])
    text = prompts(3, 5)
    together = generate(decoder(), config.changed({"max_length": 13}), text, mask)
    for row, tokens, score in zip(range(3), *together, strict=True):
        alone = generate(
            decoder(), config.changed({"max_new_tokens": 8}), text[row : row + 1, mask[row]]
        )
        tokens = tokens[(~mask[row]).sum() :]
        width = alone.tokens.shape[1]
        np.testing.assert_array_equal(tokens[:width], alone.tokens[0])
        assert (tokens[width:] == 3).all()
        np.testing.assert_allclose(score, alone.scores[0], rtol=1e-5)


@pytest.mark.parametrize("norm", ["pre", "post"])
@pytest.mark.parametrize("cross", [False, True], ids=["", "cross"])
def test_a_step_does_what_a_call_on_the_whole_does(norm, cross):
    """However many tokens at a time, with padding, and two texts about one context."""
    config = LayerConfig(width=16, depth=2, heads=4, norm=norm)
    graph, params = reference.split(
        lambda: Stack(lambda rngs: Block(config, rngs, cross, 12), config, nnx.Rngs(0))
    )
    blocks = nnx.merge(graph, params)
    rng = np.random.default_rng(0)
    x = jnp.array(rng.normal(size=(4, 7, 16)), jnp.float32)
    context = jnp.array(rng.normal(size=(2, 5, 12)), jnp.float32) if cross else None
    context_mask = jnp.array(np.arange(5) < np.array([[5], [3]])) if cross else None
    padding = np.array([0, 2])
    mask = np.tril(np.ones((7, 7), bool)) & (np.arange(7) >= np.repeat(padding, 2)[:, None, None])
    twice = jax.tree.map(lambda x: x.repeat(2, axis=0), (context, context_mask))
    expected = blocks(x, jnp.array(mask), twice[0], None if not cross else twice[1][:, None])
    start = caches.start(blocks, config, 9, jnp.array(padding), context, context_mask)
    step = nnx.jit(caches.step)
    for widths in ([1] * 7, [3, 1, 2, 1], [7]):
        memory, at = start.repeated(2), 0
        for width in widths:
            found, memory = step(blocks, x[:, at : at + width], memory, jnp.array(at))
            seen = mask[:, range(at, at + width), range(at, at + width)]
            np.testing.assert_allclose(
                found[seen], expected[:, at : at + width][seen], atol=2e-5, err_msg=str(widths)
            )
            at += width


@cache
def captioner():
    """Whose captions differ from picture to picture."""
    graph, params = reference.split(lambda: Captioner(CAPTIONS, nnx.Rngs(0)))
    params["text"]["position_embedding"]["embedding"] *= 4
    params["text"]["blocks"]["layers"]["cross_attention"]["attention"]["out"]["kernel"] *= 10
    return nnx.merge(graph, params)


def images(rows=8):
    return np.random.default_rng(0).normal(size=(rows, 16, 16, 3)).astype(np.float32)


@pytest.mark.parametrize("beams", [1, 3])
def test_a_caption_is_searched_with_its_own_picture_in_view(beams):
    """Word by word the scores of the uncached model, and no row mixed up with another."""
    model = captioner()
    found = model.generate(images(), num_beams=beams, length_penalty=0.0)
    assert len({tuple(row) for row in found.tokens.tolist()}) > 4
    logits = model(image=images(), decoder_text=found.tokens)["logits"]
    steps = np.take_along_axis(
        np.asarray(jax.nn.log_softmax(logits[:, :-1])), np.asarray(found.tokens)[:, 1:, None], 2
    )[..., 0]
    before_end = np.cumsum(np.asarray(found.tokens)[:, 1:] == 3, axis=1)
    before_end = np.pad(before_end, ((0, 0), (1, 0)))[:, :-1] == 0
    np.testing.assert_allclose(found.scores, (steps * before_end).sum(axis=1), rtol=1e-4)


@pytest.mark.parametrize("options", [{}, {"num_beams": 3}, {"do_sample": True}], ids=str)
def test_eight_devices_find_what_one_finds(options):
    model = captioner()
    key = jax.random.key(0) if "do_sample" in options else None
    expected = model.generate(images(), key=key, **options)
    mesh = make_mesh()
    with jax.set_mesh(mesh):
        batch = jax.device_put(images(), batch_sharding(mesh))
        found = model.generate(batch, key=key, **options)
    assert len(found.scores.sharding.device_set) == 8
    np.testing.assert_array_equal(found.tokens, expected.tokens)
    np.testing.assert_allclose(found.scores, expected.scores, rtol=1e-4)


# ---- sampling


class Constant(nnx.Module):
    """A decoder that expects the same words whatever stands before."""

    class Nothing(NamedTuple):
        pass

    max_length = 100_000

    def __init__(self, scores):
        self.scores = nnx.Param(jnp.array(scores, jnp.float32))

    def start(self, padding, length):
        return self.Nothing()

    def step(self, tokens, memory, at):
        return jnp.broadcast_to(self.scores[...], (len(tokens), len(self.scores))), memory


SCORES = np.array([1.0, 0.5, 2.0, -1.0, 0.0, 1.5])


def kept(config):
    """Probabilities after temperature, top_k and top_p, one word after the other."""
    scores = SCORES / config.temperature
    order = np.argsort(-scores)[: config.top_k or None]
    left = np.exp(scores) / np.exp(scores[order]).sum()
    found, taken = np.zeros(len(scores)), 0.0
    for word in order:
        if taken < config.top_p:
            found[word] = left[word]
        taken += left[word]
    return found / found.sum()


@pytest.mark.parametrize(
    "options",
    [
        {"top_k": 0},
        {"top_k": 3},
        {"temperature": 0.5, "top_k": 4},
        {"top_p": 0.6},
        {"top_p": 0.9, "temperature": 2.0},
        {"top_p": 0.7, "top_k": 3},
        {"top_p": 1e-6},
    ],
    ids=str,
)
def test_what_is_drawn_from(options):
    config = GenerationConfig(do_sample=True).changed(options)
    expected = kept(config)
    scores = sharpen(jnp.array(np.tile(SCORES, (2, 1)), jnp.float32), config)
    np.testing.assert_allclose(jax.nn.softmax(scores)[1], expected, atol=1e-6)
    config = replace(config, max_new_tokens=1500)
    found = generate(Constant(SCORES), config, np.zeros((2, 1), int), key=jax.random.key(0))
    counts = np.bincount(np.asarray(found.tokens)[:, 1:].ravel(), minlength=6) / 3000
    np.testing.assert_allclose(counts, expected, atol=0.03)


def test_the_key_draws():
    config = GenerationConfig(do_sample=True, max_length=20, temperature=3.0)
    once, again, other = (
        generate(decoder(), config, prompts(), key=jax.random.key(seed)) for seed in (0, 0, 1)
    )
    np.testing.assert_array_equal(once.tokens, again.tokens)
    assert (once.tokens != other.tokens).any()
    for text, score in zip(np.asarray(once.tokens), once.scores, strict=True):
        steps = [np.exp(logits_behind(text[:at]) / 3.0) for at in range(4, 20)]
        chances = [step[word] / step.sum() for step, word in zip(steps, text[4:], strict=True)]
        np.testing.assert_allclose(score, np.log(chances).sum(), rtol=1e-4)
    narrow = generate(decoder(), replace(config, top_k=1), prompts(), key=jax.random.key(2))
    likeliest = generate(decoder(), GenerationConfig(max_length=20), prompts())
    np.testing.assert_array_equal(narrow.tokens, likeliest.tokens)


# ---- what is refused


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"num_beam": 3}, ["'num_beam'", "num_beams"]),
        ({"num_beams": 0}, ["num_beams is 0", "above 0"]),
        ({"num_beams": 2, "do_sample": True}, ["num_beams is 2", "do_sample"]),
        ({"early_stopping": "always"}, ["'always'", "never"]),
        ({"top_p": 0.0}, ["top_p is 0.0"]),
        ({"temperature": 0.0}, ["temperature is 0.0", "above 0"]),
        ({"max_new_tokens": 0}, ["max_new_tokens is 0"]),
        ({"do_sample": True}, ["do_sample", "key"]),
        ({"max_new_tokens": 17}, ["21", "4", "20 positions", "max_new_tokens"]),
        ({"max_length": 4}, ["4 tokens", "max_length"]),
        ({"max_length": 9, "min_length": 10}, ["min_length is 10", "9"]),
    ],
    ids=str,
)
def test_options_that_cannot_be_followed_are_refused(options, words):
    with pytest.raises(InputError) as error:
        generate(decoder(), GenerationConfig().changed(options), prompts())
    assert all(word in str(error.value) for word in words), str(error.value)


def test_other_bad_input_is_refused():
    with pytest.raises(InputError, match="key"):
        generate(decoder(), GenerationConfig(), prompts(), key=jax.random.key(0))
    with pytest.raises(InputError, match="prompt is empty"):
        generate(decoder(), GenerationConfig(), prompts(2, 0))
    for mask in ([[True, True, False]], [[True, False, True]]):
        with pytest.raises(InputError, match="on the left"):
            generate(decoder(), GenerationConfig(), prompts(1, 3), np.array(mask))
    with pytest.raises(InputError, match="decoder_start_token_id or bos_token_id"):
        captioner().generate(images(1), bos_token_id=None)


def test_which_length_counts():
    config = GenerationConfig(max_new_tokens=3, max_length=9)
    assert config.length(4, 20) == 7
    assert config.changed({"max_length": 12}).length(4, 20) == 12
    assert config.changed({"max_length": 12, "max_new_tokens": 2}).length(4, 20) == 6
    assert GenerationConfig().length(4, 100) == 24
    assert GenerationConfig().length(4, 20) == 20
