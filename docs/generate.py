"""The documentation's source: the pages written by hand, and those that the code itself declares.

    python docs/generate.py build      # build/pages and build/zensical.toml
    zensical build -f build/zensical.toml

`generate(folder)` writes the API page of every name in a package's `__all__`, and the tables of instruments,
methods and axes from the live registries. Nothing is downloaded,
and no model is run unless examples are asked for.
"""

from __future__ import annotations

import argparse
import shutil
import tomllib
from pathlib import Path
from typing import Any

from markup import cell, code_cell, table, with_formulas
from reference import api_pages, packages
from registry_tables import axes_page, instruments_page, methods_page, subjects_page

import workbench

HERE = Path(__file__).parent
#: Reports that are run and shown as examples: page name -> notebook, parameters, what it shows.
EXAMPLES: dict[str, tuple[str, dict[str, Any], str]] = {
    "prune-digits-vit": (
        "instrument",
        {"instrument": "prune", "subject": "digits-vit", "settings": {"sparsity": 0.7}},
        (
            "One instrument, run without a screen: oBERT removes 70 % of the weights of a small vision "
            "transformer."
        ),
    ),
    "spectrum-digits-vit": (
        "spectrum",
        {"subject": "digits-vit"},
        (
            "The Hessian's spectrum of the same model before and after pruning, its layers, "
            "batches and learning rates."
        ),
    ),
}


def generate(folder: Path, examples: bool = False) -> dict[str, Path]:
    """Write the site's source into `folder` and return the API page of every public name
    (`package.name` -> file).
    """
    pages = folder / "pages"
    shutil.rmtree(pages, ignore_errors=True)
    shutil.copytree(HERE / "pages", pages)
    for page in pages.glob("*.md"):
        page.write_text(with_formulas(page.read_text(encoding="utf-8")), encoding="utf-8")
    for picture in HERE.glob("*.png"):
        shutil.copy(picture, pages / picture.name)
    (pages / "tables").mkdir()
    (pages / "tables" / "instruments.md").write_text(instruments_page(), encoding="utf-8")
    (pages / "tables" / "subjects.md").write_text(subjects_page(), encoding="utf-8")
    (pages / "tables" / "methods.md").write_text(methods_page(), encoding="utf-8")
    (pages / "tables" / "axes.md").write_text(axes_page(), encoding="utf-8")
    written = api_pages(pages / "api")
    if examples:
        run_examples(pages / "examples")
    (pages / "examples.md").write_text(examples_page(examples), encoding="utf-8")
    (folder / "zensical.toml").write_text(configuration(), encoding="utf-8")
    return written


def configuration() -> str:
    """`zensical.toml` with the reference in its navigation."""
    text = (HERE / "zensical.toml").read_text(encoding="utf-8")
    reference = ['{"Overview" = "api/index.md"}'] + [f'{{"{p}" = "api/{p}/index.md"}}' for p in packages()]
    found = text.replace('{"API" = []}', '{"API" = [' + ", ".join(reference) + "]}")
    tomllib.loads(found)
    return found


def run_examples(folder: Path) -> None:
    """Run the example reports and keep their pages."""
    from workbench import reports

    folder.mkdir()
    for page, (notebook, parameters, _) in EXAMPLES.items():
        done = reports.render(notebook, parameters, folder / page)
        if done.error:
            raise SystemExit(f"example {page}: {done.error}")
        done.html.rename(folder / f"{page}.html")
        shutil.rmtree(folder / page)


def examples_page(made: bool) -> str:
    rows = []
    for page, (notebook, parameters, about) in EXAMPLES.items():
        shown = f"[{page}](examples/{page}.html)" if made else page
        settings = ", ".join(f"{k}={v!r}" for k, v in parameters.items())
        rows.append((shown, f"`{notebook}`", code_cell(settings), cell(about)))
    head = ("report", "notebook", "parameters", "what it shows")
    return (
        "# Examples\n\n"
        "Each is a notebook of the project, run without a screen with `workbench report`; "
        "one file that needs no network."
        f"\n\n{table(head, rows)}\n"
    )


def main() -> None:
    parser = argparse.ArgumentParser(description="Write the documentation's source.")
    parser.add_argument("folder", type=Path)
    parser.add_argument(
        "--examples", action="store_true", help="run the example reports too (about a minute)"
    )
    space = parser.parse_args()
    written = generate(space.folder, space.examples)
    print(
        f"wrote {len(written)} API pages, {len(workbench.catalog())} instruments, "
        f"{len(workbench.methods())} methods"
    )


if __name__ == "__main__":
    main()
