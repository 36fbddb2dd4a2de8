"""The exported report in a browser that is cut off from everything:
figures are drawn, zoom, and turn with the theme.
"""

from __future__ import annotations

import json
from pathlib import Path

import nbformat
import numpy as np
import plotly.io as pio

from tests.browser.lab import browse
from workbench.export_html import PLOTLY_MIME, page
from workbench.figures import figure, heat, line

V4 = nbformat.v4


def write_report(path: Path) -> Path:
    curve = figure("Loss </script> & <b>sparsity</b>", x="sparsity", y="loss (nats)")
    line(curve, np.linspace(0, 1, 50), np.linspace(0, 1, 50) ** 2, "oBERT")
    grid = figure("Errors")
    heat(grid, np.arange(12.0).reshape(3, 4), unit="nats")
    outputs = [
        [V4.new_output("display_data", data={PLOTLY_MIME: json.loads(pio.to_json(fig))})]
        for fig in (curve, grid)
    ]
    book = V4.new_notebook(
        cells=[
            V4.new_markdown_cell("# Report\n\n## One\n\n$\\frac{1}{2}$\n\n## Two\n\n## Three"),
            *(V4.new_code_cell("code_here = 1", outputs=out) for out in outputs),
        ]
    )
    path.write_text(page(book), encoding="utf-8")
    return path


def test_figures_show_zoom_and_follow_the_theme_offline(tmp_path: Path) -> None:
    file = write_report(tmp_path / "report.html")
    with browse(offline=True, color_scheme="light") as watched:
        page = watched.page
        page.goto(file.as_uri())
        page.wait_for_function("() => document.documentElement.dataset.figures === 'drawn'")
        assert page.evaluate(
            "() => [...document.querySelectorAll('.figure')].map((f) => f._fullData.length)"
        ) == [1, 1]
        assert page.locator(".figure .main-svg").count() >= 2
        assert page.evaluate("() => document.querySelector('mfrac').getBoundingClientRect().height") > 5
        ink = page.evaluate("() => document.querySelector('.figure')._fullLayout.font.color")
        before = page.evaluate("() => document.querySelector('.figure')._fullLayout.xaxis.range.slice()")
        plot = page.locator(".figure").first.locator(".nsewdrag").first
        plot.scroll_into_view_if_needed()
        box = plot.bounding_box()
        assert box is not None
        page.mouse.move(box["x"] + 0.3 * box["width"], box["y"] + 40)
        page.mouse.down()
        page.mouse.move(box["x"] + 0.6 * box["width"], box["y"] + 40, steps=6)
        page.mouse.up()
        page.wait_for_function(
            "() => { const r = document.querySelector('.figure')._fullLayout.xaxis.range; "
            "return r[0] > 0.2 && r[1] < 0.7 }"
        )
        assert before[0] <= 0 and before[1] >= 1
        page.emulate_media(color_scheme="dark")
        page.wait_for_function(f"() => document.querySelector('.figure')._fullLayout.font.color !== '{ink}'")
        assert not page.get_by_text("code_here").first.is_visible()
        page.get_by_role("button", name="Show code").click()
        assert page.get_by_text("code_here").first.is_visible()
        assert watched.outside == [] and watched.errors == []


def test_foreign_script_does_not_run_even_unsanitised(tmp_path: Path) -> None:
    """The page's policy alone stops a script or a request that found its way into the file."""
    file = write_report(tmp_path / "report.html")
    hostile = (
        "<script>window.ran = true</script><img src='https://example.org/x.png' onerror='window.ran = "
        "true'></main>"
    )
    file.write_text(file.read_text().replace("</main>", hostile, 1))
    with browse() as watched:
        watched.page.goto(file.as_uri())
        watched.page.wait_for_function("() => document.documentElement.dataset.figures === 'drawn'")
        assert watched.page.evaluate("() => window.ran") is None
        # the browser announces the request it is about to stop
        assert watched.refused == {"https://example.org/x.png": "csp"} and set(watched.outside) == set(
            watched.refused
        )
        assert any("Content Security Policy" in error for error in watched.errors)
