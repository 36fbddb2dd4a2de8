"""Processes that end with the one that started them, however that ends."""

from __future__ import annotations

import contextlib
import os
import signal
import threading
import time
from typing import Any

#: Seconds between two looks.
OFTEN = 0.2
#: Environment variable: the number of the process that started this one.
PARENT = "WORKBENCH_PARENT"


def pool(backend: str, workers: int) -> contextlib.AbstractContextManager[Any]:
    """Inside, joblib's worker processes are so many, and those on this machine end with this process: left to
    themselves they wait minutes for the next task of one that was killed.
    """
    import joblib

    own = {"initializer": ends_with_its_parent, "initargs": (os.getpid(),)} if backend == "loky" else {}
    made: contextlib.AbstractContextManager[Any] = joblib.parallel_config(
        backend=backend, n_jobs=workers, **own
    )
    return made


def ends_with_its_parent(parent: int | None = None) -> None:
    """End this process once `parent` (who started it) is gone, and the group of processes that it leads.

    Called before anything slow is imported, for the parent may end before that has happened.
    """
    if os.name == "posix":
        watched = os.getppid() if parent is None else parent
        threading.Thread(target=end_together, args=(watched,), daemon=True).start()


def end_together(parent: int) -> None:
    while os.getppid() == parent:
        time.sleep(OFTEN)
    if os.getpgrp() == os.getpid():
        os.killpg(os.getpid(), signal.SIGKILL)
    os._exit(1)
