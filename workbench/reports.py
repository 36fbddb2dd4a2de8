"""Reports: a parameterised notebook, run headless by papermill with strict parameters,
exported to one HTML file.

    render("compress", {"subject": "digits-vit"}, Path("reports"))

Stricter than papermill itself, where an unknown name only warns and "true" stays text: names and values are
checked against the declarations in the notebook's cell tagged `parameters` before a kernel starts.

    subject: str = "minilm-docstrings"  # the model to compress
    sparsities: list[float] = [0.5, 0.7]  # fractions of weights to remove

The kernel is always this interpreter, whatever kernels are registered, and is spoken to over a private
socket. Output files appear under their names when they are complete;
after a failure they hold what was finished, and the error.
"""

from __future__ import annotations

import ast
import contextlib
import io
import logging
import math
import os
import signal
import sys
import threading
import time
import tokenize
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar, Union

import nbformat
import yaml
from pydantic import TypeAdapter, ValidationError

from workbench.errors import BadInput, unknown_name
from workbench.instruments import Instrument
from workbench.progress import Progress
from workbench.storage import check_target, replacing
from workbench.storage.writing import place, scratch

HEADLESS = {"WORKBENCH_HEADLESS": "1", "PLOTLY_RENDERER": "plotly_mimetype", "PYTHONHASHSEED": "0"}
#: Type names that a parameter's declaration may use: those a notebook knows without an import.
TYPES: dict[str, Any] = {t.__name__: t for t in (str, int, float, bool, list, dict)}
STARTED = 120  # seconds that a kernel has to answer for the first time
#: Bytes of a cell of parameters; a longer one is none.
LONGEST = 100_000


@dataclass(frozen=True)
class ReportPaths:
    """What a run left behind; `error` is one line naming what stopped it (None: it is complete)."""

    notebook: Path
    html: Path
    error: str | None = None


@dataclass(frozen=True)
class Parameter:
    """One declaration of a notebook's `parameters` cell."""

    name: str
    annotation: Any
    default: Any
    help: str

    def accept(self, value: Any) -> Any:
        """`value` as the declared type, without guessing: 7 is not text, "7" not a number.
        Raises `BadInput`.
        """
        if self.annotation is Any:
            return value
        try:
            return TypeAdapter(self.annotation).validate_python(value, strict=True)
        except ValidationError as error:
            wanted = error.errors()[0]["msg"].removeprefix("Input should be ")
            raise BadInput(
                f"{self.name}: {value!r} is not accepted, it should be {wanted} (default {self.default!r})"
            ) from None


def notebooks_folder() -> Path:
    """Where the project's notebooks are: beside the packages in a checkout,
    inside the package once installed.
    """
    here = Path(__file__).parent
    for folder in (here / "_notebooks", here.parent / "notebooks"):
        if folder.is_dir():
            return folder
    raise BadInput(f"report: no notebooks beside {here}; the installation is incomplete")


def available() -> list[str]:
    """Names `render` accepts: the project's notebooks that have a cell of parameters."""
    return [
        file.stem
        for file in sorted(notebooks_folder().glob("*.ipynb"))
        if _parameters_cell(_read(file)) is not None
    ]


def find(name_or_path: str | os.PathLike[str]) -> Path:
    """The notebook called so: a path to an .ipynb file, or a name from `available()`."""
    given = Path(name_or_path)
    if given.suffix == ".ipynb":
        if not os.path.isfile(given):
            raise BadInput(
                f"report: {str(given)!r} is not a file; give a notebook or one of {', '.join(available())}"
            )
        return given
    file = notebooks_folder() / f"{name_or_path}.ipynb"
    if given.name != str(name_or_path) or not os.path.isfile(file):
        raise unknown_name("report", str(name_or_path), available(), ", or a path to an .ipynb file")
    return file


