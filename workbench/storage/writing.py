"""How everything is written: whole or not at all, and never over what somebody
else has put there.

    with replacing(folder) as draft:      # or a file
        draft.mkdir()
        (draft / "table.json").write_text("...")

What the block makes is flushed to the disk and takes its place when the block ends without an error. The
folder's `.workbench-files.json` lists what was written, with sizes and checksums: a later save replaces and
removes those files, and refuses, by name, when it meets anything else (`overwrite=True` writes all the same;
files of other names stay in any case).

A folder that exists is changed file by file, for it may be somebody's working directory: the finished draft
first becomes `.workbench-ready` inside it, in one rename, and its files are moved out of there. A process
that is killed in between leaves the rest to whoever comes next, reader or writer (`settle`).
"""

from __future__ import annotations

import contextlib
import errno
import hashlib
import itertools
import json
import os
import re
import shutil
import tempfile
import time
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

from workbench.errors import BadInput

try:
    import fcntl
except ImportError:  # Windows: no advisory locks
    fcntl = None  # type: ignore[assignment]

MANIFEST = ".workbench-files.json"
READY = ".workbench-ready"
DRAFT = ".workbench-draft-"
SCRATCH = "workbench-scratch-"
#: What file browsers and notebook servers leave in any folder.
LITTER = {".DS_Store", "Thumbs.db", "desktop.ini", ".ipynb_checkpoints"}
#: What an operating system says when a place cannot be written.
UNWRITABLE = {
    getattr(errno, name)
    for name in (
        "EACCES EPERM EROFS ENOSPC EDQUOT EFBIG EIO ENAMETOOLONG ENOTDIR EISDIR EEXIST ELOOP"
    ).split()
    if hasattr(errno, name)
}
_drafts: set[str] = set()


class CannotWrite(BadInput):
    """A place that cannot be written, and why."""


@contextlib.contextmanager
def replacing(
    target: str | os.PathLike[str],
    *,
    overwrite: bool = False,
    private: bool = False,
    first_wins: bool = False,
    field: str = "out",
) -> Iterator[Path]:
    """Write to a draft (file or folder) that takes `target`'s place only when the block ends without error.

    overwrite : write also where something lies that no save of ours has written
    private : a place that only the workbench writes to, such as its cache: anything there may go, files are
        not listed, and nothing waits for the disk
    first_wins : leave a whole folder that another process has finished meanwhile as it is
    field : what the user gave the target as, for messages

    `CannotWrite` when the target cannot be written, `BadInput` when it holds something of somebody else's.
    """
    goal = place(target, field)
    with told_of(goal, field):
        if not private:
            check_free(goal, overwrite, field)
        inside = goal.is_dir()
        root = goal if inside else goal.parent
        root.mkdir(parents=True, exist_ok=True)
        sweep(root)
        holder = _new_draft(root)
        try:
            with _held(holder):
                draft = holder / goal.name
                yield draft
                if draft.is_dir():
                    _commit_folder(draft, goal, overwrite, private, first_wins, field)
                else:
                    _commit_file(draft, goal, overwrite, private, field)
        finally:
            shutil.rmtree(holder, ignore_errors=True)
            _drafts.discard(holder.name)


def check_target(
    target: str | os.PathLike[str],
    *,
    overwrite: bool = False,
    folder: bool = True,
    field: str = "out",
    files: Iterable[str] = (),
) -> Path:
    """Try, before a long computation, whether its result can be written there; the path it will have.
    Nothing is left behind. `files`: names that will be written, where they are known.
    """
    goal = place(target, field)
    with told_of(goal, field):
        if folder and goal.exists() and not goal.is_dir():
            raise CannotWrite(f"{field}: {str(goal)!r} is a file; give a folder")
        if not folder and goal.is_dir():
            raise CannotWrite(f"{field}: {str(goal)!r} is a folder; give a file")
        check_free(goal, overwrite, field)
        for name in files:
            if (goal / name).is_dir():
                raise CannotWrite(f"{field}: {str(goal / name)!r} is a folder where a file has to be")
        root = goal if goal.is_dir() else goal.parent
        while not root.exists() and root != root.parent:
            root = root.parent
        sweep(root)
        holder = _new_draft(root)
        try:
            trial = holder / goal.relative_to(root)
            trial.mkdir(parents=True, exist_ok=True)  # a name that is too long fails here
            (trial / MANIFEST).write_text("{}")
        finally:
            shutil.rmtree(holder, ignore_errors=True)
            _drafts.discard(holder.name)
    return goal


