"""The kernel of a report: ipykernel, that ends with the process which started it, and so do its own workers
(ipykernel's own looks, which would leave the workers, come once a second).

python -m workbench.commands.report_kernel -f CONNECTION_FILE
"""

from __future__ import annotations

import runpy
import sys
import warnings
from typing import Any

from workbench.errors import Notice
from workbench.storage.together import ends_with_its_parent

#: Notices that the page has already.
SAID: set[str] = set()


def said_once(before: Any) -> Any:
    """What shows a warning: a notice is one line, once in a report, without the file that said it."""

    def show(message: Warning | str, category: type[Warning], *more: Any, **named: Any) -> None:
        if not issubclass(category, Notice):
            before(message, category, *more, **named)
        elif str(message) not in SAID:
            SAID.add(str(message))
            print(f"workbench: {message}", file=sys.stderr)

    return show


if __name__ == "__main__":
    ends_with_its_parent()
    warnings.showwarning = said_once(warnings.showwarning)
    sys.argv[0] = "ipykernel_launcher"
    runpy.run_module("ipykernel_launcher", run_name="__main__", alter_sys=True)
