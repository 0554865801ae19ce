"""Beam search: the likeliest of many continuations (Graves 2012; Wu et al. 2016, section 7).

It finds what `transformers` finds, down to the tokens. Of every example, some running texts, its
beams, are carried on; beside them stands a list of the best texts that have ended.
"""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int

from mmjax.decoding.config import GenerationConfig
from mmjax.decoding.decoder import Decoder, Generated
from mmjax.decoding.scores import constrain

# The score of what is not to be chosen: finite, as sums with it are compared.
_OUT = -1e9


class _Texts(NamedTuple):
    """Texts of every example, the best first, each as long as `lengths` says."""

    tokens: Int[Array, "batch texts length"]
    scores: Float[Array, "batch texts"]
    lengths: Int[Array, "batch texts"]
    real: Bool[Array, "batch texts"]  # false where there is none yet

    def best(self, count: int) -> tuple["_Texts", Int[Array, "batch count"]]:
        """The `count` texts of the highest scores, and which they are."""
        _, chosen = jax.lax.top_k(self.scores, count)
        return jax.tree.map(lambda x: _pick(x, chosen), self), chosen


class _State(NamedTuple):
    at: Int[Array, ""]  # the column that is written next
    running: _Texts  # their scores are sums of log probabilities
    ended: _Texts  # theirs have the length penalty in them
    improvable: Bool[Array, " batch"]  # whether a running text may still become one of the best
    all_ended: Bool[Array, ""]  # whether no continuation was open
    memory: Any


def search_beams(
    model: Decoder,
    memory: Any,
    prompt: Int[Array, "batch prompt"],
    padding: Int[Array, " batch"],
    config: GenerationConfig,
    length: int,
) -> tuple[Generated, Int[Array, ""]]:
    """The best text of every row, and how many columns the longest one has.

    `memory` has seen each prompt but for its last token.
    """
    beams, ends, early = config.num_beams, config.eos_token_id, config.early_stopping
    first = prompt.shape[1]
    paddings = jnp.repeat(padding, beams)

    def penalised(scores: Array, columns: Array) -> Array:
        divisors = np.arange(1, length - first + 1, dtype=np.float64) ** config.length_penalty
        return scores / jnp.asarray(divisors, jnp.float32)[columns - first - 1]

    def is_open(state: _State) -> Bool[Array, ""]:
        full = (early is True) & state.ended.real.all()
        return state.improvable.any() & ~full & ~state.all_ended

    def extend(state: _State) -> _State:
        at = state.at
        tokens = state.running.tokens.reshape(-1, length)
        last = jax.lax.dynamic_slice_in_dim(tokens, at - 1, 1, axis=1)
        logits, memory = model.step(last, state.memory, at - 1)
        scores = jax.nn.log_softmax(logits.astype(jnp.float32))
        scores = constrain(scores, tokens, at, paddings, config)
        candidates, parents = _continued(state.running, scores, at, config)

        token = candidates.tokens[:, :, at]
        has_ended = jnp.isin(token, jnp.array(ends, jnp.int32)) | (at + 1 == length)
        running, chosen = candidates._replace(
            scores=candidates.scores + jnp.where(has_ended, _OUT, 0)
        ).best(beams)

        # A text counts as ended where it is among the best `beams` candidates.
        closed = ~state.improvable | ((early is True) & state.ended.real.all(axis=1))
        arrives = has_ended & (jnp.arange(has_ended.shape[1]) < beams) & ~closed[:, None]
        arrived = candidates._replace(
            scores=jnp.where(arrives, penalised(candidates.scores, at + 1), _OUT), real=arrives
        )
        both = jax.tree.map(lambda *x: jnp.concatenate(x, axis=1), state.ended, arrived)
        ended, _ = both.best(beams)

        horizon = length if early == "never" and config.length_penalty > 0 else at + 1
        possible = penalised(running.scores[:, :1], jnp.asarray(horizon))
        worst = jnp.where(ended.real, ended.scores.min(axis=1, keepdims=True), _OUT)
        return _State(
            at=at + 1,
            running=running,
            ended=ended,
            improvable=state.improvable & (possible > worst).any(axis=1),
            all_ended=has_ended.all(),
            memory=memory.reordered(_pick(parents, chosen)),
        )

    running = _prompts(prompt, config, length)
    nothing = running._replace(scores=jnp.full_like(running.scores, _OUT))
    begin = _State(
        at=jnp.asarray(first),
        running=running,
        ended=nothing,
        improvable=jnp.ones(len(prompt), bool),
        all_ended=jnp.asarray(False),
        memory=memory.repeated(beams),
    )
    best = jax.lax.while_loop(is_open, extend, begin).ended
    return Generated(best.tokens[:, 0], best.scores[:, 0]), best.lengths[:, 0].max()


def _prompts(prompt: Int[Array, "batch prompt"], config: GenerationConfig, length: int) -> _Texts:
    """Beams that hold the prompt alone. All but the first are out: they would find the same."""
    shape = (len(prompt), config.num_beams)
    # Behind the end stands what `transformers` puts there: of a 0 it makes the end token.
    fill = config.pad_token_id or next(iter(config.eos_token_id), 0)
    tokens = jnp.full((*shape, length), fill, jnp.int32)
    return _Texts(
        tokens=tokens.at[:, :, : prompt.shape[1]].set(prompt[:, None]),
        scores=jnp.full(shape, _OUT).at[:, 0].set(0),
        lengths=jnp.full(shape, prompt.shape[1]),
        real=jnp.zeros(shape, bool),
    )


def _continued(
    running: _Texts,
    scores: Float[Array, "rows words"],
    at: Int[Array, ""],
    config: GenerationConfig,
) -> tuple[_Texts, Int[Array, "batch candidates"]]:
    """The best continuations of the running texts by a token, and the beams they continue.

    They are so many that enough are open even if every beam is continued by each of the end tokens.
    """
    batch, beams = running.scores.shape
    sums = running.scores[..., None] + scores.reshape(batch, beams, -1)
    count = beams * max(2, 1 + len(config.eos_token_id))
    best, index = jax.lax.top_k(sums.reshape(batch, -1), count)
    parents, token = jnp.divmod(index, scores.shape[1])
    return _Texts(
        tokens=_pick(running.tokens, parents).at[:, :, at].set(token),
        scores=best,
        lengths=jnp.broadcast_to(at + 1, best.shape),
        real=jnp.ones(best.shape, bool),
    ), parents


def _pick(x: Array, chosen: Int[Array, "batch count"]) -> Array:
    """Of every example those of axis 1 that are chosen."""
    return jnp.take_along_axis(x, chosen.reshape(*chosen.shape, *[1] * (x.ndim - 2)), axis=1)