def place(target: str | os.PathLike[str], field: str = "out") -> Path:
    """The absolute path that a user's text names: `~` is the home folder, `.` the working directory,
    links lead where they point.
    """
    text = os.fspath(target)
    if not text.strip() or "\0" in text:
        raise BadInput(f"{field}: {text!r} is not a path; give the name of a file or folder")
    goal = Path(os.path.realpath(os.path.expanduser(text)))
    if goal == goal.parent:
        raise BadInput(f"{field}: {text!r} is the root of a file system; give a folder below it")
    return goal


def check_free(goal: Path, overwrite: bool = False, field: str = "out") -> None:
    """`BadInput` naming what lies at `goal` that no save has written, or that was changed since."""
    if not overwrite and goal.is_dir():
        with _locked(goal):
            _move_in(goal)
            _check_free(goal, overwrite, field)
    elif not overwrite and goal.exists():
        with _locked(goal.parent):
            _check_free(goal, overwrite, field)


def _check_free(goal: Path, overwrite: bool, field: str) -> None:
    """The same, by one who holds the folder."""
    if overwrite or not goal.exists():
        return
    if goal.is_dir():
        strange = list(itertools.islice(foreign(goal), 4))
        where = f"{str(goal)!r} holds"
    else:
        strange = [] if _ours(goal, manifest(goal.parent).get(goal.name)) else [goal.name]
        where = f"{str(goal.parent)!r} has"
    if strange:
        names = ", ".join(repr(name) for name in strange[:3]) + (" and more" if len(strange) > 3 else "")
        raise BadInput(
            f"{field}: {where} {names}, which no save of this program left there like that; "
            "give another place, or --overwrite (overwrite=True) to replace files of the same names"
        )


def foreign(folder: Path) -> Iterator[str]:
    """Names of what lies in a folder and is not, or not any more, what a save has written."""
    listed = manifest(folder)
    for path in _files(folder):
        name = path.relative_to(folder).as_posix()
        if path.is_dir() and not path.is_symlink():
            yield name + "/"
        elif not _ours(path, listed.get(name)):
            yield name


def manifest(folder: Path) -> dict[str, dict[str, Any]]:
    """File name -> size, sha256 and `kind` (of a saved "folder", or a single "file") of what was written
    there; empty where no save has been.
    """
    try:
        found = json.loads((folder / MANIFEST).read_text(encoding="utf-8"))["files"]
        return {str(k): v for k, v in found.items() if isinstance(v, dict)}
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError):
        return {}


def damage(folder: Path, but: str = "") -> str:
    """What is wrong with a saved folder, in words: a file that is missing or whose content is not what was
    written. Empty when it is whole or has no list. `but` : a pattern of names that may differ.
    """
    settle(folder)
    try:
        with _locked(folder):
            return _damage(folder, but)
    except OSError as error:
        return f"it cannot be read ({os.strerror(error.errno or 0)})"


def _damage(folder: Path, but: str) -> str:
    for name, entry in manifest(folder).items():
        if entry.get("kind") != "folder" or (but and re.fullmatch(but, name)):
            continue
        path = folder / name
        if not path.is_file():
            return f"{name} is missing"
        if not _ours(path, entry):
            return f"{name} is not what was written (its checksum differs)"
    return ""


def settle(folder: Path) -> None:
    """Finish a save that was killed while its files were moved into place, and remove what others left."""
    if (folder / READY).is_dir():
        with _locked(folder):
            _move_in(folder)
    sweep(folder)


def sweep(folder: Path, left: bool = True, prefix: str = DRAFT) -> list[Path]:
    """The drafts in a folder whose process is gone; they are removed unless `left` is False."""
    found, drafts = [], list[Path]()
    with contextlib.suppress(OSError):
        drafts = list(folder.glob(prefix + "*"))
    for draft in drafts:
        with contextlib.suppress(OSError):  # somebody else's, or gone by now
            if draft.name not in _drafts and draft.is_dir() and _abandoned(draft):
                found.append(draft)
                if left:
                    shutil.rmtree(draft, ignore_errors=True)
    return found


