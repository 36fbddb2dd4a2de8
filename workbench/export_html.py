"""An executed notebook as one HTML file that needs nothing else: no network, no server, no kernel.

`page(notebook)` returns the file's text. What makes it self-contained and safe to pass on:

- plotly.js is embedded once, gzipped (1.5 MB instead of 4.8), and unpacked by the browser
  (`DecompressionStream`); the figures stay data until then. Formulas become MathML. Figures and text follow
  the reader's light or dark setting and turn dark-on-light for printing.
- A content security policy in the page forbids every request, and every script but the page's own
  (named by their SHA-256), so that nothing from a data set, a file name or an error message can run. Outputs
  are sanitised besides; raw HTML in Markdown is shown as text.
- Code is folded away but there; progress bars, kernel state of widgets and ANSI colours are left out.
"""

from __future__ import annotations

import base64
import binascii
import functools
import gzip
import hashlib
import html
import importlib.metadata
import json
import math
import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import mistune
import nh3
from latex2mathml.converter import convert_to_element
from nbformat import NotebookNode
from plotly.offline import get_plotlyjs
from pygments import highlight
from pygments.formatters import HtmlFormatter
from pygments.lexers import PythonLexer

PLOTLY_MIME = "application/vnd.plotly.v1+json"
WIDGET_MIME = "application/vnd.jupyter.widget-view+json"
PAPERMILL_MARKER = "papermill-error-cell-tag"
HIDDEN_TAGS = {"parameters", "injected-parameters", "hide-in-report", PAPERMILL_MARKER}

_HERE = Path(__file__).parent
_STYLE = (_HERE / "report_page.css").read_text(encoding="utf-8")
_SCRIPT = "".join(
    (_HERE / part).read_text(encoding="utf-8") for part in ("figures/selection.js", "report_page.js")
)

_TAGS = set(
    "a abbr acronym b blockquote code em i li ol strong ul "
    "table thead tbody tfoot tr th td caption colgroup col div span p pre br hr h1 h2 h3 h4 h5 h6 dl dt dd "
    "figure figcaption "
    "details summary sub sup small s u kbd samp var mark meter progress img".split()
)
_ATTRIBUTES = {
    "*": {"class", "style", "title", "scope", "role", "aria-label", "lang"},
    "a": {"href"},
    "td": {"colspan", "rowspan", "align"},
    "th": {"colspan", "rowspan", "align"},
    "meter": {"min", "max", "value"},
    "progress": {"max", "value"},
    "img": {"src", "alt", "width", "height"},
    "details": {"open"},
}
_STYLES = {"text-align", "width", "color", "font-weight", "white-space"}
_LINKS = {"http", "https", "mailto"}
_MATHML_ATTRIBUTES = set(
    "xmlns display displaystyle scriptlevel mathvariant mathsize mathcolor mathbackground stretchy "
    "symmetric fence form "
    "separator largeop movablelimits accent accentunder linethickness lspace rspace minsize maxsize width "
    "height depth "
    "voffset notation frame rowlines rowspacing rowalign columnlines columnspacing columnalign columnspan "
    "rowspan side".split()
)
_PICTURES = {"image/png": b"\x89PNG\r\n\x1a\n", "image/jpeg": b"\xff\xd8\xff"}
_ANSI = re.compile(r"\x1b\[[0-9;?]*[A-Za-z]")
_PROGRESS_LINE = re.compile(r"^.*\d+%\|.*\|.*$")