def parameters_of(name_or_path: str | os.PathLike[str]) -> dict[str, Parameter]:
    """The parameters a notebook declares: name -> type, default and help (the comment after it)."""
    path = find(name_or_path)
    cell = _parameters_cell(_read(path))
    if cell is None:
        raise BadInput(
            f"report: {path.name} takes no parameters (it has no cell tagged 'parameters'), "
            "so it is not a report"
        )
    try:
        if len(cell.source) > LONGEST:
            raise ValueError(f"it is longer than {LONGEST} characters")
        return {p.name: p for p in _declarations(cell.source)}
    except (SyntaxError, ValueError, TypeError, tokenize.TokenError, RecursionError, MemoryError) as error:
        raise BadInput(
            f"report: the cell of parameters of {path.name} is not a list of `name: type = value  # help`: "
            f"{' '.join(str(error).split())[:200]}"
        ) from None


def _read(path: Path) -> nbformat.NotebookNode:
    """A notebook's file; `BadInput` when it is none."""
    try:
        notebook = nbformat.read(path, 4)
        nbformat.validate(notebook)  # reading only warns of what the schema does not allow
        return notebook
    except Exception as error:  # nbformat passes on whatever its readers and its schema raise
        reason = " ".join(str(error).split())[:200]
        raise BadInput(f"report: {str(path)!r} is not a notebook: {type(error).__name__}: {reason}") from None


def _parameters_cell(notebook: nbformat.NotebookNode) -> nbformat.NotebookNode | None:
    tagged = (cell for cell in notebook.cells if cell.cell_type == "code")
    return next((cell for cell in tagged if "parameters" in cell.metadata.get("tags", [])), None)


def _declarations(source: str) -> Iterator[Parameter]:
    comments = {
        token.start[0]: token.string.lstrip("# ").strip()
        for token in tokenize.generate_tokens(io.StringIO(source).readline)
        if token.type == tokenize.COMMENT
    }
    for node in ast.parse(source).body:
        if isinstance(node, ast.AnnAssign) and isinstance(node.target, ast.Name) and node.value is not None:
            name, value = node.target.id, ast.literal_eval(node.value)
            annotation = _type_of(node.annotation)
        elif (
            isinstance(node, ast.Assign) and len(node.targets) == 1 and isinstance(node.targets[0], ast.Name)
        ):
            name, value = node.targets[0].id, ast.literal_eval(node.value)
            annotation = Any if value is None else type(value)
        else:
            raise ValueError(f"line {node.lineno} is neither")
        yield Parameter(name, annotation, value, comments.get(node.end_lineno or node.lineno, ""))


def _type_of(node: ast.expr) -> Any:
    """The type that an annotation writes, from its syntax tree alone: nothing in it is run."""
    if isinstance(node, ast.Name) and node.id in TYPES:
        return TYPES[node.id]
    if isinstance(node, ast.Constant) and node.value is None:
        return None
    if isinstance(node, ast.BinOp) and isinstance(node.op, ast.BitOr):
        return Union[_type_of(node.left), _type_of(node.right)]  # noqa: UP007  # a value, not an annotation
    if isinstance(node, ast.Subscript) and isinstance(node.value, ast.Name):
        inner = [
            _type_of(item)
            for item in (node.slice.elts if isinstance(node.slice, ast.Tuple) else [node.slice])
        ]
        if (node.value.id, len(inner)) in (("list", 1), ("dict", 2)):
            return list[inner[0]] if node.value.id == "list" else dict[inner[0], inner[1]]  # type: ignore[valid-type]
    raise ValueError(
        f"line {node.lineno}: {ast.unparse(node)[:80]!r} is no type of a parameter; write str, int, float, "
        "bool, list[...], dict[..., ...] or these with `| None`"
    )


def check(name_or_path: str | os.PathLike[str], parameters: Mapping[str, Any]) -> dict[str, Any]:
    """The parameters with their declared types; `BadInput` for an unknown name or a value of another type."""
    known = parameters_of(name_or_path)
    for name in parameters:
        if name not in known:
            raise unknown_name(f"parameter of {Path(name_or_path).stem}", name, known)
    return {name: known[name].accept(value) for name, value in parameters.items()}


