"""Docstrings, formulas and tables as Markdown that means the same on the site."""

from __future__ import annotations

import html
import inspect
import re
from collections.abc import Iterable, Sequence
from typing import Any

from workbench.export_html import markdown


def table(head: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def code(text: str, language: str = "python") -> str:
    return f"```{language}\n{text}\n```"


def cell(text: str) -> str:
    """Text of a docstring as one line that is safe between the bars of a table."""
    return escaped(" ".join(text.split())).replace("|", "&#124;")


def code_cell(value: Any) -> str:
    """Code between the bars of a table."""
    text = html.escape(" ".join(str(value).split()), quote=False)
    return "<code>" + re.sub(r"[*_|`\\\[\]]", lambda m: f"&#{ord(m[0])};", text) + "</code>" if text else ""


def formula(latex: str) -> str:
    """LaTeX as MathML that Markdown leaves alone; a formula in plain text stays as it was written."""
    if not re.search(r"[\\{]", latex) and len(latex) > 1:
        return cell(latex)
    found = re.sub(r"</?p>\s*", "", markdown(f"${latex.strip()}$")).strip()
    return re.sub(r"[*_|`\\\[\]]", lambda m: f"&#{ord(m[0])};", " ".join(found.split()))


def with_formulas(text: str) -> str:
    """A page with its `$formulas$` as MathML; code is left alone."""
    code_or_formula = re.compile(r"^```.*?^```$|`[^`\n]+`|\$(?P<latex>[^$\n]+)\$", re.MULTILINE | re.DOTALL)
    return code_or_formula.sub(lambda m: formula(m["latex"]) if m["latex"] else m[0], text)


def escaped(text: str) -> str:
    """Docstrings are text with `code` in it; outside of code nothing is markup."""
    code_or_text = re.compile(r"(`+).+?\1(?!`)|[<*_]")
    return code_or_text.sub(lambda m: m[0] if m[1] else f"&#{ord(m[0])};", text)


def prose(text: str | None) -> str:
    """A docstring as Markdown: prose escaped, indented blocks and interpreter sessions as code,
    tables kept.
    """
    lines = inspect.cleandoc(text or "").splitlines()
    out: list[str] = []
    at = 0
    while at < len(lines):
        line = lines[at]
        if line.lstrip().startswith(">>>"):
            end = next((i for i in range(at, len(lines)) if not lines[i].strip()), len(lines))
            out += ["", "```pycon", *(each.strip(" ") if each.lstrip().startswith((">>>", "...")) else each
                                      for each in lines[at:end]), "```", ""]  # fmt: skip
        elif line.startswith("    ") and (at == 0 or not lines[at - 1].strip()):
            end = next(
                (i for i in range(at, len(lines)) if lines[i].strip() and not lines[i].startswith("    ")),
                len(lines),
            )
            block = inspect.cleandoc("\n".join(lines[at:end])).rstrip()
            out += ["", code(block, "python" if "(" in block else "text"), ""]
        else:
            out.append(line if line.startswith("|") else escaped(line))
            end = at + 1
        at = end
    return re.sub(r"\n{3,}", "\n\n", "\n".join(out)).strip()


def first_sentence(value: Any) -> str:
    about = inspect.getdoc(value) or ""
    if not callable(value) and about == (inspect.getdoc(type(value)) or ""):
        return ""
    return " ".join(about.split("\n\n")[0].split())
