"""Rows brought pair by pair: in a round every device sends one row, or none, to every other.

A plain `all_to_all`, which every device has. It holds a row for each device and takes as many
rounds as a device has requests to another one.
"""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Int, Shaped

from mmjax.objectives.ragged_exchange import turns_of
from mmjax.sharding import BATCH_AXES, batch_devices

NONE = -1  # in place of a row's number


def bring(x: Shaped[Array, "share ..."], rows: Int[Array, " share"]) -> Shaped[Array, "share ..."]:
    """The rows of the global batch that this device asks for, of which it holds `x`."""
    owner = rows // len(rows)
    turn = turns_of(owner)

    def travel(number, found):
        request, wanted = _round(rows, owner, turn, number)
        arrived = _exchange(x[jnp.maximum(wanted, 0)])
        return found.at[request].set(arrived, mode="drop")

    return jax.lax.fori_loop(0, _rounds(turn), travel, jnp.zeros_like(x))


def give_back(
    of_fetched: Shaped[Array, "share ..."], rows: Int[Array, " share"]
) -> Shaped[Array, "share ..."]:
    """The other way: what belongs to a row, from all who asked for it, summed."""
    share = len(rows)
    owner = rows // share
    turn = turns_of(owner)

    def travel(number, found):
        request, wanted = _round(rows, owner, turn, number)
        arrived = _exchange(of_fetched.at[request].get(mode="fill", fill_value=0))
        return found.at[jnp.where(wanted == NONE, share, wanted)].add(arrived, mode="drop")

    return jax.lax.fori_loop(0, _rounds(turn), travel, jnp.zeros_like(of_fetched))


def _rounds(turn):
    """How many it takes the device that has most to ask another one."""
    return jax.lax.pmax(turn.max(), BATCH_AXES) + 1


def _round(rows, owner, turn, number):
    """Of each device: the request to it that is met now, and the row that it asks for, or `NONE`.

    Without a request its number is past the last, so that nothing is written.
    """
    share, devices = len(rows), batch_devices()
    met = jnp.where(turn == number, owner, devices)
    request = jnp.full(devices, share).at[met].set(jnp.arange(share), mode="drop")
    asked = (rows % share).at[request].get(mode="fill", fill_value=NONE)
    return request, _exchange(asked)


def _exchange(to_each):
    """From every device what it has for this one."""
    return jax.lax.all_to_all(to_each, BATCH_AXES, split_axis=0, concat_axis=0, tiled=True)