def page(notebook: NotebookNode, title: str | None = None) -> str:
    """The whole HTML document of an executed notebook.

    Title: the argument, else the notebook's first level-1 heading, else "Report". Parameters, times
    and the state of the run are read from the metadata papermill leaves.
    """
    body, headings, found_title = _body(notebook)
    title = title or found_title or "Report"
    has_figures = "data-figure=" in body
    plotly, plotly_hash = _plotly() if has_figures else ("", "")
    scripts = [_hash(_SCRIPT)] + ([plotly_hash] if has_figures else [])
    policy = (
        f"default-src 'none'; script-src {' '.join(scripts)}; style-src 'unsafe-inline'; img-src data: "
        "blob:; "
        "font-src data:; base-uri 'none'; form-action 'none'"
    )
    packed = (
        f'<script type="application/octet-stream" id="plotly-gz">{plotly}</script>' if has_figures else ""
    )
    return (
        '<!DOCTYPE html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        f'<meta http-equiv="Content-Security-Policy" content="{policy}">\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        '<meta name="color-scheme" content="light dark">\n'
        f"<title>{html.escape(title)}</title>\n<style>\n{_STYLE}</style>\n</head>\n<body>\n"
        f"{_header(notebook, title, headings)}\n<main>\n{body}</main>\n{packed}\n"
        f"<script>{_SCRIPT}</script>\n</body>\n</html>\n"
    )


def sanitize(markup: str) -> str:
    """`markup` with everything that could run, load or restyle the page taken out;
    tables and text formatting stay.
    """
    return nh3.clean(
        markup,
        tags=_TAGS,
        clean_content_tags={"script", "style"},
        attributes=_ATTRIBUTES,
        attribute_filter=_kept,
        url_schemes=_LINKS | {"data"},
        filter_style_properties=_STYLES,
    )


def _kept(tag: str, name: str, value: str) -> str | None:
    """Pictures come with the page, links leave it: a picture is data, a link never is."""
    if tag == "img" and name == "src":
        return value if value.startswith("data:image/") else None
    if name == "href" and re.match(r"\s*data:", value, re.IGNORECASE):
        return None
    return value


def markdown(text: str) -> str:
    """Markdown (with tables, footnotes, strikethrough and `$math$`) as HTML; raw HTML in it is escaped."""
    return str(_markdown()(text))


class _Renderer(mistune.HTMLRenderer):
    def block_math(self, text: str) -> str:
        return _mathml(text, "block")

    def inline_math(self, text: str) -> str:
        return _mathml(text, "inline")

    def image(self, text: str, url: str, title: str | None = None) -> str:
        if url.startswith("data:image/"):
            return f'<img src="{html.escape(url)}" alt="{html.escape(text)}">'
        return super().link(text or url, url, title)  # a report loads nothing from anywhere


@functools.cache
def _markdown() -> mistune.Markdown:
    return mistune.create_markdown(
        renderer=_Renderer(escape=True), plugins=["table", "strikethrough", "math", "footnotes", "url"]
    )


def _mathml(latex: str, display: str) -> str:
    try:
        formula = convert_to_element(latex.strip(), display=display)
    except Exception:
        return f"<code>{html.escape(latex.strip())}</code>"
    for element in formula.iter():  # the converter leaves text and attributes as they were typed
        element.text = html.unescape(element.text) if element.text else element.text
        for name in set(element.attrib) - _MATHML_ATTRIBUTES:
            if name != "href" or not _leads_out(element.attrib[name]):
                del element.attrib[name]
    return ElementTree.tostring(formula, encoding="unicode")


def _leads_out(address: str) -> bool:
    scheme, colon, _ = address.partition(":")
    return bool(colon) and scheme.strip().lower() in _LINKS


@functools.cache
def _plotly() -> tuple[str, str]:
    code = get_plotlyjs()
    packed = gzip.compress(code.encode("utf-8"), 9, mtime=0)
    return base64.b64encode(packed).decode("ascii"), _hash(code)


def _hash(script: str) -> str:
    return f"'sha256-{base64.b64encode(hashlib.sha256(script.encode('utf-8')).digest()).decode('ascii')}'"


