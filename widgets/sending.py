"""Send to report: a panel's exact settings as a file of parameters,
and the headless report made from it in the background.
"""

from __future__ import annotations

import html
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any
from urllib.parse import quote

import workbench
from workbench import reports
from workbench.axis import entries_in
from workbench.errors import BadInput
from workbench.instruments import Instrument
from workbench.storage import cache_folder, replacing
from workbench.subjects.identity import saved_as

NOTEBOOK = "instrument"


def source_of(on: Any) -> str:
    """What opens exactly this subject again: a built-in's name, or the folder it is saved in.
    For runs, the file of their table.
    """
    if hasattr(on, "table"):
        file = cache_folder() / "sent" / f"{on.fingerprint}.parquet"
        with replacing(file, private=True) as draft:
            on.table.to_parquet(draft)
        return str(file)
    name = on.origin.get("builtin")
    if name and not on.history and workbench.subject(name).fingerprint == on.fingerprint:
        return str(name)
    folder = cache_folder() / "sent" / on.fingerprint
    if saved_as(folder) != on.fingerprint:
        on.save(folder, private=True)
    return str(folder)


class Report:
    """One report on its way: `parameters` (the file), `html` (where it will be), `state` and, once it ended,
    `error`.
    """

    def __init__(self, parameters: Mapping[str, Any], folder: Path, told: Callable[[Report], None]) -> None:
        stem = f"{parameters['instrument']}-{time.strftime('%Y%m%d-%H%M%S')}"
        self.parameters = _unused(folder / f"{stem}.yaml")
        self.html = self.parameters.with_suffix(".html")
        self.state, self.error = "starting", ""
        self._told = told
        reports.check(NOTEBOOK, parameters)
        reports.write_parameters(self.parameters, parameters)
        self._tell("starting a kernel of its own")
        self._thread = threading.Thread(target=self._run, daemon=True)
        self._thread.start()

    @property
    def command(self) -> list[str]:
        """What runs, and what a user may type to repeat it."""
        return ["report", NOTEBOOK, "--parameters", str(self.parameters), "--out", str(self.html)]

    def wait(self, timeout: float | None = None) -> bool:
        self._thread.join(timeout)
        return not self._thread.is_alive()

    def _run(self) -> None:
        process = subprocess.Popen(
            [sys.executable, "-m", "workbench.cli", *self.command],
            stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.PIPE,
            text=True,
            encoding="utf-8",
        )
        assert process.stderr is not None
        last = ""
        for line in process.stderr:
            if line.strip():
                last = line.strip()
                self._tell("running: " + last)
        if process.wait() == 0:
            self._tell("done")
        else:
            self.error = last or f"the report ended with exit code {process.returncode}"
            self._tell("failed")

    def _tell(self, state: str) -> None:
        self.state = state
        self._told(self)

    def link(self) -> str:
        """HTML that opens the report: through the notebook server when it serves that folder,
        else the path to copy.
        """
        address = server_address(self.html)
        if address is None:
            return f"<code>{html.escape(str(self.html))}</code>"
        return (
            f'<a href="{html.escape(address)}" target="_blank" '
            f'rel="noopener">{html.escape(self.html.name)}</a>'
        )


def check_known_elsewhere(instrument: Instrument) -> None:
    """Raise `BadInput` for an entry typed in a notebook: who makes the report has not seen it."""
    for entry in entries_in(instrument):
        if getattr(entry.value, "__module__", "") == "__main__":
            raise BadInput(
                f"{entry.axis.kind}: {entry.name!r} is registered in this notebook, which a report does not "
                f"know; write it to a .py file and load that with workbench.families.load_plugins"
            )


def _unused(file: Path) -> Path:
    count = 2
    while file.exists():
        file = file.with_name(f"{file.stem.split('_')[0]}_{count}{file.suffix}")
        count += 1
    return file.absolute()


def server_address(file: Path) -> str | None:
    """The address path under which the Jupyter server that started this kernel serves `file`;
    None when it does not.
    """
    import os

    try:
        from jupyter_server.serverapp import list_running_servers

        servers = [
            info
            for info in list_running_servers()
            if info["pid"] in (os.getppid(), int(os.environ.get("JPY_PARENT_PID", 0)))
        ]
    except (ImportError, ValueError, OSError):
        return None
    for info in servers:
        root = Path(info.get("root_dir") or info.get("notebook_dir") or "").resolve()
        if file.resolve().is_relative_to(root):
            return f"{info['base_url']}files/{quote(file.resolve().relative_to(root).as_posix())}"
    return None
