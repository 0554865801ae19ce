"""Rows brought by lists: to each device as many as it has asked for.

What the fastest collective for this takes (`ragged_all_to_all`) follows from all requests, which
every device therefore learns.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Int, Shaped

from mmjax.sharding import BATCH_AXES, batch_devices

# A round carries at most so many rows away from a device, in multiples of its share of the batch.
# Every row is asked for once on average; a device whose rows are popular needs further rounds.
CAPACITY = 2


class Round(NamedTuple):
    """Which rows one device sends and receives at a time: of rows in order of their receiver."""

    sent: Int[Array, " capacity"]  # this device's rows
    sent_to: Int[Array, " devices"]  # how many go to each
    received: Int[Array, " share"]  # the requests that are met, in order of the sender; or `share`
    received_from: Int[Array, " devices"]
    sent_at: Int[Array, " devices"]  # where in what each receives this device's rows begin
    received_at: Int[Array, " devices"]  # where in what each sends those for this device begin


class Schedule(NamedTuple):
    """Who asks whom for what, which every device knows of all."""

    owner: Int[Array, " batch"]  # of the row that each request is for
    requester: Int[Array, " batch"]
    row: Int[Array, " batch"]  # of the owner's
    turn: Int[Array, " batch"]  # how many requests to the same owner come before

    @classmethod
    def of(cls, rows: Int[Array, " share"]) -> "Schedule":
        """Of all devices' requests; `rows` are this one's."""
        share, wanted = len(rows), jax.lax.all_gather(rows, BATCH_AXES, tiled=True)
        owner, number = wanted // share, jnp.arange(len(wanted))
        return cls(owner, number // share, wanted % share, turns_of(owner))

    def rounds(self, capacity: int) -> Int[Array, ""]:
        """How many it takes."""
        return self.turn.max() // capacity + 1

    def round(self, number: Int[Array, ""], capacity: int, share: int) -> Round:
        """What happens in one of them."""
        me, devices = jax.lax.axis_index(BATCH_AXES), batch_devices()
        now = self.turn // capacity == number
        mine, asked = now & (self.owner == me), now & (self.requester == me)
        place = jnp.where(mine, self.turn % capacity, capacity)
        sent = jnp.zeros(capacity, jnp.int32).at[place].set(self.row, mode="drop")

        def count(who: Array, where: Bool[Array, " batch"]) -> Int[Array, " devices"]:
            return jnp.zeros(devices, jnp.int32).at[who].add(where)

        # My requests, those that are met first, by owner.
        own = jax.lax.dynamic_slice_in_dim(jnp.where(asked, self.owner, devices), me * share, share)
        met = jnp.argsort(own, stable=True)
        return Round(
            sent=sent,
            sent_to=count(self.requester, mine),
            received=jnp.where(own[met] < devices, met, share),
            received_from=count(self.owner, asked),
            sent_at=count(self.requester, now & (self.owner < me)),
            received_at=count(self.owner, now & (self.requester < me)),
        )


def turns_of(owner: Int[Array, " requests"]) -> Int[Array, " requests"]:
    """Of each request, by the device that it is for, how many to the same one come before it."""
    number, order = jnp.arange(len(owner)), jnp.argsort(owner, stable=True)
    first = jnp.searchsorted(owner[order], jnp.arange(batch_devices()))
    return jnp.zeros_like(order).at[order].set(number - first[owner[order]])


def bring(x: Shaped[Array, "share ..."], rows: Int[Array, " share"]) -> Shaped[Array, "share ..."]:
    """The rows that this device asked for, in rounds."""
    share, capacity = len(rows), CAPACITY * len(rows)
    schedule = Schedule.of(rows)

    def travel(number, found):
        now = schedule.round(number, capacity, share)
        arrived = _exchange(x[now.sent], share, now.sent_to, now.sent_at, now.received_from)
        return found.at[now.received].set(arrived, mode="drop")

    return jax.lax.fori_loop(0, schedule.rounds(capacity), travel, jnp.zeros_like(x))


def give_back(
    of_fetched: Shaped[Array, "share ..."], rows: Int[Array, " share"]
) -> Shaped[Array, "share ..."]:
    """The other way: what belongs to a row, from all who asked for it, summed."""
    share, capacity = len(rows), CAPACITY * len(rows)
    schedule = Schedule.of(rows)

    def travel(number, found):
        now = schedule.round(number, capacity, share)
        parts = of_fetched.at[now.received].get(mode="fill", fill_value=0)
        arrived = _exchange(parts, capacity, now.received_from, now.received_at, now.sent_to)
        there = jnp.arange(capacity) < now.sent_to.sum()
        return found.at[jnp.where(there, now.sent, share)].add(arrived, mode="drop")

    return jax.lax.fori_loop(0, schedule.rounds(capacity), travel, jnp.zeros_like(of_fetched))


def _exchange(rows, size, sent_to, sent_at, received_from):
    """`size` rows that arrive from all devices, each of which sends in the order of receivers."""
    sent_from = jnp.cumsum(sent_to) - sent_to
    output = jnp.zeros((size, *rows.shape[1:]), rows.dtype)
    return jax.lax.ragged_all_to_all(
        rows, output, sent_from, sent_to, sent_at, received_from, axis_name=BATCH_AXES
    )
