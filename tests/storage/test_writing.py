"""What a user has is never removed or replaced without being asked; what is written is whole or not there."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest

from workbench.errors import BadInput
from workbench.storage import CannotWrite, check_target, damage, replacing, settle, writing

ROOT = Path(__file__).parents[2]


def save(target: object, content: dict[str, str], **options: bool) -> None:
    with replacing(target, **options) as draft:
        draft.mkdir()
        for name, text in content.items():
            (draft / name).parent.mkdir(parents=True, exist_ok=True)
            (draft / name).write_text(text)


def holds(folder: Path) -> dict[str, str]:
    """What a person sees in a folder."""
    return {p.relative_to(folder).as_posix(): p.read_text() for p in writing._files(folder) if p.is_file()}


def script(text: str, *arguments: object, **options: object) -> subprocess.CompletedProcess[str]:
    code = "from workbench.storage import *\nimport sys, os, pathlib\n" + textwrap.dedent(text)
    return subprocess.run(
        [sys.executable, "-c", code, *map(str, arguments)],
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        timeout=60,
        **options,
    )


SAVE = """
    def save(target, content, **options):
        with replacing(target, **options) as draft:
            draft.mkdir()
            for name, text in content.items():
                (draft / name).write_text(text)
"""


def test_our_own_files_are_replaced_and_removed_and_nobody_elses(tmp_path: Path) -> None:
    """Faults 1 and 51: nothing a user has goes without being asked; ours is known by its manifest."""
    target = tmp_path / "results"
    save(target, {"a": "1", "b": "2", "deep/c": "3"})
    save(target, {"a": "4"})
    assert holds(target) == {"a": "4"} and not (target / "deep").exists()
    (target / "thesis").mkdir()
    (target / "thesis" / "chapter1.tex").write_text("years of work")
    with pytest.raises(BadInput, match=r"thesis/chapter1\.tex.*--overwrite"):
        save(target, {"a": "5"})
    with pytest.raises(BadInput, match="chapter1"):
        check_target(target)
    save(target, {"z": "6"}, overwrite=True)
    assert holds(target) == {"z": "6", "thesis/chapter1.tex": "years of work"}


def test_what_somebody_changed_in_our_files_is_somebodys(tmp_path: Path) -> None:
    """A further example of fault 1: notes written into a saved table; a link in the place of a file."""
    save(tmp_path / "r", {"a": "1", "b": "2"})
    (tmp_path / "r" / "a").write_text("1, and my notes")
    with pytest.raises(BadInput, match="'a'"):
        save(tmp_path / "r", {"a": "2"})
    (tmp_path / "r" / "a").unlink()
    (tmp_path / "mine").write_text("1")
    (tmp_path / "r" / "a").symlink_to(tmp_path / "mine")
    with pytest.raises(BadInput, match="'a'"):
        save(tmp_path / "r", {"a": "2"})
    save(tmp_path / "r", {"a": "2"}, overwrite=True)
    assert (tmp_path / "mine").read_text() == "1" and holds(tmp_path / "r") == {"a": "2"}


def test_the_same_of_single_files(tmp_path: Path) -> None:
    """Fault 51: an export replaces any file of its name."""
    file = tmp_path / "model.onnx"
    for text in ("1", "2"):
        with replacing(file) as draft:
            draft.write_text(text)
    file.write_text("somebody's")
    with pytest.raises(BadInput, match=r"model\.onnx"), replacing(file) as draft:
        draft.write_text("3")
    assert file.read_text() == "somebody's"
    with replacing(file, overwrite=True) as draft:
        draft.write_text("3")
    assert file.read_text() == "3"
    with pytest.raises(BadInput, match="is a folder"), replacing(tmp_path) as draft:
        draft.write_text("3")


def test_a_folder_may_be_the_working_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Faults 1 and 51: `--out .` and `--out ../keep` from within keep the folder itself."""
    keep = tmp_path / "keep"
    keep.mkdir()
    monkeypatch.chdir(keep)
    number = keep.stat().st_ino
    for target in (".", "../keep", "./", Path(".")):
        save(target, {"a": str(target)})
        assert keep.stat().st_ino == number and Path("a").read_text() == str(target)


