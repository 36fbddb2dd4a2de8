"""The compression report's first three figures, hovered and clicked in the exported page without network."""

from __future__ import annotations

import json
from pathlib import Path

import nbformat
import plotly.io as pio
import pytest
import torch

import workbench
from tests.browser.lab import Watched, browse
from tests.test_notebooks import SMALL
from workbench import reports
from workbench.export_html import PLOTLY_MIME, page
from workbench.measures import TokenStrip

V4 = nbformat.v4


def touched(watched: Watched, title: str, mark: str, which: int = 0) -> tuple[str, str]:
    """(what hovering a mark of a figure shows, what stays below the figure after a click)."""
    seen = watched.page
    figure = seen.locator(".figure").filter(has_text=title)
    figure.scroll_into_view_if_needed()
    point = figure.locator(mark).nth(which)
    point.scroll_into_view_if_needed()
    box = point.bounding_box()
    assert box is not None
    place = (
        box["x"] + 0.3 * box["width"],
        box["y"] + box["height"] / 2,
    )  # a bar may have a marker in its middle
    seen.mouse.move(place[0] - 1, place[1])
    seen.mouse.move(*place)
    label = figure.locator(".hoverlayer .hovertext").first
    label.wait_for()
    shown = label.text_content() or ""
    seen.mouse.click(*place)
    said = figure.locator("xpath=following-sibling::pre[@class='picked']").first
    seen.wait_for_function("(said) => said.dataset.picked === 'yes'", arg=said.element_handle())
    return shown, said.inner_text()


@pytest.fixture(scope="module")
def report(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("report")
    done = reports.render("compress", SMALL["compress"], out)
    assert done.error is None, done.error
    return done.html


def test_front_budget_and_strip_come_first_and_answer(report: Path) -> None:
    with browse(offline=True, height=1200) as watched:
        watched.page.goto(report.as_uri())
        watched.page.wait_for_function("() => document.documentElement.dataset.figures === 'drawn'")
        titles = watched.page.evaluate(
            "() => [...document.querySelectorAll('.figure')].map((f) => f.getAttribute('aria-label'))"
        )
        first = ("The same model?", "Which part broke it?", "answers flipped")
        assert all(words in title for words, title in zip(first, titles, strict=False)), titles
        kind = "() => document.querySelector('.figure')._fullLayout.yaxis.type"
        assert watched.page.evaluate(kind) == "log"
        shown, said = touched(watched, first[0], ".scatterlayer .point", 1)
        assert "magnitude" in shown and said.startswith("workbench run prune --")
        shown, said = touched(watched, first[1], ".barlayer .point")
        assert "of the sum" in shown and "95 % interval" in said
        shown, said = touched(watched, first[2], ".barlayer .point")
        assert "reference" in shown and "KL" in said
        assert watched.outside == [] and watched.errors == []


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_a_language_models_strip_shows_both_models_words(scheme: str, tmp_path: Path) -> None:
    trained = workbench.subject("bytelm")
    dense = trained.with_split("test", {k: v[:2, :200] for k, v in trained.split("test").items()})
    changed = dense.copy()
    with torch.no_grad():
        for layer in changed.layers():
            layer.write(layer.weight.mul(8).round().div(8))
    figure = TokenStrip(changed="at hand").between(dense, changed).figure()
    drawn = V4.new_output("display_data", data={PLOTLY_MIME: json.loads(pio.to_json(figure))})
    book = V4.new_notebook(cells=[V4.new_code_cell("strip", outputs=[drawn])])
    file = tmp_path / "strip.html"
    file.write_text(page(book), encoding="utf-8")
    with browse(offline=True, color_scheme=scheme) as watched:
        watched.page.goto(file.as_uri())
        watched.page.wait_for_function("() => document.documentElement.dataset.figures === 'drawn'")
        assert watched.page.locator(".barlayer .point").count() == 200
        shown, said = touched(watched, "differs from", ".barlayer .trace:nth-child(2) .point", 40)
        assert "KL" in shown and said.count("\n") == 7 and "probability of it" in said
        assert watched.outside == [] and watched.errors == []