def _body(notebook: NotebookNode) -> tuple[str, list[tuple[str, str]], str | None]:
    """Returns the cells' HTML, the level-2 headings as (anchor, text), and the first level-1 heading,
    which is taken out.
    """
    parts: list[str] = []
    headings: list[tuple[str, str]] = []
    title: str | None = None
    failed = False
    figures = iter(range(10**9))
    for cell in notebook.cells:
        tags = set(cell.metadata.get("tags", []))
        if tags & HIDDEN_TAGS:
            continue
        if cell.cell_type == "markdown":
            source = cell.source
            heading = re.match(r"\s*#\s+(.+)\n?", source)
            if title is None and heading:
                title, source = heading.group(1).strip(), source[heading.end() :]
            parts.append(f'<section class="prose">{_anchored(markdown(source), headings)}</section>\n')
        elif cell.cell_type == "code" and not failed:
            outputs = "".join(_output(output, figures) for output in cell.get("outputs", []))
            parts.append(f'<section class="cell">{_code(cell.source)}{outputs}</section>\n')
            failed = any(output.output_type == "error" for output in cell.get("outputs", []))
            if failed:
                parts.append(
                    '<p class="failure">The run stopped here; the sections below have no results.</p>\n'
                )
    return "".join(parts), headings, title


def _anchored(markup: str, headings: list[tuple[str, str]]) -> str:
    def add(match: re.Match[str]) -> str:
        text = re.sub(r"<[^>]+>", "", match.group(1))
        anchor = f"section-{len(headings) + 1}"
        headings.append((anchor, text))
        return f'<h2 id="{anchor}">{match.group(1)}</h2>'

    return re.sub(r"<h2>(.*?)</h2>", add, markup)


def _code(source: str) -> str:
    if not source.strip():
        return ""
    marked = highlight(source, PythonLexer(), HtmlFormatter(nowrap=True, classprefix="py-"))
    return f'<details class="code"><summary>Code</summary><pre><code>{marked}</code></pre></details>\n'


def _output(output: NotebookNode, figures: Iterator[int]) -> str:
    if output.output_type == "error":
        trace = html.escape(_ANSI.sub("", "\n".join(output.get("traceback", []))))
        return (
            f'<div class="failure" role="alert"><strong>{html.escape(output.ename)}</strong>: '
            f"{html.escape(output.evalue)}"
            f"<details><summary>Where it happened</summary><pre>{trace}</pre></details></div>\n"
        )
    if output.output_type == "stream":
        text = settled(output.text)
        return f'<pre class="{html.escape(output.name)}">{html.escape(text)}</pre>\n' if text else ""
    data: Mapping[str, Any] = output.get("data", {})
    parts = []
    if PLOTLY_MIME in data:
        parts.append(_figure(data[PLOTLY_MIME], next(figures)))
    for kind in _PICTURES:
        picture = _picture(kind, _joined(data.get(kind, "")))
        if picture:
            alt = html.escape(_first_line(data.get("text/plain", "image")))
            parts.append(f'<img src="data:{kind};base64,{picture}" alt="{alt}">\n')
            break
    if "text/html" in data and "<script" not in _joined(data["text/html"]):
        parts.append(f'<div class="html">{sanitize(_joined(data["text/html"]))}</div>\n')
    elif not parts and "text/markdown" in data:
        parts.append(f'<div class="prose">{markdown(_joined(data["text/markdown"]))}</div>\n')
    elif not parts and "text/latex" in data:
        parts.append(f"<p>{_mathml(_joined(data['text/latex']).strip().strip('$'), 'block')}</p>\n")
    elif not parts and "text/plain" in data and WIDGET_MIME not in data:
        parts.append(f"<pre>{html.escape(_ANSI.sub('', _joined(data['text/plain'])))}</pre>\n")
    return "".join(parts)


def _picture(kind: str, text: str) -> str:
    """`text` without white space if it is base64 of a picture of this kind, else nothing."""
    packed = "".join(text.split())
    try:
        content = base64.b64decode(packed, validate=True)
    except (binascii.Error, ValueError):
        return ""
    return packed if content.startswith(_PICTURES[kind]) else ""


def _joined(value: str | list[str]) -> str:
    return value if isinstance(value, str) else "".join(value)


def _first_line(value: str | list[str]) -> str:
    return _joined(value).strip().split("\n", 1)[0][:200]


