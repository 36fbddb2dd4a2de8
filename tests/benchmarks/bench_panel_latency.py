"""Milliseconds from a key pressed on a panel's slider to the new figure painted,
in a real JupyterLab in headless Chromium.

    python -m tests.benchmarks.bench_panel_latency [spectrum | spectrum-smollm2 | formats | formats-minilm
        | formats-smollm2 | sparsity-minilm | sparsity-smollm2 | sparsity-smollm2-head]

`spectrum` redraws a result with another view setting; `formats` rounds a layer anew and draws the format's
grid over its weights (on MiniLM: the first layer of a feed-forward, 1536 x 384; on SmolLM2 1536 x 576);
`sparsity` moves a mask's threshold and draws its bitmap (of the head: 49,152 x 576). Measured in the page:
from the keydown event until the figure is updated, and until it has been on the screen for two frames. The
way is page, server, kernel, figure, kernel, server, page, Plotly. Prints median and 90th percentile of 40
presses and how long the kernel's own part (computing, drawing up the figure, packing it) takes.
"""

from __future__ import annotations

import os
import statistics
import sys
import tempfile
from pathlib import Path

from tests.browser.lab import browse, open_notebook, run_all, serve
from tests.notebook import write

PRESSES = 40
SPECTRUM = """\
import time, widgets, workbench
from workbench.curvature import Spectrum
panel = widgets.panel(Spectrum, workbench.subject("{subject}"), {fields})
panel.job.start(); panel.job.wait()
panel"""
FORMATS = """\
import time, widgets.quantization, workbench
panel = widgets.quantization.FormatPanel(workbench.subject("{subject}"), "{layers}")
panel"""
SPARSITY = """\
import time, widgets.sparsity, workbench
on = workbench.subject("{subject}")
panel = widgets.sparsity.SparsityPanel(on, "magnitude", layers="{layers}", gradients=4)
panel.job.start(); panel.job.wait()
panel"""
VIEW = "packed(widgets.PlotView(panel.result.figure(**panel.view)).spec)"
MASKS = "panel.threshold(); packed(panel.plot.spec)"
FEED_FORWARD = {"minilm-docstrings": "*layer.0.intermediate*", "smollm2": "*layers.0.mlp.gate_proj"}
PANELS = {  # cell, the slider's field and the way it can go first, the kernel's own part
    "spectrum": (
        SPECTRUM.format(subject="digits-vit", fields="probes=2, steps=8, examples=64"),
        "batch",
        "Left",
        VIEW,
    ),
    "spectrum-smollm2": (
        SPECTRUM.format(
            subject="smollm2",
            fields='layers="model.layers.29.*", probes=1, steps=4, examples=2, batch_size=1',
        ),
        "batch",
        "Left",
        VIEW,
    ),
    "formats": (
        FORMATS.format(subject="digits-vit", layers="blocks"),
        "bits",
        "Right",
        "panel.draw(); packed(panel.plot.spec)",
    ),
    **{
        f"formats-{label}": (
            FORMATS.format(subject=name, layers=FEED_FORWARD[name]),
            "bits",
            "Right",
            "panel.draw(); packed(panel.plot.spec)",
        )
        for label, name in (("minilm", "minilm-docstrings"), ("smollm2", "smollm2"))
    },
    **{
        f"sparsity-{label}": (SPARSITY.format(subject=name, layers=layers), "sparsity", "Right", MASKS)
        for label, name, layers in (
            ("minilm", "minilm-docstrings", FEED_FORWARD["minilm-docstrings"]),
            ("smollm2", "smollm2", FEED_FORWARD["smollm2"]),
            ("smollm2-head", "smollm2", "lm_head"),
        )
    },
}
KERNEL = """\
from widgets.plot import packed
times = []
for _ in range(21):
    began = time.perf_counter()
    {part}
    times.append(1e3 * (time.perf_counter() - began))
print("kernel-part-ms", sorted(times)[10])"""
WATCH = """() => {
  const plot = document.querySelector('.wb-plot'); window.delays = []; window.updated = []; \
window.drawing = [];
  document.addEventListener('keydown', () => {
    const began = performance.now();
    const watch = new MutationObserver(() => {
      watch.disconnect(); window.updated.push(performance.now() - began);
      requestAnimationFrame(() => requestAnimationFrame(() => { \
window.delays.push(performance.now() - began); window.drawing.push(+plot.dataset.milliseconds) }));
    });
    watch.observe(plot, { attributes: true, attributeFilter: ['data-revision'] });
  }, true);
}"""


def described(times: list[float]) -> str:
    return (
        f"median {statistics.median(times):.0f} ms, 90th percentile "
        f"{statistics.quantiles(times, n=10)[-1]:.0f} ms"
    )


def main(name: str = "spectrum") -> None:
    cell, field, first, part = PANELS[name]
    back = {"Left": "Right", "Right": "Left"}[first]
    with tempfile.TemporaryDirectory() as folder, tempfile.TemporaryDirectory() as private:
        write(Path(folder) / "latency.ipynb", cell, KERNEL.format(part=part))
        with serve(Path(folder), Path(private)) as lab, browse() as watched:
            page = watched.page
            open_notebook(page, lab, "latency.ipynb")
            run_all(page)
            page.wait_for_selector(".wb-plot-figure .main-svg")
            inside = float(
                page.locator(".jp-OutputArea-output", has_text="kernel-part-ms ").last.inner_text().split()[1]
            )
            page.evaluate(WATCH)
            page.locator(f".wb-field-{field} .noUi-handle").focus()
            for press in range(3 + PRESSES):
                page.keyboard.press("Arrow" + (first if press % 6 < 3 else back))
                page.wait_for_function(f"() => window.delays.length > {press}")
            updated, delays, drawing = page.evaluate(
                "() => [window.updated.slice(3), window.delays.slice(3), window.drawing.slice(3)]"
            )
    print(
        f"{name}: key to figure updated: {described(updated)}; two frames later: {described(delays)}; "
        f"of it in the kernel {inside:.0f} ms, "
        f"drawing {statistics.median(drawing):.0f} ms; load {os.getloadavg()[0]:.1f} on {os.cpu_count()} "
        "cores"
    )


if __name__ == "__main__":
    main(*sys.argv[1:])
