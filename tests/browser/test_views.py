"""The two views in a bare page: their real JavaScript and real pixels,
with a model written in place of the kernel's.
"""

from __future__ import annotations

import base64
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from playwright.sync_api import expect as playwright_expect

import widgets
from tests.browser.lab import Watched
from widgets.bitmap import Bitmap
from widgets.plot import PlotView, _gzipped_plotly, packed
from workbench.figures import by_layer, figure, heat, line

SOURCES = Path(widgets.__file__).parent
SCRIPTS = {"plot.js": PlotView._esm, "bitmap.js": Bitmap._esm}

# What a widget's view sees of the kernel: named values with change events.
MOUNT = """async ([state, source, library]) => {
  const decode = (v) => v && v.base64 !== undefined \
? new DataView(Uint8Array.from(atob(v.base64), (c) => c.charCodeAt(0)).buffer)
    : Array.isArray(v) ? v.map(decode) : v && v.constructor === Object \
? Object.fromEntries(Object.entries(v).map(([k, x]) => [k, decode(x)])) : v;
  const values = decode(state), listeners = {};
  window.saved = 0;
  window.model = {
    get: (name) => values[name], set: (name, value) => { values[name] = value; }, save_changes: () => { \
window.saved += 1; },
    on: (event, f) => (listeners[event] ??= []).push(f), off: (event, f) => { \
listeners[event] = (listeners[event] ?? []).filter((g) => g !== f); },
    widget_manager: { get_model: async () => ({ get: () => decode(library) }) },
  };
  window.receive = (update) => { for (const [k, v] of Object.entries(decode(update))) values[k] = v;
    for (const k of Object.keys(update)) (listeners['change:' + k] ?? []).forEach((f) => f()); };
  window.listening = () => Object.values(listeners).flat().length;
  window.el = document.createElement('div');
  document.body.append(window.el);
  const module = await import(URL.createObjectURL(new Blob([source], { type: 'text/javascript' })));
  window.cleanup = await module.default.render({ model: window.model, el: window.el });
}"""


def wire(value: Any) -> Any:
    """Bytes as base64, for `evaluate`."""
    if isinstance(value, (bytes, memoryview)):
        return {"base64": base64.b64encode(value).decode()}
    if isinstance(value, dict):
        return {key: wire(item) for key, item in value.items()}
    return [wire(item) for item in value] if isinstance(value, list) else value


def mount(
    watched: Watched, view: str, state: dict[str, Any], library: bytes = b"", theme: str = "true"
) -> None:
    watched.page.set_content(
        f"<body data-jp-theme-light='{theme}' "
        f"style='width:900px;margin:0'><style>{(SOURCES / 'workbench.css').read_text()}</style></body>"
    )
    watched.page.evaluate(MOUNT, [wire(state), SCRIPTS[view], wire(library)])


def bitmap_state(*arguments: Any, **options: Any) -> dict[str, Any]:
    made = Bitmap(*arguments, **options)
    names = ("cells", "palette", "rows", "columns", "kind", "low", "high", "label", "unit", "height")
    return {name: getattr(made, name) for name in names}


def test_bitmap_draws_cells_zooms_moves_and_reads_out(watched: Watched) -> None:
    matrix = np.zeros((30, 40), bool)
    matrix[:, 20:] = True
    mount(watched, "bitmap.js", bitmap_state(matrix, "right half", height=300))
    page = watched.page

    def pixel(x: float, y: float) -> list[int]:
        return page.evaluate(
            "([x, y]) => { const c = el.querySelector('canvas'); return "
            "[...c.getContext('2d').getImageData(x * c.width, y * c.height, 1, 1).data] }",
            [x, y],
        )

    assert page.evaluate("() => el.querySelector('canvas').clientWidth") == 898
    # 40 x 30 cells in 898 x 300 pixels: the picture is 400 wide
    assert pixel(0.1, 0.5)[3] == 0 and pixel(0.4, 0.5) == [0, 114, 178, 255] and pixel(0.8, 0.5)[3] == 0
    canvas = page.locator("canvas")
    canvas.hover(position={"x": 255, "y": 105})
    assert "row 10, column 25: set" in page.locator(".wb-bitmap-status").inner_text()
    canvas.focus()
    for key in ("ArrowLeft", "Shift+ArrowLeft", "ArrowDown"):
        page.keyboard.press(key)
    assert "row 11, column 15: empty" in page.locator(".wb-bitmap-status").inner_text()
    page.keyboard.press("+")
    assert page.evaluate("() => +el.dataset.zoom") == 1.25
    page.keyboard.press("0")
    assert page.evaluate("() => +el.dataset.zoom") == 1
    canvas.hover(position={"x": 100, "y": 100})
    page.mouse.wheel(0, -100)
    page.wait_for_function("() => +el.dataset.zoom === 1.25")
    page.keyboard.press("0")
    box = canvas.bounding_box()
    assert box is not None
    page.keyboard.down("Shift")
    page.mouse.move(box["x"] + 200, box["y"] + 50)
    page.mouse.down()
    page.mouse.move(box["x"] + 290, box["y"] + 80, steps=3)
    page.mouse.up()
    page.keyboard.up("Shift")
    assert page.evaluate("() => +el.dataset.zoom") > 4  # a box of 90 x 30 pixels in 898 x 300
    assert canvas.get_attribute("aria-label", timeout=1000).startswith("right half, 30 rows by 40 columns")  # type: ignore[union-attr]


