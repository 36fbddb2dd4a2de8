"""The exported page: nothing from outside, nothing that runs but its own scripts, and everything readable."""

from __future__ import annotations

import base64
import json
import re

import nbformat
import numpy as np
import plotly.io as pio
import pytest

from workbench import export_html
from workbench.figures import figure, line

V4 = nbformat.v4


def notebook(*cells: nbformat.NotebookNode) -> nbformat.NotebookNode:
    return V4.new_notebook(cells=list(cells))


def shown(data: dict) -> nbformat.NotebookNode:
    return V4.new_code_cell("x", outputs=[V4.new_output("display_data", data=data)])


def plot(title: str = "A figure", points: int = 5) -> dict:
    fig = figure(title, x="x", y="y")
    line(fig, np.arange(points), np.arange(points) ** 2, "squares")
    return {
        export_html.PLOTLY_MIME: json.loads(pio.to_json(fig)),
        "text/html": "<table><tr><td>0.5</td></tr></table>",
    }


def test_page_is_self_contained_and_below_three_megabytes() -> None:
    page = export_html.page(
        notebook(
            V4.new_markdown_cell("# Title here\n\ntext"), *[shown(plot(f"f{i}", 3000)) for i in range(12)]
        )
    )
    assert len(page.encode()) < 3e6
    assert page.count('id="plotly-gz"') == 1 and page.count("data-figure=") == 12
    assert "<title>Title here</title>" in page
    assert not re.search(r"""(src|href)\s*=\s*["']?(https?:)?//""", page)
    assert "default-src 'none'" in page and "unsafe-eval" not in page


def test_a_page_without_figures_carries_no_plotly() -> None:
    assert len(export_html.page(notebook(V4.new_markdown_cell("# T"))).encode()) < 30_000


HOSTILE = [
    "<script>alert(1)</script>",
    "<img src=x onerror=alert(1)>",
    "<a href='javascript:alert(1)'>x</a>",
    "<iframe src='https://example.org'></iframe>",
    "<div style='background:url(https://example.org/x.png)'>x</div>",
    "<svg onload=alert(1)>",
    "</script><script>alert(1)</script>",
]


@pytest.mark.parametrize("text", HOSTILE)
def test_hostile_text_cannot_act_wherever_it_appears(text: str) -> None:
    cells = [
        V4.new_markdown_cell(f"# {text}\n\n## {text}\n\n{text}\n\n| a |\n|---|\n| {text} |"),
        shown({"text/html": f"<p>{text}</p>"}),
        shown({"text/markdown": text}),
        shown({"text/plain": text}),
        shown(plot(text)),
        V4.new_code_cell(
            "x",
            outputs=[
                V4.new_output("stream", name="stdout", text=text),
                V4.new_output("error", ename=text, evalue=text, traceback=[text]),
            ],
        ),
    ]
    book = notebook(*cells)
    book.metadata["papermill"] = {
        "parameters": {"subject": text, "k": [text]},
        "stopped": text,
        "start_time": "2026-01-01T00:00:00",
    }
    page = export_html.page(book)
    body = page[page.index("<body>") :].replace(f"<script>{export_html._SCRIPT}</script>", "")
    scripts = re.findall(r"<script\b[^>]*>", body)
    assert all(
        s.startswith(
            ('<script type="application/json" data-figure=', '<script type="application/octet-stream"')
        )
        for s in scripts
    )
    tags = re.findall(r"<[a-zA-Z][^>]*>", re.sub(r"(?s)<script\b.*?</script>", "", body))
    assert not [t for t in tags if re.search(r"\son\w+\s*=|javascript:|<iframe|<svg|url\(", t, re.I)]
    assert not [t for t in tags if re.search(r"\ssrc\s*=", t) and 'src="data:image/' not in t]


def test_figures_keep_their_data_through_the_script_element() -> None:
    page = export_html.page(notebook(shown(plot("a </script> b < c"))))
    payload = re.search(r'<script type="application/json" data-figure="figure-0">(.*?)</script>', page)
    assert (
        payload is not None and json.loads(payload.group(1))["layout"]["title"]["text"] == "a </script> b < c"
    )


def test_code_is_folded_parameters_are_in_the_header_and_math_is_mathml() -> None:
    book = notebook(
        V4.new_code_cell("k = 1", metadata={"tags": ["parameters"]}),
        V4.new_code_cell("k = 2", metadata={"tags": ["injected-parameters"]}),
        V4.new_markdown_cell("# The $H$ matrix\n\n$$\\lambda_{max} = \\frac{a}{b}$$"),
        V4.new_code_cell("secret_name = 1"),
    )
    book.metadata["papermill"] = {"parameters": {"k": 2, "subject": "digits-vit"}}
    page = export_html.page(book)
    assert '<details class="code"><summary>Code</summary>' in page and "secret_name" in page
    assert (
        "<th scope='row'>k</th><td><code>2</code></td>" in page
        and "<dd>digits-vit</dd>" in page
        and "k = 1" not in page
    )
    assert "<mfrac>" in page and "$$" not in page


