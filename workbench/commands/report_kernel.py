"""The kernel of a report: ipykernel, that ends with the process which started it, and so do its own workers.

python -m workbench.commands.report_kernel -f CONNECTION_FILE
"""

from __future__ import annotations

import os
import runpy
import signal
import sys
import threading
import time

#: Seconds between two looks; ipykernel's own, which would leave the workers, come once a second.
OFTEN = 0.2


def end_together(parent: int) -> None:
    """Once `parent` is gone, end everything that was started here: the group of processes that we lead."""
    while os.getppid() == parent:
        time.sleep(OFTEN)
    if os.getpgrp() == os.getpid():
        os.killpg(os.getpid(), signal.SIGKILL)
    os._exit(1)


if __name__ == "__main__":
    if os.name == "posix":
        threading.Thread(target=end_together, args=(os.getppid(),), daemon=True).start()
    sys.argv[0] = "ipykernel_launcher"
    runpy.run_module("ipykernel_launcher", run_name="__main__", alter_sys=True)