def write_parameters(file: Path, parameters: Mapping[str, Any]) -> Path:
    """Write parameters as YAML that papermill, `workbench report --parameters` and `widgets.panel` read back
    identically.
    """
    with replacing(file, field="parameters") as draft:
        draft.write_text(
            yaml.safe_dump(dict(parameters), sort_keys=False, allow_unicode=True), encoding="utf-8"
        )
    return Path(file)


def reopen(
    kind: type[Instrument], source: str, fingerprint: str = "", progress: Progress | None = None, **data: str
) -> Any:
    """What an instrument of this kind works on: a subject, or the runs in a file.

    With a `fingerprint`, exactly that state of it (as a panel's Send to report asks) or `BadInput`. `data`,
    `text_column` and `label_column` are those of `workbench.subject`; empty ones are left out.
    """
    given: dict[str, Any] = {name: value for name, value in data.items() if value}
    if kind.on == "runs":
        if given:
            raise BadInput(
                f"{next(iter(given))}: the instrument {kind.name()} works on runs, which bring their own; "
                "leave it out"
            )

        from workbench.scaling.runs import Runs

        on: Any = Runs.open(source)
    else:
        import workbench
        from workbench.subjects.identity import saved_as

        on = workbench.subject(source, progress=progress, **given)
        if fingerprint and Path(source).is_dir() and saved_as(Path(source)) == fingerprint:
            on.adopt_fingerprint(fingerprint)
    if fingerprint and on.fingerprint != fingerprint:
        raise BadInput(
            f"subject: {source!r} has changed since these settings were written (fingerprint "
            f"{on.fingerprint}, not {fingerprint})"
        )
    return on


def render(
    name_or_path: str | os.PathLike[str],
    parameters: Mapping[str, Any] | None = None,
    out: str | os.PathLike[str] = "reports",
    *,
    show: Callable[[str, int, int], None] | None = None,
    timeout: float | None = None,
    overwrite: bool = False,
) -> ReportPaths:
    """Run a notebook with these parameters and export it.

    out : a folder (the files take the notebook's name) or the path of the .html file
        (the notebook lies beside it). An earlier report there is replaced, unless somebody has changed it;
        a file of somebody else's only with `overwrite`, and the notebook itself never.
    show : called with (what is being done, cells done, cells in all); default: a bar on the terminal.
    timeout : seconds a single cell may take; None: no limit.

    `BadInput` before anything starts when the request is wrong. A failing cell is no exception: the returned
    paths hold what was finished, and `.error` says in one line what happened.
    """
    source = find(name_or_path)
    # Defaults too: the report states every setting, and keeps its meaning when a default changes.
    values = {name: declared.default for name, declared in parameters_of(source).items()} | check(
        source, parameters or {}
    )
    place(out)
    out = Path(os.path.expanduser(out))
    html = out if out.suffix == ".html" and not os.path.isdir(out) else out / f"{source.stem}.html"
    if os.path.exists(html.parent) and not os.path.isdir(html.parent):
        raise BadInput(f"out: {str(html.parent)!r} is a file; give a folder")
    paths = ReportPaths(html.with_suffix(".ipynb"), html)
    if os.path.exists(paths.notebook) and paths.notebook.samefile(source):
        raise BadInput(
            f"out: the executed copy would replace the notebook {str(source)!r} that is to be run; "
            "give another folder"
        )
    for target in (paths.notebook, paths.html):
        check_target(target, overwrite=overwrite, folder=False)
    notebook, error = _execute(
        source, values, paths.notebook, show or TerminalBar(source.stem), timeout, overwrite
    )

    from workbench import export_html

    with replacing(paths.html, overwrite=overwrite) as draft:
        title = (
            f"{values['instrument']} on {Path(values['subject']).name}" if "instrument" in values else None
        )
        draft.write_text(export_html.page(notebook, title), encoding="utf-8")
    return ReportPaths(paths.notebook, paths.html, error)