def test_bitmap_shows_the_next_matrix_and_lays_tall_ones_down(watched: Watched) -> None:
    mount(watched, "bitmap.js", bitmap_state(np.linspace(-1, 1, 1200).reshape(30, 40), "ramp", unit="nats"))
    page = watched.page
    assert page.locator(".wb-bitmap-scale").inner_text().split() == ["-1", "1", "nats"]
    canvas = page.locator("canvas")
    canvas.focus()
    page.keyboard.press("ArrowUp")
    assert "row 0, column 0: -1 nats" in page.locator(".wb-bitmap-status").inner_text()
    tall = np.full((2000, 50), np.nan)
    tall[1999, 49] = 3.5
    page.evaluate("(state) => receive(state)", wire(bitmap_state(tall, "one cell", low=0.0, high=7.0)))
    status = page.locator(".wb-bitmap-status")
    page.wait_for_function("() => el.querySelector('.wb-bitmap-status').textContent.includes('2000')")
    assert "rows run left to right" in status.inner_text()
    for _ in range(12):
        page.keyboard.press("Shift+ArrowRight")
    for _ in range(60):
        page.keyboard.press("ArrowDown")
    assert "row 1999, column 49: 3.5" in status.inner_text()
    page.evaluate("() => cleanup()")
    assert page.evaluate("() => listening()") == 0


@pytest.mark.parametrize("rows", [1000, 5000])  # the second needs two tiles
def test_bitmap_of_millions_of_cells(watched: Watched, rows: int) -> None:
    cells = np.zeros((rows, 2000), bool)
    cells[-1, -1] = True
    mount(watched, "bitmap.js", bitmap_state(cells, "large", height=600))
    watched.page.locator("canvas").focus()
    for _ in range(11):
        watched.page.keyboard.press("Shift+ArrowRight")
        watched.page.keyboard.press("Shift+ArrowDown")
    for _ in range(14 if rows == 5000 else 0):
        watched.page.keyboard.press("Shift+ArrowRight")
        watched.page.keyboard.press("Shift+ArrowDown")
    assert f"row {rows - 1}, column 1999: set" in watched.page.locator(".wb-bitmap-status").inner_text()


def plot_state(view: PlotView) -> dict[str, Any]:
    return {
        "spec": packed(view.spec),
        "revision": view.revision,
        "alt": view.alt,
        "library": "IPY_MODEL_x",
        "library_version": "test",
    }