def _figure(figure: Mapping[str, Any], number: int) -> str:
    content = {key: figure[key] for key in ("data", "layout", "config") if key in figure}
    # A "<" in the data could otherwise end the script element early.
    payload = json.dumps(_finite(content), separators=(",", ":"), allow_nan=False).replace("<", "\\u003c")
    layout = figure.get("layout") or {}
    title = layout.get("title") or {}
    meta = layout.get("meta")
    told = str(meta.get("alt") or "") if isinstance(meta, Mapping) else ""
    words = told or (title if isinstance(title, str) else title.get("text")) or "figure"
    label = re.sub(r"<[^>]+>", " ", words)
    return (
        f'<div id="figure-{number}" class="figure" role="group" aria-roledescription="figure" '
        f'aria-label="{html.escape(label)}"></div>'
        f'<script type="application/json" data-figure="figure-{number}">{payload}</script>\n'
    )


def _finite(value: Any) -> Any:
    """JSON has no NaN or infinity; Plotly draws null as a gap."""
    if isinstance(value, Mapping):
        return {key: _finite(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_finite(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def settled(text: str | list[str]) -> str:
    """What a terminal would show in the end: carriage returns overwrite,
    ANSI codes and progress bars are gone.
    """
    lines = [
        line.rsplit("\r", 1)[-1] for line in _ANSI.sub("", _joined(text)).replace("\r\n", "\n").split("\n")
    ]
    return "\n".join(line for line in lines if not _PROGRESS_LINE.match(line)).strip("\n")


def _header(notebook: NotebookNode, title: str, headings: list[tuple[str, str]]) -> str:
    run = notebook.metadata.get("papermill", {})
    parameters = dict(run.get("parameters", {}))
    facts = []
    facts += [
        (name.capitalize(), str(parameters[name]))
        for name in ("instrument", "subject", "runs")
        if parameters.get(name)
    ]
    if run.get("start_time"):
        when = str(run["start_time"])[:16].replace("T", " ") + " UTC"
        seconds = run.get("duration")
        facts.append(("Made", when + (f", in {_duration(seconds)}" if seconds else "")))
    facts.append(("Made with", ", ".join(f"{name} {version}" for name, version in versions().items())))
    rows = "".join(f"<div><dt>{html.escape(k)}</dt><dd>{html.escape(v)}</dd></div>" for k, v in facts)
    settings = ""
    if parameters:
        cells = "".join(
            f"<tr><th scope='row'>{html.escape(str(k))}</th><td><code>{html.escape(repr(v))}</code></td></tr>"
            for k, v in parameters.items()
        )
        settings = f"<details class='settings'><summary>Settings</summary><table>{cells}</table></details>"
    links = "".join(f'<li><a href="#{anchor}">{text}</a></li>' for anchor, text in headings)
    contents = f'<nav aria-label="Contents"><ol>{links}</ol></nav>' if len(headings) > 2 else ""
    failure = ""
    stopped = run.get("stopped") or next((f"{o.ename}: {o.evalue}" for o in _errors(notebook)), None)
    if stopped:
        failure = (
            f'<p class="failure" role="alert">This report is incomplete: {html.escape(stopped)}. '
            "Everything before the failing step is below.</p>"
        )
    return (
        f"<header><h1>{_markdown_inline(title)}</h1>{failure}<dl>{rows}</dl>{settings}{contents}"
        '<p class="tools"><button type="button" id="toggle-code" aria-pressed="false">Show '
        "code</button></p></header>"
    )


def _errors(notebook: NotebookNode) -> Iterator[NotebookNode]:
    return (
        output
        for cell in notebook.cells
        for output in cell.get("outputs", [])
        if output.output_type == "error"
    )


def _markdown_inline(text: str) -> str:
    return re.sub(r"^<p>(.*)</p>\s*$", r"\1", markdown(text).strip(), flags=re.DOTALL)


def _duration(seconds: float) -> str:
    return f"{seconds:.0f} s" if seconds < 120 else f"{seconds / 60:.0f} min"


def versions() -> dict[str, str]:
    """Versions of the packages a result depends on, those installed among them."""
    found = {}
    for name in ("model-workbench", "torch", "transformers", "plotly"):
        try:
            found[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
    return found
