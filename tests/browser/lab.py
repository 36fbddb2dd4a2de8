"""A real JupyterLab on the loopback interface and a real Chromium,
started for tests and taken down with them.
"""

from __future__ import annotations

import contextlib
import json
import os
import secrets
import shutil
import signal
import socket
import subprocess
import sys
import time
import urllib.request
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

import playwright.sync_api as playwright
import pytest

from tests.conftest import new_cache
from tests.notebook import write

CHROMIUM = next(
    (path for name in ("chromium", "chromium-browser", "google-chrome") if (path := shutil.which(name))), None
)
FLAGS = [
    "--no-sandbox",
    "--disable-gpu",
    "--disable-quic",
    "--no-first-run",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
]
PATIENCE = 90_000  # milliseconds; a loaded machine is slow, not broken


@dataclass
class Lab:
    url: str
    token: str
    root: Path


@contextlib.contextmanager
def serve(root: Path, private: Path, environment: dict[str, str] | None = None) -> Iterator[Lab]:
    """JupyterLab over `root`, with settings, kernels and runtime files of its own in `private`."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    token = secrets.token_hex(16)
    settings = private / "settings" / "@jupyterlab" / "apputils-extension"
    settings.mkdir(parents=True)
    (settings / "notification.jupyterlab-settings").write_text(
        json.dumps({"checkForUpdates": False, "fetchNews": "false", "doNotDisturbMode": True})
    )
    # the project's own override follows the system's light or dark;
    # while it does, JupyterLab takes the first change of theme as the wish to stop following
    (settings / "themes.jupyterlab-settings").write_text(json.dumps({"adaptive-theme": False}))
    env = {
        **os.environ,
        "OMP_NUM_THREADS": "1",
        "PYDEVD_DISABLE_FILE_VALIDATION": "1",
        "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}",
        "JUPYTER_CONFIG_DIR": str(private / "config"),
        "JUPYTER_RUNTIME_DIR": str(private / "runtime"),
        "JUPYTER_DATA_DIR": str(private / "data"),
        "IPYTHONDIR": str(private / "ipython"),
        "JUPYTERLAB_SETTINGS_DIR": str(private / "settings"),
        "JUPYTERLAB_WORKSPACES_DIR": str(private / "workspaces"),
        **(environment or {}),
    }
    command = [
        sys.executable,
        "-m",
        "jupyterlab",
        "--no-browser",
        "--allow-root",
        "--ServerApp.ip=127.0.0.1",
        f"--ServerApp.port={port}",
        "--ServerApp.port_retries=0",
        f"--IdentityProvider.token={token}",
        f"--ServerApp.root_dir={root}",
        "--expose-app-in-browser",
        "--LabApp.news_url=None",
        "--KernelManager.shutdown_wait_time=0.2",  # a test's kernel has nothing to save
        # should the tests be killed, the server ends by itself
        "--ServerApp.shutdown_no_activity_timeout=300",
        "--MappingKernelManager.cull_idle_timeout=240",
    ]
    log = private / "server.log"
    with log.open("wb") as sink:
        process = subprocess.Popen(
            command, env=env, stdout=sink, stderr=sink, start_new_session=True, cwd=root
        )
    try:
        until = time.monotonic() + PATIENCE / 1000
        while True:
            with contextlib.suppress(OSError):
                urllib.request.urlopen(f"http://127.0.0.1:{port}/api/status?token={token}", timeout=5).read()
                break
            if process.poll() is not None or time.monotonic() > until:
                raise RuntimeError(f"JupyterLab did not start:\n{log.read_text()[-3000:]}")
            time.sleep(0.1)
        yield Lab(f"http://127.0.0.1:{port}", token, root)
    finally:
        process.send_signal(signal.SIGTERM)
        try:
            process.wait(15)
        except subprocess.TimeoutExpired:
            os.killpg(process.pid, signal.SIGKILL)
            process.wait(15)


@contextlib.contextmanager
def serve_cells(
    folders: pytest.TempPathFactory, cells: dict[str, str], environment: dict[str, str] | None = None
) -> Iterator[Lab]:
    """JupyterLab over a new folder with one notebook of one cell a name, and a cache of its own."""
    root, private = folders.mktemp("root"), folders.mktemp("private")
    for name, code in cells.items():
        write(root / f"{name}.ipynb", code)
    with serve(
        root, private, {"WORKBENCH_CACHE": str(new_cache(private / "cache")), **(environment or {})}
    ) as found:
        yield found


@dataclass
class Watched:
    """A page, and what it did that a test should know of."""

    page: playwright.Page
    outside: list[str] = field(default_factory=list)  # requests that left the machine
    refused: dict[str, str] = field(default_factory=dict)  # requests that failed or were stopped, and why
    errors: list[str] = field(default_factory=list)  # console errors and uncaught exceptions


@contextlib.contextmanager
def browse(width: int = 1280, height: int = 900, **context: object) -> Iterator[Watched]:
    """A fresh Chromium with one page that records outside requests and errors."""
    assert CHROMIUM is not None
    with playwright.sync_playwright() as driver:
        browser = driver.chromium.launch(executable_path=CHROMIUM, args=FLAGS)
        page = browser.new_context(viewport={"width": width, "height": height}, **context).new_page()  # type: ignore[arg-type]
        page.set_default_timeout(PATIENCE)
        watched = Watched(page)
        inside = ("http://127.0.0.1", "data:", "blob:", "file:", "about:")
        page.on(
            "request",
            lambda request: (
                None if request.url.startswith(inside) else watched.outside.append(request.url[:200])
            ),
        )
        page.on(
            "requestfailed", lambda request: watched.refused.update({request.url[:200]: str(request.failure)})
        )
        page.on(
            "console",
            lambda message: watched.errors.append(message.text[:300]) if message.type == "error" else None,
        )
        page.on("pageerror", lambda error: watched.errors.append((error.stack or str(error))[:600]))
        try:
            yield watched
        finally:
            browser.close()


def open_notebook(page: playwright.Page, lab: Lab, name: str) -> None:
    """Open a notebook and wait for its kernel."""
    page.goto(f"{lab.url}/lab/tree/{name}?token={lab.token}&reset")
    page.wait_for_selector(".jp-NotebookPanel .jp-Cell")
    page.wait_for_function(
        "() => window.jupyterapp?.shell.currentWidget?.sessionContext?.session?.kernel?.status === 'idle'"
    )


def run_all(page: playwright.Page) -> None:
    """Run every cell and wait until each has run."""
    page.evaluate("() => { jupyterapp.commands.execute('notebook:run-all-cells'); }")
    page.wait_for_function(
        "() => { const book = jupyterapp.shell.currentWidget; "
        "const cells = book.content.widgets.filter(c => c.model.type === 'code');"
        " return book.sessionContext.session.kernel.status === 'idle' && cells.every(c => "
        "c.model.executionCount || !c.model.sharedModel.source.trim()) }"
    )


def open_and_run(page: playwright.Page, lab: Lab, name: str, height: int = 1500) -> None:
    """Open the notebook `name` in a window tall enough for its panel, and run it."""
    page.set_viewport_size({"width": 1280, "height": height})
    open_notebook(page, lab, f"{name}.ipynb")
    run_all(page)


def photograph(page: playwright.Page, name: str) -> None:
    """For a person who wants to look: the page in both themes, where WORKBENCH_PICTURES names a folder."""
    folder = os.environ.get("WORKBENCH_PICTURES")
    for theme in ("Light", "Dark") if folder else ():
        set_theme(page, f"JupyterLab {theme}")
        page.wait_for_timeout(700)
        page.screenshot(path=Path(str(folder)) / f"{name}-{theme.lower()}.png")


def set_theme(page: playwright.Page, theme: str) -> None:
    """Change the theme and wait until it is there.

    JupyterLab shows its splash screen meanwhile and takes it away 200 ms later;
    a second change before that makes it throw.
    """
    page.wait_for_function("() => !document.getElementById('jupyterlab-splash')")
    page.evaluate("(theme) => jupyterapp.commands.execute('apputils:change-theme', { theme })", theme)
    page.wait_for_function(
        "(light) => document.body.dataset.jpThemeLight === light", arg="false" if "Dark" in theme else "true"
    )
    page.wait_for_function("() => !document.getElementById('jupyterlab-splash')")