def _execute(
    source: Path,
    values: dict[str, Any],
    target: Path,
    show: Callable[[str, int, int], None],
    timeout: float | None,
    overwrite: bool,
) -> tuple[nbformat.NotebookNode, str | None]:
    import papermill
    import papermill.log
    from nbclient.exceptions import CellTimeoutError, DeadKernelError
    from papermill.exceptions import PapermillExecutionError

    error = None
    logging.getLogger("asyncio").addFilter(_is_news)
    papermill.log.logger.setLevel(
        "ERROR"
    )  # it calls parameters of a type it cannot read unknown; `check` knows better
    with (
        scratch() as private,
        _told_to_end(),
        replacing(target, overwrite=overwrite) as draft,
    ):
        watch = _Watch(private / "progress", show)
        try:
            papermill.execute_notebook(
                _as_it_is(source),
                _as_it_is(draft),
                parameters=values,
                kernel_name="python3",
                language="python",
                kernel_manager_class=_kernel_manager(private, target.parent),
                engine_name=_engine(),
                watch=watch,
                store_widget_state=False,
                progress_bar=False,
                start_timeout=STARTED,
                execution_timeout=timeout,
            )
        except PapermillExecutionError as failure:
            text = f"{failure.ename}: {failure.evalue}".strip().rstrip(":")
            error = f"{source.stem} stopped in {watch.what!r}: {' '.join(text.split())}"
        except CellTimeoutError:
            error = f"{source.stem} stopped in {watch.what!r}: it took longer than {timeout:g} s"
        except DeadKernelError:
            error = f"{source.stem} stopped in {watch.what!r}: the kernel died (out of memory, or killed)"
        except RuntimeError as failure:
            if not str(failure).startswith("Kernel didn't respond"):
                raise
            raise BadInput(
                f"report: the kernel did not answer within {STARTED} s; try when there is less to do"
            ) from None
        except KeyboardInterrupt:
            error = f"{source.stem} stopped in {watch.what!r}: interrupted"
        finally:
            watch.close(error)
        if error and not draft.is_file():  # interrupted before the first cell
            raise KeyboardInterrupt
        notebook = nbformat.read(draft, 4)
        _tidy(notebook, source, target, error)
        nbformat.write(notebook, draft)
    return notebook, error


def _is_news(record: logging.LogRecord) -> bool:
    """Whether a message of asyncio says more than how a cell or a kernel ended that was interrupted."""
    said = record.getMessage()
    return not (said.startswith("Task exception was never retrieved") and "NotebookClient" in said)


@contextlib.contextmanager
def _told_to_end() -> Iterator[None]:
    """SIGTERM interrupts like Ctrl-C, so that what was finished is kept and the kernel ends."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return

    def interrupt(number: int, frame: Any) -> None:
        raise KeyboardInterrupt

    before = signal.signal(signal.SIGTERM, interrupt)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


def _as_it_is(path: Path) -> str:
    """A path for papermill, which takes braces for places to fill in, and a relative one for an address."""
    return str(path.resolve()).replace("{", "{{").replace("}", "}}")


def _tidy(notebook: nbformat.NotebookNode, source: Path, target: Path, error: str | None) -> None:
    """Drop papermill's banners and private paths; say in the metadata what stopped the run."""
    from workbench.export_html import PAPERMILL_MARKER

    notebook.cells = [
        cell for cell in notebook.cells if PAPERMILL_MARKER not in cell.metadata.get("tags", [])
    ]
    notebook.metadata.pop("widgets", None)
    notebook.metadata.setdefault("papermill", {}).update(
        input_path=source.name, output_path=target.name, stopped=error
    )


