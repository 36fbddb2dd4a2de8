"""The kernel of a report: ipykernel, that ends with the process which started it, and so do its own workers
(ipykernel's own looks, which would leave the workers, come once a second).

python -m workbench.commands.report_kernel -f CONNECTION_FILE
"""

from __future__ import annotations

import runpy
import sys

from workbench.storage.together import ends_with_its_parent

if __name__ == "__main__":
    ends_with_its_parent()
    sys.argv[0] = "ipykernel_launcher"
    runpy.run_module("ipykernel_launcher", run_name="__main__", alter_sys=True)