@contextlib.contextmanager
def scratch(root: Path | None = None) -> Iterator[Path]:
    """A private folder among the system's temporary files, or in `root`, for as long as the block or the
    process lives: one that a killed process has left there is removed by the next that needs one.
    """
    root = root or Path(tempfile.gettempdir())
    sweep(root, prefix=SCRATCH)
    holder = _new_draft(root, SCRATCH)
    try:
        with _held(holder):
            yield holder
    finally:
        shutil.rmtree(holder, ignore_errors=True)
        _drafts.discard(holder.name)


@contextlib.contextmanager
def told_of(goal: Path, field: str = "out") -> Iterator[None]:
    """An operating system's refusal to write as one line, `CannotWrite`."""
    try:
        yield
    except BadInput:
        raise
    except Exception as error:
        reason = _refusal(error)
        if reason is None:
            raise
        raise CannotWrite(
            f"{field}: {str(goal)!r} cannot be written: {reason}; free space there or give another place"
        ) from None


def _refusal(error: Exception) -> str | None:
    if isinstance(error, OSError) and error.errno is not None and error.errno in UNWRITABLE:
        return os.strerror(error.errno)
    said = re.search(r"\(os error (\d+)\)", str(error))  # as libraries in Rust pass it on
    if said and int(said[1]) in UNWRITABLE:
        return os.strerror(int(said[1]))
    return None


def _commit_folder(
    draft: Path, goal: Path, overwrite: bool, private: bool, first_wins: bool, field: str
) -> None:
    new = {path.relative_to(draft).as_posix(): _entry(path, "folder") for path in _files(draft)}
    if not private:
        _flush(draft)
    if private and goal.exists() and not goal.is_dir():
        goal.unlink()
    if not goal.exists():
        _write_manifest(draft, new)
        try:
            os.rename(draft, goal)
        except OSError as error:
            if error.errno not in (errno.ENOTEMPTY, errno.EEXIST, errno.ENOTDIR):
                raise  # else somebody was faster
        else:
            _flush_folder(goal.parent, private)
            return
    if not goal.is_dir():
        raise CannotWrite(f"{field}: {str(goal)!r} is a file; give a folder")
    with _locked(goal):
        _move_in(goal)
        if first_wins and (goal / MANIFEST).is_file() and not damage_within(goal):
            return
        if not private:
            _check_free(goal, overwrite, field)
        for name in new:
            if (goal / name).is_dir():
                if not private:
                    raise CannotWrite(f"{field}: {str(goal / name)!r} is a folder where a file has to be")
                shutil.rmtree(goal / name)
        others = {k: v for k, v in manifest(goal).items() if v.get("kind") != "folder"}
        _write_manifest(draft, others | new)
        os.rename(draft, goal / READY)
        _flush_folder(goal, private)
        _move_in(goal)
        _flush_folder(goal, private)


def damage_within(folder: Path) -> bool:
    """Whether a listed file of a folder that is being held is missing or differs."""
    return not all(_ours(folder / name, entry) for name, entry in manifest(folder).items())


def _move_in(folder: Path) -> None:
    """Move the files of a finished draft to their places; may be done again from wherever it stopped."""
    ready = folder / READY
    if not ready.is_dir():
        return
    if (ready / MANIFEST).is_file():
        new, old = manifest(ready), manifest(folder)
        for path in list(_files(ready)):
            goal = folder / path.relative_to(ready)
            goal.parent.mkdir(parents=True, exist_ok=True)
            os.replace(path, goal)
        for name, entry in old.items():
            if name not in new and entry.get("kind") == "folder" and _ours(folder / name, entry):
                (folder / name).unlink()
                _remove_empty((folder / name).parent, folder)
        os.replace(ready / MANIFEST, folder / MANIFEST)
    shutil.rmtree(ready, ignore_errors=True)


def _commit_file(draft: Path, goal: Path, overwrite: bool, private: bool, field: str) -> None:
    if goal.is_dir():
        raise CannotWrite(f"{field}: {str(goal)!r} is a folder; give a file")
    if private:
        os.replace(draft, goal)
        return
    _flush(draft)
    with _locked(goal.parent):
        _check_free(goal, overwrite, field)
        listed = manifest(goal.parent)
        entry = _entry(draft, "file")
        if goal.name in listed:
            entry["before"] = {k: v for k, v in listed[goal.name].items() if k != "before"}
        listing = draft.with_name(MANIFEST)
        _write_manifest(listing.parent, listed | {goal.name: entry})
        _flush(listing)
        os.replace(listing, goal.parent / MANIFEST)
        os.replace(draft, goal)
        _flush_folder(goal.parent, private)