@pytest.mark.parametrize(
    "name", ["with space", "rep{x}", "a'b\"c", "ä-\u4e2d", "%s", "x" * 250, "-o", "$HOME"]
)
def test_names_are_taken_as_they_are(tmp_path: Path, name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    check_target(name)
    for text in "12":
        save(name, {"a": text})
    assert holds(tmp_path / name) == {"a": "2"} and [p.name for p in tmp_path.iterdir()] == [name]


def test_a_tilde_is_the_home_folder_and_no_path_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    monkeypatch.chdir(tmp_path)
    save("~/out", {"a": "1"})
    assert holds(tmp_path / "home" / "out") == {"a": "1"} and not (tmp_path / "~").exists()
    for wrong in ("", "  ", "a\0b", "/"):
        with pytest.raises(BadInput, match="out: "):
            check_target(wrong)
    for wrong in ("x" * 300, "/proc/none/here", "/dev/null/x"):
        with pytest.raises(CannotWrite, match="out: .* cannot be written|is a file"):
            check_target(wrong)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["home"]


def test_a_folder_in_the_place_of_a_file_is_found_before_the_run(tmp_path: Path) -> None:
    """Kind: what stops the save is seen only once everything was computed."""
    (tmp_path / "table.parquet").mkdir()
    with pytest.raises(CannotWrite, match="a folder where a file has to be"):
        check_target(tmp_path, overwrite=True, files=("result.json", "table.parquet"))
    check_target(tmp_path, overwrite=True, files=("result.json",))


@pytest.mark.skipif(os.name != "posix" or os.getuid() != 0, reason="becomes another user")
def test_a_read_only_folder_is_named(tmp_path: Path) -> None:
    """A further example of fault 38: `--out` in a folder of somebody else's."""
    os.chmod(tmp_path, 0o755)
    for part in (tmp_path, *tmp_path.parents):
        if part.stat().st_uid == 0 and not os.access(part, os.X_OK):
            pytest.skip("the temporary folder is closed")
    code = "os.setuid(65534)\ntry:\n    check_target(sys.argv[1])\nexcept CannotWrite as e:\n    print(e)"
    done = script(code, tmp_path / "out")
    assert "cannot be written: Permission denied" in done.stdout, done.stderr


def test_a_full_disk_leaves_the_old_and_is_one_line(tmp_path: Path) -> None:
    """A further example of fault 38: a disk that is full while a folder is written."""
    target = tmp_path / "r"
    save(target, {"a": "1"})
    done = script(
        SAVE
        + """
    import resource
    resource.setrlimit(resource.RLIMIT_FSIZE, (5000, 5000))
    try:
        save(sys.argv[1], {"a": "2" * 100_000})
    except CannotWrite as error:
        print(error)
    import numpy, safetensors.numpy
    try:
        with replacing(sys.argv[1]) as draft:
            draft.mkdir()
            safetensors.numpy.save_file({"x": numpy.zeros(100_000)}, draft / "a")
    except CannotWrite as error:
        print(error)
    """,
        target,
    )
    lines = done.stdout.splitlines()
    assert len(lines) == 2 and all("cannot be written: File too large" in line for line in lines), done
    assert holds(target) == {"a": "1"} and not damage(target)
    assert sorted(p.name for p in target.iterdir()) == [writing.MANIFEST, "a"]


OLD, NEW = {"a": "old", "b": "old", "gone": "old"}, {"a": "new", "b": "new", "more": "new"}


def steps() -> list[int]:
    return list(range(1, 9))


@pytest.mark.parametrize("step", steps())
def test_killed_at_any_step_the_old_or_the_new_is_there(tmp_path: Path, step: int) -> None:
    """Faults 37 and 51: with SIGKILL between two renames nothing was left."""
    target = tmp_path / "r"
    save(target, OLD)
    code = """
    import signal
    from workbench.storage import writing
    left = [int(sys.argv[2])]
    def counted(function):
        def call(*given, **named):
            left[0] -= 1
            if left[0] == 0:
                os.kill(os.getpid(), signal.SIGKILL)
            return function(*given, **named)
        return call
    os.replace, os.rename = counted(os.replace), counted(os.rename)
    pathlib.Path.unlink = counted(pathlib.Path.unlink)
    """
    done = script(SAVE + code + f"\n    save(sys.argv[1], {NEW!r})", target, step)
    assert done.returncode in (0, -signal.SIGKILL), done.stderr
    settle(target)
    assert holds(target) in (OLD, NEW) and not damage(target)
    assert not [p for p in target.iterdir() if p.name not in {*OLD, *NEW, writing.MANIFEST}]
    save(target, NEW)
    assert holds(target) == NEW


def test_an_error_within_leaves_the_old_and_no_draft(tmp_path: Path) -> None:
    save(tmp_path / "r", OLD)
    with pytest.raises(RuntimeError), replacing(tmp_path / "r") as draft:
        draft.mkdir()
        (draft / "a").write_text("half")
        raise RuntimeError
    assert holds(tmp_path / "r") == OLD and [p.name for p in tmp_path.iterdir()] == ["r"]


def test_what_killed_saves_left_goes_with_the_next_call(tmp_path: Path) -> None:
    """Fault 37: temporary folders of killed saves were never cleaned."""
    code = "with replacing(sys.argv[1]) as d:\n    d.mkdir()\n    os.kill(os.getpid(), 9)"
    script(code, tmp_path / "r")
    assert [p.name[:17] for p in tmp_path.iterdir()] == [writing.DRAFT]
    with replacing(tmp_path / "r") as draft:  # one that is alive stays
        draft.mkdir()
        assert len(list(tmp_path.glob(writing.DRAFT + "*"))) == 1
        writing.sweep(tmp_path)
        script("check_target(sys.argv[1])", tmp_path / "other")
        assert draft.is_dir()
    assert [p.name for p in tmp_path.iterdir()] == ["r"]


def test_processes_that_write_one_place_leave_one_whole(tmp_path: Path) -> None:
    """Fault 37: of 1,133 saves of two processes to one key, 6 collided."""
    code = (
        SAVE
        + """
    for turn in range(30):
        save(sys.argv[1], {n: sys.argv[2] for n in "abcdef"}, private=sys.argv[3] == "p", first_wins=False)
    """
    )
    for place, private in (("slot", "p"), ("own", "")):
        running = [
            subprocess.Popen(
                [
                    sys.executable,
                    "-c",
                    "from workbench.storage import *\nimport sys, os\n" + textwrap.dedent(code),
                    str(tmp_path / place),
                    who,
                    private,
                ],
                env={**os.environ, "PYTHONPATH": str(ROOT)},
            )
            for who in "12"
        ]
        assert [p.wait(120) for p in running] == [0, 0]
        assert not damage(tmp_path / place) and len(set(holds(tmp_path / place).values())) == 1
        assert [p.name for p in tmp_path.iterdir() if p.name.startswith(".")] == []


def test_damage_is_named(tmp_path: Path) -> None:
    save(tmp_path / "r", OLD)
    (tmp_path / "r" / "b").write_text("bld")
    assert "b is not what was written" in damage(tmp_path / "r")
    (tmp_path / "r" / "a").unlink()
    assert "a is missing" in damage(tmp_path / "r")