def _kernel_manager(private: Path, folder: Path) -> type:
    """A kernel manager for this interpreter, no registry of kernels asked.

    It talks over a unix socket in a private folder (TCP on loopback where paths are too long or there are
    none): no port can be taken by somebody else between choosing and binding it, and no other user can
    connect.
    """
    from jupyter_client.kernelspec import KernelSpec
    from jupyter_client.manager import AsyncKernelManager

    socket = str(private / "kernel")
    local = {} if os.name == "nt" or len(socket) > 90 else {"transport": "ipc", "ip": socket}
    environment = {**os.environ, **HEADLESS, "WORKBENCH_PROGRESS_FILE": str(private / "progress")}
    environment["WORKBENCH_REPORT_FOLDER"] = str(folder.resolve())

    class ThisInterpreter(AsyncKernelManager):
        def __init__(self, **traits: Any) -> None:
            super().__init__(**{**traits, **local, "connection_file": str(private / "connection.json")})

        @property
        def kernel_spec(self) -> KernelSpec:
            return KernelSpec(
                argv=[sys.executable, "-m", "workbench.commands.report_kernel", "-f", "{connection_file}"],
                display_name="Python 3",
                language="python",
                name="python3",
            )

        async def start_kernel(self, **options: Any) -> None:  # type: ignore[override]  # the base is declared synchronous
            await super().start_kernel(**{**options, "env": environment})

    return ThisInterpreter


def _engine() -> str:
    """Papermill's own engine, with our watcher told at each cell; registered under a name on first use."""
    from papermill.engines import NBClientEngine, papermill_engines

    class Engine(NBClientEngine):
        @classmethod
        def execute_managed_notebook(cls, nb_man: Any, kernel_name: str, **options: Any) -> None:
            watch: _Watch = options.pop("watch")
            begin = nb_man.cell_start

            def cell_start(cell: Any, index: int | None = None, **more: Any) -> None:
                watch.cell(nb_man.nb, index or 0)
                begin(cell, index, **more)

            nb_man.cell_start = cell_start
            super().execute_managed_notebook(nb_man, kernel_name, **options)

    papermill_engines.register("workbench", Engine)
    return "workbench"


class _Watch:
    """Tells `show` which section is running, and what the kernel says about its own progress."""

    def __init__(self, file: Path, show: Callable[[str, int, int], None]) -> None:
        self.what, self._done, self._total = "start", 0, 0
        self._file, self._show, self._ended = file, show, threading.Event()
        self._thread = threading.Thread(target=self._poll, daemon=True)
        self._thread.start()

    def cell(self, notebook: nbformat.NotebookNode, index: int) -> None:
        cells = notebook.cells
        for cell in cells[: index + 1]:
            if cell.cell_type == "markdown":
                for text in cell.source.splitlines():
                    if text.startswith("#"):
                        self.what = text.lstrip("# ").strip()
        self._done, self._total = index, len(cells)
        self._file.unlink(missing_ok=True)
        self._show(self.what, self._done, self._total)

    def _poll(self) -> None:
        last = ""
        while not self._ended.wait(0.3):
            with contextlib.suppress(OSError):
                text = self._file.read_text(encoding="utf-8").strip()
                if text and text != last:
                    last = text
                    self._show(f"{self.what}: {text}", self._done, self._total)

    def close(self, error: str | None) -> None:
        self._ended.set()
        self._thread.join()
        self._show("stopped" if error else "done", self._done if error else self._total, self._total)


class TerminalBar:
    """The default progress: one line that rewrites itself on a terminal; anywhere else one for each section,
    and every `OFTEN` seconds what is being done in it.
    """

    OFTEN: ClassVar[float] = 10.0

    def __init__(self, name: str) -> None:
        self.name, self._last = name, ""
        self._live = sys.stderr.isatty()
        self._said = -math.inf

    def __call__(self, what: str, done: int, total: int) -> None:
        ended = what in ("done", "stopped")
        if self._live:
            width = 24
            filled = width * done // max(total, 1)
            text = f"{self.name} [{'#' * filled}{'.' * (width - filled)}] {done}/{total} {what}"
            columns = os.get_terminal_size(sys.stderr.fileno()).columns
            print(f"\r\x1b[2K{text[: columns - 1]}", end="\n" if ended else "", file=sys.stderr, flush=True)
            return
        section, now = what.split(":")[0], time.monotonic()
        if section != self._last or now - self._said > self.OFTEN:
            said = what if section == self._last else section
            self._last, self._said = section, now
            print(f"{self.name} {done}/{total} {said}", file=sys.stderr, flush=True)
