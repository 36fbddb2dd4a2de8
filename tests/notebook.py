"""Small notebooks for tests, written in place."""

from __future__ import annotations

from pathlib import Path

import nbformat


def write(path: Path, *cells: str, parameters: str | None = None) -> Path:
    """A notebook whose cells are code, or Markdown when they start with '#md ';
    `parameters` becomes the tagged cell.
    """
    book = nbformat.v4.new_notebook(
        metadata={"kernelspec": {"name": "python3", "display_name": "Python 3", "language": "python"}}
    )
    if parameters is not None:
        book.cells.append(nbformat.v4.new_code_cell(parameters, metadata={"tags": ["parameters"]}))
    for source in cells:
        if source.startswith("#md "):
            book.cells.append(nbformat.v4.new_markdown_cell(source[4:]))
        else:
            book.cells.append(nbformat.v4.new_code_cell(source))
    nbformat.write(book, path)
    return path