def _files(folder: Path) -> Iterator[Path]:
    """Everything a person would see in a folder and below it: files, links, and folders without any."""
    for base, folders, names in os.walk(folder):
        top = Path(base) == folder
        folders[:] = sorted(f for f in folders if f not in LITTER and not (top and _is_own_name(f)))
        shown = [n for n in sorted(names) if n not in LITTER and not (top and _is_own_name(n))]
        yield from (Path(base) / name for name in shown)
        yield from (Path(base) / f for f in folders if (Path(base) / f).is_symlink())
        if not top and not folders and not shown:
            yield Path(base)


def _is_own_name(name: str) -> bool:
    return name in (MANIFEST, READY) or name.startswith(DRAFT)


def _ours(path: Path, entry: Mapping[str, Any] | None) -> bool:
    """Whether a file is, byte for byte, what its entry says was written (or what that was to replace)."""
    if entry is None or path.is_symlink() or not path.is_file():
        return False
    size = path.stat().st_size
    known = [e for e in (entry, entry.get("before")) if isinstance(e, Mapping) and e.get("size") == size]
    return bool(known) and _sha256(path) in [e.get("sha256") for e in known]


def _entry(path: Path, kind: str) -> dict[str, Any]:
    return {"size": path.stat().st_size, "sha256": _sha256(path), "kind": kind}


def _sha256(path: Path) -> str:
    with path.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


def _write_manifest(folder: Path, files: Mapping[str, Mapping[str, Any]]) -> None:
    content = {"written by": "model-workbench", "files": dict(sorted(files.items()))}
    (folder / MANIFEST).write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")


def _remove_empty(folder: Path, above: Path) -> None:
    while folder != above:
        try:
            folder.rmdir()
        except OSError:
            return
        folder = folder.parent


def _flush(path: Path) -> None:
    """Wait until a file, or a folder with everything in it, is on the disk."""
    if path.is_dir():
        for base, _, names in os.walk(path):
            for name in names:
                _flush(Path(base) / name)
            _flush_folder(Path(base), False)
        return
    with path.open("rb") as stream:
        os.fsync(stream.fileno())


def _flush_folder(folder: Path, private: bool) -> None:
    if private or os.name == "nt":
        return
    handle = os.open(folder, os.O_RDONLY)
    try:
        with contextlib.suppress(OSError):  # some network file systems cannot
            os.fsync(handle)
    finally:
        os.close(handle)


def _new_draft(root: Path, prefix: str = DRAFT) -> Path:
    try:
        holder = Path(tempfile.mkdtemp(prefix=f"{prefix}{os.getpid()}-", dir=root))
    except FileNotFoundError:  # what a file system that takes no files says, such as /proc
        raise OSError(errno.EROFS, os.strerror(errno.EROFS)) from None
    _drafts.add(holder.name)
    return holder


def _abandoned(draft: Path) -> bool:
    """Whether nobody holds a draft any more. A living process of the number in its name keeps it for a day:
    it may be about to lock it.
    """
    number = re.match(r"(\d+)-", draft.name.removeprefix(DRAFT).removeprefix(SCRATCH))
    young = time.time() - draft.stat().st_mtime < 86400
    if young and number and int(number[1]) != os.getpid() and _alive(int(number[1])):
        return False
    if fcntl is None:
        return not young
    handle = os.open(draft, os.O_RDONLY)
    try:
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    finally:
        os.close(handle)
    return True


def _alive(number: int) -> bool:
    try:
        os.kill(number, 0)
    except ProcessLookupError:
        return False
    except (OSError, OverflowError):
        return True
    return True


@contextlib.contextmanager
def _held(holder: Path) -> Iterator[None]:
    """Mark a draft as in use for as long as the process lives."""
    with _locked(holder):
        yield


@contextlib.contextmanager
def _locked(folder: Path) -> Iterator[None]:
    """Hold a folder: writers and those who finish a killed save take turns. No file is left for it."""
    if fcntl is None:
        yield
        return
    handle = os.open(folder, os.O_RDONLY)
    try:
        with contextlib.suppress(OSError):  # a file system without locks
            fcntl.flock(handle, fcntl.LOCK_EX)
        yield
    finally:
        os.close(handle)