def test_plot_draws_binary_arrays_follows_the_theme_and_keeps_the_last_state(watched: Watched) -> None:
    fig = figure("Five squares", x="x", y="y")
    line(fig, np.arange(5), np.arange(5, dtype=np.float32) ** 2, "squares")
    heat(fig, np.arange(6.0).reshape(2, 3), xaxis="x2", yaxis="y2")
    view = PlotView(fig)
    mount(watched, "plot.js", plot_state(view), _gzipped_plotly())
    page = watched.page
    page.wait_for_selector(".main-svg")
    full = "el.querySelector('.wb-plot-figure')._fullData"
    assert page.evaluate(f"() => [...{full}[0].y]") == [0, 1, 4, 9, 16]
    assert page.evaluate(f"() => {full}[1].z.map((row) => [...row])") == [[0, 1, 2], [3, 4, 5]]
    assert page.get_by_role("group").get_attribute("aria-label") == "Five squares"
    page.evaluate(
        "() => { document.body.style.setProperty('--jp-ui-font-color1', 'rgb(250, 250, 250)'); "
        "document.body.dataset.jpThemeLight = 'false' }"
    )
    page.wait_for_function(
        "() => el.querySelector('.wb-plot-figure')._fullLayout.font.color === 'rgb(250, 250, 250)'"
    )
    # a burst of states, all but the last outdated before they can be drawn
    updates = []
    for revision in range(1, 21):
        fig = figure("Burst")
        line(fig, [0, 1], [revision, 0], "curve")
        updates.append(wire({"spec": packed(PlotView(fig).spec), "revision": revision}))
    page.evaluate("(updates) => updates.forEach(receive)", updates)
    page.wait_for_function("() => el.dataset.revision === '20'")
    assert page.evaluate(f"() => {full}[0].y[0]") == 20
    page.evaluate("() => { document.body.style.width = '500px' }")
    page.wait_for_function("() => el.querySelector('.wb-plot-figure')._fullLayout.width === 500")
    page.evaluate("() => cleanup()")
    assert page.evaluate("() => listening()") == 0


def test_layers_are_walked_with_the_keys_clicked_and_marked_in_every_figure(watched: Watched) -> None:
    names = [f"m.layers.{block}.{role}" for block in range(12) for role in ("q", "k", "v")]
    view = PlotView(by_layer("Error", names, {"error": np.arange(1.0, 37.0)}, "nats"))
    mount(watched, "plot.js", plot_state(view), _gzipped_plotly())
    page = watched.page
    page.wait_for_selector(".main-svg")
    plot = page.get_by_role("group", name="Error. error of 36 layers: largest 36 (m.layers.11.v)")
    plot.focus()
    said = page.get_by_role("status")
    for key, layer in (("ArrowDown", "0.q"), ("ArrowDown", "0.k"), ("ArrowRight", "1.k"), ("End", "11.v")):
        page.keyboard.press(key)
        playwright_expect(said).to_contain_text(f"m.layers.{layer}; error: ")
    marks = "el.querySelector('.wb-plot-figure')._fullLayout.shapes.map((s) => [s.x0, s.x1, s.y0, s.y1])"
    assert page.evaluate(f"() => {marks}") == [[10.5, 11.5, 1.5, 2.5]]
    page.keyboard.press("Enter")
    assert page.evaluate("() => model.get('clicked').layer") == "m.layers.11.v"
    plot.hover()
    with page.expect_download() as download:
        page.locator("[data-title='Download the numbers as CSV']").click()
    lines = Path(download.value.path()).read_text().splitlines()
    assert lines[0] == "trace,layer,x,y,value" and len(lines) == 37
    assert "error,m.layers.11.v,11,v,36" in lines
    assert not page.locator("[data-title*='Share'], [data-title*='loud']").count()
    # another figure of the page, which shows the same layers as rows
    rows = by_layer("Few", names[-6:], {"share": np.linspace(0.1, 0.6, 6)}, "share", between=(0, 1))
    page.evaluate("(update) => receive(update)", wire({"spec": packed(PlotView(rows).spec), "revision": 1}))
    page.wait_for_function("() => el.dataset.revision === '1'")
    assert page.evaluate(f"() => {marks}") == [[0, 1, 4.5, 5.5]]
    page.locator(".barlayer .point path").first.click(force=True)
    page.wait_for_function("() => model.get('clicked').layer === 'm.layers.10.q'")
    playwright_expect(said).to_have_text("m.layers.10.q; share: 0.1")


def test_an_empty_plot_takes_no_room_until_it_has_a_figure(watched: Watched) -> None:
    mount(watched, "plot.js", plot_state(PlotView()), _gzipped_plotly())
    page = watched.page
    assert page.evaluate("() => el.hidden")
    fig = figure("Now")
    line(fig, [0, 1], [0, 1], "a")
    page.evaluate("(update) => receive(update)", wire({"spec": packed(PlotView(fig).spec), "revision": 1}))
    page.wait_for_function("() => el.dataset.revision === '1' && !el.hidden && el.clientHeight > 300")
