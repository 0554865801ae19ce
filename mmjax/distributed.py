"""Several processes as one run: how they find each other, agree on the run, and end together.

JAX finds the processes of a Cloud TPU slice, of GKE, SLURM, Open MPI and, with its `k8s` extra, of
Kubernetes. What is said by hand, in flags or variables, goes before that and switches it off.
"""

import contextlib
import json
import os
import socket
import sys
import time
import traceback
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import jax
from absl import flags, logging
from jax._src.distributed import global_state  # jax.distributed hides the service's client

from mmjax.errors import InputError

# The flags that place a process, and the variables that stand in for those not given.
PLACING = {
    "coordinator": "JAX_COORDINATOR_ADDRESS",
    "num_processes": "JAX_NUM_PROCESSES",
    "process_id": "JAX_PROCESS_ID",
}
GRACE_SECONDS = 10  # for a failure to turn out to be everybody's


@dataclass(frozen=True)
class Place:
    """Which process of how many this is, and where the first of them listens."""

    coordinator: str
    num_processes: int
    process_id: int


def define_flags() -> None:
    """The flags of `join_if_asked`."""
    flags.DEFINE_bool(
        "distributed",
        False,
        "Join the run's other processes: those of a TPU slice, a SLURM, MPI or Kubernetes job, or "
        "as --coordinator, --num_processes and --process_id say. Each of these implies it.",
    )
    flags.DEFINE_string("coordinator", None, "HOST:PORT on which process 0 listens.")
    flags.DEFINE_integer("num_processes", None, "How many processes make up the run.")
    flags.DEFINE_integer("process_id", None, "Which of them this is, from 0.")
    flags.DEFINE_integer(
        "initialization_timeout", 300, "Seconds to wait for the other processes.", lower_bound=1
    )
    flags.DEFINE_integer(
        "heartbeat_timeout",
        100,
        "Seconds of silence after which a process counts as dead, and the others end.",
        lower_bound=1,
    )


def join_if_asked() -> None:
    """Join the run's other processes, if a flag asks for it; before anything else uses JAX.

    Raises:
      InputError: the flags and variables that place a process are incomplete or contradict each
        other, nothing tells where it belongs, or the coordinator does not answer.
    """
    values = {name: flags.FLAGS[name].value for name in PLACING}
    if not flags.FLAGS.distributed and all(value is None for value in values.values()):
        return
    place = place_of(values, os.environ)
    timeouts = {
        "initialization_timeout": flags.FLAGS.initialization_timeout,
        "heartbeat_timeout_seconds": flags.FLAGS.heartbeat_timeout,
    }
    if place is None:
        try:
            jax.distributed.initialize(**timeouts)
        except (ValueError, RuntimeError) as error:
            raise InputError(
                f"--distributed: nothing says where this process belongs ({error}). Outside of a "
                "TPU slice, a SLURM step, an Open MPI or a Kubernetes job give --coordinator, "
                "--num_processes and --process_id."
            ) from error
    else:
        logging.info(
            "Joining as process %d of %d, coordinator %s; the others have %d s to come.",
            *(place.process_id, place.num_processes, place.coordinator),
            timeouts["initialization_timeout"],
        )
        if place.process_id:
            _await(place.coordinator, timeouts["initialization_timeout"])
        jax.distributed.initialize(
            place.coordinator,
            place.num_processes,
            place.process_id,
            cluster_detection_method="deactivate",
            **timeouts,
        )
    if jax.default_backend() == "cpu":
        # Each CPU process has another key in the compilation cache, and only process 0 writes
        # there: the next time it loads its program, the others compile theirs, and the collectives
        # of the two do not meet.
        jax.config.update("jax_enable_compilation_cache", False)
    logging.info("Process %d of %d.", global_state.process_id, global_state.num_processes)


