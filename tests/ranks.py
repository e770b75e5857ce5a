"""Real ranks for tests: `run_ranks(fn, world_size, *args)` runs fn in that many processes that can form gloo groups.

Processes are forked from one server that has already imported the slow libraries, so that a start costs little.
"""

from __future__ import annotations

import multiprocessing
import multiprocessing.connection
import os
import pickle
import time
import traceback
from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist

PATIENCE_S = 900.0
"""How long a test waits for what must come. A busy machine may take minutes; only what hangs takes this long."""

_CONTEXT = multiprocessing.get_context("forkserver")
_CONTEXT.set_forkserver_preload(["tests.ranks_preload"])


class RankError(AssertionError):
    """A rank failed; the message is its traceback."""


def run_ranks(fn: Callable[..., Any], world_size: int, *args: Any, timeout_s: float = PATIENCE_S) -> list[Any]:
    """Each rank's `fn(*args)`, in the order of ranks, run with the environment that torchrun would give.

    fn, its arguments and results travel by pickle: fn is a function of a test module. The first rank that fails ends
    the others and raises RankError with its traceback; so does passing the time-out.
    """
    store = dist.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
    ranks = [_start_rank(fn, args, rank, world_size, store.port) for rank in range(world_size)]
    try:
        return _collect([receiver for _, receiver in ranks], timeout_s)
    finally:
        for process, receiver in ranks:
            receiver.close()
            process.join(timeout=10)  # a rank that has answered is about to end
            process.kill()
            process.join()


def _start_rank(fn: Callable[..., Any], args: tuple[Any, ...], rank: int, world_size: int, port: int) -> Any:
    environment = {
        "RANK": str(rank),
        "LOCAL_RANK": str(rank),
        "WORLD_SIZE": str(world_size),
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(port),
        "TORCHELASTIC_USE_AGENT_STORE": "True",  # as under torchrun: rank 0 does not open the store, it is there
    }
    receiver, sender = _CONTEXT.Pipe(duplex=False)
    call = pickle.dumps((fn, args))
    process = _CONTEXT.Process(target=_run_rank, args=(call, environment, sender), daemon=True)
    process.start()
    sender.close()
    return process, receiver


def _run_rank(call: bytes, environment: dict[str, str], sender: multiprocessing.connection.Connection) -> None:
    os.environ.update(environment)
    torch.set_num_threads(1)
    try:
        fn, args = pickle.loads(call)
        answer = pickle.dumps((True, fn(*args)))
    except BaseException:  # whatever it was, the test must see it
        answer = pickle.dumps((False, traceback.format_exc()))
    sender.send_bytes(answer)
    sender.close()
    if dist.is_initialized():
        dist.destroy_process_group()


def _collect(receivers: list[multiprocessing.connection.Connection], timeout_s: float) -> list[Any]:
    deadline = time.monotonic() + timeout_s
    waiting = {receiver: rank for rank, receiver in enumerate(receivers)}
    results: list[Any] = [None] * len(receivers)
    while waiting:
        ready = multiprocessing.connection.wait(list(waiting), timeout=max(0.0, deadline - time.monotonic()))
        if not ready:
            raise RankError(f"ranks {sorted(waiting.values())} did not answer within {timeout_s:.0f} s")
        for receiver in ready:
            assert isinstance(receiver, multiprocessing.connection.Connection)
            rank = waiting.pop(receiver)
            try:
                succeeded, answer = pickle.loads(receiver.recv_bytes())
            except EOFError:
                raise RankError(f"rank {rank} died without a word") from None
            if not succeeded:
                raise RankError(f"rank {rank} failed:\n{answer}")
            results[rank] = answer
    return results