def test_widget_views_and_progress_bars_leave_no_trace() -> None:
    cell = shown({export_html.WIDGET_MIME: {"model_id": "x"}, "text/plain": "Panel(children=...)"} | plot())
    bar = "a line\n\r  0%|          | 0/10 [00:00<?, ?it/s]\r100%|##########| 10/10 [00:01<00:00]\nthe end\n"
    page = export_html.page(
        notebook(cell, V4.new_code_cell("x", outputs=[V4.new_output("stream", name="stderr", text=bar)]))
    )
    assert "Panel(children" not in page and "model_id" not in page
    assert "<td>0.5</td>" in page  # the table beside the figure
    assert "0%|" not in page and "it/s" not in page and "a line" in page and "the end" in page
    assert export_html.settled("50%\r100% done\x1b[31m!\x1b[0m") == "100% done!"


def test_missing_values_become_gaps_not_invalid_json() -> None:
    bad = plot()
    bad[export_html.PLOTLY_MIME]["data"][0]["y"] = [1.0, float("nan"), float("inf")]
    page = export_html.page(notebook(shown(bad)))
    assert '"y":[1.0,null,null]' in page


PNG = base64.b64encode(b"\x89PNG\r\n\x1a\n" + bytes(40)).decode()
JPEG = base64.b64encode(b"\xff\xd8\xff\xe0" + bytes(40)).decode()


def sources(data: dict) -> list[str]:
    return re.findall(r'<img src="([^"]*)"', export_html.page(notebook(shown(data))))


def test_a_picture_is_base64_of_its_kind_or_is_left_out() -> None:
    assert sources({"image/png": PNG + "\n"}) == [f"data:image/png;base64,{PNG}"]
    assert sources({"image/jpeg": JPEG}) == [f"data:image/jpeg;base64,{JPEG}"]
    folded = "\n".join(PNG[at : at + 20] for at in range(0, len(PNG), 20))
    assert sources({"image/png": folded}) == [f"data:image/png;base64,{PNG}"]
    escape = PNG + '"><meta http-equiv="refresh" content="0;url=https://example.org">'
    html_file = base64.b64encode(b"<html><script>alert(1)</script></html>").decode()
    for bad in (escape, html_file, JPEG, "not base64!", PNG[:-3], "é"):
        page = export_html.page(notebook(shown({"image/png": bad, "text/plain": "<Figure>"})))
        assert "<img" not in page and "refresh" not in page and "&lt;Figure&gt;" in page


@pytest.mark.parametrize("kind", ["text/markdown", "text/latex"])
def test_formulas_put_neither_scripts_nor_links_that_run_into_the_page(kind: str) -> None:
    formulas = [
        r"\text{<script>alert(1)</script>}",
        r"\mbox{</mtext></math><img src=x onerror=alert(1)>}",
        r"\text{&lt;script&gt;alert(1)&lt;/script&gt;}",
        r"\href{javascript:alert(1)}{x}",
        r"\href{ JavaScript:alert(1)}{x}",
        r"\href{data:text/html,<script>alert(1)</script>}{x}",
        r"\style{background:url(https://example.org/x.png)}{x}",
        r"\class{failure}{x}",
    ]
    for formula in formulas:
        output = export_html.page(notebook(shown({kind: f"${formula}$"})))
        body = output[output.index("<main>") : output.index("</main>")]
        assert "<math" in body, formula
        tags = re.findall(r"<[a-zA-Z][^>]*>", body)
        assert not [t for t in tags if re.search(r"<script|<img|href|\sstyle=|class=.failure|\son\w+=", t)], (
            formula
        )


def test_formulas_keep_their_text_signs_and_outward_links() -> None:
    assert "<mtext>a\xa0&lt;\xa0b\xa0&amp;\xa0c</mtext>" in export_html.markdown(r"$\text{a < b & c}$")
    assert "<mo>≤</mo>" in export_html.markdown(r"$x \le y$")
    assert 'href="https://example.org"' in export_html.markdown(r"$\href{https://example.org}{x}$")


def test_sanitised_markup_keeps_tables_pictures_and_links_and_nothing_that_acts() -> None:
    clean = export_html.sanitize
    table = clean(
        "<table class='dataframe'><tr><th scope='row' "
        "style='text-align:left;position:fixed'>a</th></tr></table>"
    )
    assert 'class="dataframe"' in table and 'scope="row"' in table
    assert 'style="text-align:left"' in table and "position" not in table
    assert clean("<details open><summary>s</summary></details>").startswith("<details open")
    assert 'href="https://example.org"' in clean("<a href='https://example.org'>x</a>")
    assert 'href="#section-1"' in clean("<a href='#section-1'>x</a>")
    assert f'src="data:image/png;base64,{PNG}"' in clean(f"<img src='data:image/png;base64,{PNG}'>")
    for address in (
        "javascript:alert(1)",
        "java\tscript:alert(1)",
        " data:text/html,x",
        "DATA:text/html,x",
        "vbscript:x",
    ):
        assert "href" not in clean(f'<a href="{address}">x</a>')
    assert clean("<style>body{}</style><script>x</script><!-- c --><object>ok</object>") == "ok"
    assert "src" not in clean("<img src='https://example.org/x.png' alt='a'>")
