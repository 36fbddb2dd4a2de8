"""Milliseconds from a key pressed on a view's slider to the new figure painted, in a real JupyterLab in headless Chromium.

    python -m tests.benchmarks.bench_panel_latency

Measured in the page: from the keydown event until the figure is updated, and until it has been on the screen for two frames. The
way is page, server, kernel, `Result.figure`, kernel, server, page, Plotly. Prints the median of 21 presses and how long the
kernel's own part (`Result.figure` and packing) takes.
"""

from __future__ import annotations

import os
import statistics
import tempfile
from pathlib import Path

from tests.browser.lab import browse, open_notebook, run_all, serve
from tests.notebook import write

PANEL = """\
import time, widgets, workbench
from workbench.curvature import Spectrum
panel = widgets.panel(Spectrum, workbench.subject("digits-vit"), probes=2, steps=8, examples=64)
panel.job.start(); panel.job.wait()
panel"""
KERNEL = """\
from widgets.plot import packed
times = []
for _ in range(21):
    began = time.perf_counter()
    packed(widgets.PlotView(panel.result.figure(**panel.view)).spec)
    times.append(1e3 * (time.perf_counter() - began))
print("KERNEL", sorted(times)[10])"""
WATCH = """() => {
  const plot = document.querySelector('.wb-plot'); window.delays = []; window.updated = []; window.drawing = [];
  document.addEventListener('keydown', () => {
    const began = performance.now();
    const watch = new MutationObserver(() => {
      watch.disconnect(); window.updated.push(performance.now() - began);
      requestAnimationFrame(() => requestAnimationFrame(() => { window.delays.push(performance.now() - began); window.drawing.push(+plot.dataset.milliseconds) }));
    });
    watch.observe(plot, { attributes: true, attributeFilter: ['data-revision'] });
  }, true);
}"""


def main() -> None:
    with tempfile.TemporaryDirectory() as folder, tempfile.TemporaryDirectory() as private:
        write(Path(folder) / "latency.ipynb", PANEL, KERNEL)
        with serve(Path(folder), Path(private)) as lab, browse() as watched:
            page = watched.page
            open_notebook(page, lab, "latency.ipynb")
            run_all(page)
            page.wait_for_selector(".wb-plot-figure .main-svg")
            inside = float(page.get_by_text("KERNEL ").last.inner_text().split()[1])
            page.evaluate(WATCH)
            page.locator(".wb-field-batch .noUi-handle").focus()
            for press in range(24):
                page.keyboard.press("ArrowLeft" if press % 12 < 6 else "ArrowRight")
                page.wait_for_function(f"() => window.delays.length > {press}")
            updated, delays, drawing = page.evaluate("() => [window.updated.slice(3), window.delays.slice(3), window.drawing.slice(3)]")
    print(f"key to figure updated: median {statistics.median(updated):.0f} ms, worst of {len(updated)} {max(updated):.0f} ms; "
          f"two frames later: median {statistics.median(delays):.0f} ms, worst {max(delays):.0f} ms; "
          f"of it in the kernel {inside:.0f} ms, drawing {statistics.median(drawing):.0f} ms; load {os.getloadavg()[0]:.1f} on {os.cpu_count()} cores")  # fmt: skip


if __name__ == "__main__":
    main()
