"""A user's own files: loaded once, by the environment or by call, and known in other processes."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from workbench.errors import BadInput
from workbench.families import PLUGINS, import_plugin, load_plugins, module_name

PLUGIN = '''
"""An axis and an entry of the user's own."""
from workbench.axis import AXES, Axis, Options, parameter

HOME = AXES.get("test-plugin-scoring") or Axis("test-plugin-scoring", "what a removal costs")

class Scaled(Options):
    by: float = parameter(2.0, "factor", gt=0)

@HOME.add("mine", formula="s |w|", source="a user 2026", options=Scaled)
def mine(weight, options):
    return options.by * abs(weight)
'''

ASK = """
import pickle, sys
from workbench.axis import axis
choice = axis("test-plugin-scoring").chosen({"name": "mine", "by": 3.0})
assert choice(-2.0) == 6.0
sys.stdout.buffer.write(pickle.dumps(choice))
"""

READ = """
import pickle, sys
choice = pickle.loads(sys.stdin.buffer.read())
print(choice(-1.0), choice.entry.place()[1] > 1)
"""


@pytest.fixture()
def plugin(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.delenv(PLUGINS, raising=False)
    file = tmp_path / "my plugin.py"
    file.write_text(PLUGIN)
    return file


def run(code: str, plugins: str, sent: bytes = b"") -> bytes:
    environment = {**os.environ, PLUGINS: plugins}
    done = subprocess.run(
        [sys.executable, "-c", code], input=sent, capture_output=True, env=environment, timeout=120
    )
    assert done.returncode == 0, done.stderr.decode()
    return done.stdout


def test_an_entry_of_a_plugin_is_known_in_another_process(plugin: Path) -> None:
    sent = run(ASK, str(plugin))
    assert run(READ, str(plugin), sent).split() == [b"3.0", b"True"]


def test_loading_by_call_reaches_processes_started_later(plugin: Path) -> None:
    call = f"from workbench.families import load_plugins; load_plugins([{str(plugin)!r}] * 2)\n"
    child = call + f"import os, subprocess, sys\nsubprocess.run([sys.executable, '-c', {ASK!r}], check=True)"
    assert b"test-plugin-scoring" in run(child, "")


def test_a_file_is_loaded_once(plugin: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    plugin.write_text("import os\nos.environ['COUNTED'] = os.environ.get('COUNTED', '') + 'x'")
    monkeypatch.setenv("COUNTED", "")
    monkeypatch.setenv(PLUGINS, "")
    monkeypatch.chdir(plugin.parent)
    load_plugins([plugin, "my plugin.py"])
    assert os.environ["COUNTED"] == "x" and os.environ[PLUGINS] == str(plugin)
    del sys.modules[module_name(plugin)]


def test_what_is_wrong_with_a_file_is_said_in_one_line(plugin: Path) -> None:
    plugin.write_text("raise RuntimeError('no\\nmore')")
    with pytest.raises(BadInput, match=r"plugins: '.*my plugin.py' failed: RuntimeError: no \(line 1\)$"):
        import_plugin(plugin)
    assert module_name(plugin) not in sys.modules
    plugin.write_text("def broken(:")
    with pytest.raises(BadInput, match=r"failed: SyntaxError: .*line 1"):
        import_plugin(plugin)
    with pytest.raises(BadInput, match="is not a Python file"):
        import_plugin("nowhere.py")
