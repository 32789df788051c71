"""Threads for work that must leave nothing behind."""

from __future__ import annotations

import os
import sys
import threading
from collections.abc import Callable
from concurrent.futures import Future
from typing import TypeVar

T = TypeVar("T")
_SWITCH_INTERVAL_S = 0.00002


def share_the_interpreter() -> None:
    """Lets Python's threads take turns far more often than by default, every 5 ms. For the whole process.

    Whoever has to wait for the interpreter waits that long for a busy thread: health checks for the engine's, and the
    engine, at each of its operations, for one that reads an adapter. Measured beside 60 loads in a row: the slowest
    percent of steps take 35 ms at 0.5 ms, 21 at 0.1, 17 at 0.02, and 13 without loads (docs/performance.md).
    """
    sys.setswitchinterval(_SWITCH_INTERVAL_S)


def let_threads_sleep() -> None:
    """Lets idle threads of OpenMP sleep in place of spinning, unless the environment says otherwise.

    To be called before torch is imported, which reads the environment once.

    On a machine that does anything else, threads that spin take the processor from the one that they wait for: 40 steps
    of the embedded model take 7.7 s in place of 1.2 beside two busy processes on two cores. On a machine with nothing
    else to do, sleeping costs: 0.78 s in place of 0.53 (docs/performance.md).
    """
    if "GOMP_SPINCOUNT" not in os.environ:
        os.environ.setdefault("OMP_WAIT_POLICY", "passive")


def in_own_thread(work: Callable[[], T]) -> Future[T]:
    """Runs *work* in a thread that ends with it; returns at once.

    A thread that has used torch on the CPU keeps a team of OpenMP threads for as long as it lives, and with two teams
    GNU's OpenMP stops spinning: every small operation of the engine thread then waits for a wake-up (measured on two
    cores: 4 images of the demo model in 66 ms a step in place of 41). So what loads the model must not linger.
    """
    future: Future[T] = Future()

    def run() -> None:
        try:
            future.set_result(work())
        except BaseException as error:
            future.set_exception(error)

    threading.Thread(target=run, name="builder", daemon=True).start()
    return future
