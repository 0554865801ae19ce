"""Prompts in, their continuations out: the compiled program, and its search without beams."""

import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Array, Bool, Float, Int, Key

from mmjax.decoding.beams import search_beams
from mmjax.decoding.config import GenerationConfig
from mmjax.decoding.decoder import Decoder, Generated
from mmjax.decoding.scores import constrain, sharpen
from mmjax.errors import InputError

AnyArray = jax.Array | np.ndarray


def generate(
    model: Decoder,
    config: GenerationConfig,
    prompt: Int[AnyArray, "batch length"],
    mask: Bool[AnyArray, "batch length"] | None = None,
    key: Key[Array, ""] | None = None,
    **inputs: Any,
) -> Generated:
    """Continue every prompt as `config` says.

    Without sampling the tokens are those that `generate` of `transformers` 5.23 finds.

    Args:
      model: the decoder, an `nnx.Module`.
      config: the options.
      prompt: token ids, at least one a row.
      mask: true on tokens, false on padding, which stands on the left; None: all are tokens.
      key: draws the samples of `do_sample`.
      inputs: what the texts are about, for `model.start`.

    Raises InputError where the lengths do not fit, or padding stands elsewhere.
    """
    if config.do_sample != (key is not None):
        raise InputError("do_sample=True draws from a key: give both, or neither.")
    ids = jnp.asarray(prompt, jnp.int32)
    length = config.length(ids.shape[1], model.max_length)
    graph, params = nnx.split(model)
    found, written = _run(
        graph, params, ids, _padding(ids, mask), inputs, key, config=config, length=length
    )
    return found._replace(tokens=found.tokens[:, : int(written)])


@functools.partial(jax.jit, static_argnames=("graph", "config", "length"))
def _run(graph, params, prompt, padding, inputs, key, *, config, length):
    """What is found in texts of the full `length`, and how much of that the longest one takes."""
    model = nnx.merge(graph, params)
    memory = model.start(padding, length, **inputs)
    # The last token of the prompt is left to the first step of the search.
    if prompt.shape[1] > 1:
        _, memory = model.step(prompt[:, :-1], memory, 0)
    if config.num_beams > 1:
        return search_beams(model, memory, prompt, padding, config, length)
    return _search(model, memory, prompt, padding, config, length, key)


class _State(NamedTuple):
    at: Int[Array, ""]  # the column that is written next
    text: Int[Array, "batch length"]
    scores: Float[Array, " batch"]
    ended: Bool[Array, " batch"]
    memory: Any


def _search(
    model: Decoder,
    memory: Any,
    prompt: Int[Array, "batch prompt"],
    padding: Int[Array, " batch"],
    config: GenerationConfig,
    length: int,
    key: Key[Array, ""] | None,
) -> tuple[Generated, Int[Array, ""]]:
    """One text a row: every token is the likeliest, or with `key` one drawn."""
    rows, first = prompt.shape
    fill = next((id for id in (config.pad_token_id, *config.eos_token_id) if id is not None), 0)

    def is_open(state: _State) -> Bool[Array, ""]:
        return (state.at < length) & ~state.ended.all()

    def extend(state: _State) -> _State:
        at, text = state.at, state.text
        last = jax.lax.dynamic_slice_in_dim(text, at - 1, 1, axis=1)
        logits, memory = model.step(last, state.memory, at - 1)
        logits = constrain(logits.astype(jnp.float32), text, at, padding, config)
        if key is None:
            token = logits.argmax(axis=-1)
        else:
            logits = sharpen(logits, config)
            token = jax.random.categorical(jax.random.fold_in(key, at), logits)
        score = jnp.take_along_axis(jax.nn.log_softmax(logits), token[:, None], axis=1)[:, 0]
        token = jnp.where(state.ended, fill, token)
        return _State(
            at=at + 1,
            text=text.at[:, at].set(token),
            scores=state.scores + jnp.where(state.ended, 0, score),
            ended=state.ended | jnp.isin(token, jnp.array(config.eos_token_id, jnp.int32)),
            memory=memory,
        )

    text = jnp.full((rows, length), fill, jnp.int32).at[:, :first].set(prompt)
    begin = _State(jnp.asarray(first), text, jnp.zeros(rows), jnp.zeros(rows, bool), memory)
    end = jax.lax.while_loop(is_open, extend, begin)
    return Generated(end.text, end.scores), end.at


def _padding(
    prompt: Int[Array, "batch length"], mask: Bool[AnyArray, "batch length"] | None
) -> Int[np.ndarray, " batch"]:
    """The number of tokens on the left of each prompt that are padding."""
    if mask is None:
        return np.zeros(len(prompt), np.int32)
    is_padding = ~np.asarray(mask, bool)
    if is_padding[:, -1].any() or (is_padding[:, 1:] > is_padding[:, :-1]).any():
        raise InputError(
            "a prompt that is continued has its padding on the left, and its mask says otherwise: "
            "pad there."
        )
    return is_padding.sum(axis=1).astype(np.int32)