def place_of(values: Mapping[str, Any], environment: Mapping[str, str]) -> Place | None:
    """Where flags, and variables where they are silent, place this process; None: nowhere.

    Args:
      values: what the flags in `PLACING` have, None for those not given.
      environment: the variables.

    Raises:
      InputError: some of the three are missing, or one cannot be.
    """
    told = {
        name: environment.get(variable) if values[name] is None else values[name]
        for name, variable in PLACING.items()
    }
    missing = [name for name, value in told.items() if value in (None, "")]
    if len(missing) == len(told):
        return None
    if missing:
        given = [name for name in told if name not in missing]
        raise InputError(
            f"{_listed(given)} without {_listed(missing)}: a process is placed by all three, in "
            f"flags or in {', '.join(PLACING.values())}, or by none of them, where a TPU slice, "
            "SLURM, Open MPI or Kubernetes tells."
        )
    address = str(told["coordinator"])
    host, _, port = address.rpartition(":")
    if not host or not port.isdecimal() or not 0 < int(port) < 2**16:
        raise InputError(f"--coordinator is {address!r}; expected HOST:PORT, as 10.0.0.1:8476.")
    count, number = (_integer(name, told[name]) for name in ("num_processes", "process_id"))
    if count < 1:
        raise InputError(f"--num_processes is {count}; it is at least 1.")
    if not 0 <= number < count:
        raise InputError(
            f"--process_id is {number}; with --num_processes={count} it lies between 0 and "
            f"{count - 1}."
        )
    return Place(address, count, number)


def require_agreement(started_with: Mapping[str, Any]) -> None:
    """Refuse processes that were started differently, on all of them, before they wait in vain.

    One that has another batch size or data set compiles another program, and its collectives would
    never meet those of the others.

    Raises:
      InputError: a process was started with something else than process 0, or not in time.
    """
    client = global_state.client
    if client is None:
        return
    own = f"mmjax/started_with/{global_state.process_id}"
    client.key_value_set(own, json.dumps(dict(started_with), default=str))
    seconds = flags.FLAGS.initialization_timeout
    try:
        client.wait_at_barrier("mmjax/started_with", seconds * 1000)
    except jax.errors.JaxRuntimeError as error:
        reason = str(error).splitlines()[0]
        raise InputError(
            f"not every process had read its config after {seconds} s; see the logs of the others. "
            f"{reason}"
        ) from error
    everyones = {
        int(key.rpartition("/")[2]): json.loads(value)
        for key, value in client.key_value_dir_get("mmjax/started_with/")
    }
    for number, theirs in sorted(everyones.items()):
        keys = everyones[0].keys() | theirs.keys()
        different = sorted(key for key in keys if theirs.get(key) != everyones[0].get(key))
        if different:
            key, others = different[0], len(different) - 1
            raise InputError(
                f"the processes were started differently: {key} is {everyones[0].get(key)!r} on "
                f"process 0 and {theirs.get(key)!r} on process {number}"
                f"{f', and {others} more differ' if others else ''}. Start all of them with the "
                "same command, code and recipe."
            )


@contextlib.contextmanager
def ending_together() -> Iterator[None]:
    """Lets a failure of this process end the run.

    A process that leaves in the usual way waits for the others at the exit, while they wait for it
    in a collective. So what fails on all processes alike ends as ever, and what fails on one ends
    at once: the others hear of it when its heartbeat is missed.
    """
    try:
        yield
    except BaseException as error:
        client = global_state.client
        if client is None or _everybody_comes(client):
            raise
        if not isinstance(error, SystemExit):
            traceback.print_exception(error)
        print("error: this process ends the run; the others follow.", file=sys.stderr)
        logging.flush()
        sys.stdout.flush()
        sys.stderr.flush()
        status = error.code if isinstance(error, SystemExit) else 1
        os._exit(status if isinstance(status, int) else 1)


def _everybody_comes(client: Any) -> bool:
    try:
        client.wait_at_barrier("mmjax/failed", GRACE_SECONDS * 1000)
    except jax.errors.JaxRuntimeError:
        return False
    return True


def _await(address: str, seconds: int) -> None:
    """Return when something listens there: JAX itself would abort the process after the time."""
    host, _, port = address.rpartition(":")
    deadline = time.monotonic() + seconds
    while True:
        try:
            socket.create_connection((host.strip("[]"), int(port)), timeout=seconds).close()
            return
        except OSError as error:  # also an unknown name: a pod's appears when it runs
            if time.monotonic() >= deadline:
                raise InputError(
                    f"--coordinator={address} does not answer after {seconds} s ({error}). Process "
                    "0 listens there: is it running, is this its address, is the port open? "
                    "--initialization_timeout waits longer."
                ) from error
            time.sleep(0.5)


def _integer(name: str, value: Any) -> int:
    try:
        return int(value)
    except ValueError as error:
        raise InputError(
            f"{PLACING[name]} is {value!r}; expected a whole number, as --{name} takes."
        ) from error


def _listed(names: list[str]) -> str:
    return " and ".join(f"--{name}" for name in names)
