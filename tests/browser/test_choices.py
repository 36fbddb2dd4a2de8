"""A choice in a real JupyterLab: its options change with it and reach the run."""

from __future__ import annotations

import re
from collections.abc import Iterator

import pytest
from playwright.sync_api import expect

from tests.browser.lab import PATIENCE, Lab, Watched, open_and_run, photograph, serve_cells

PANEL = '''\
import pandas as pd
import widgets
from workbench.axis import Axis, Choice, Options, parameter
from workbench.instruments import Instrument

SALIENCY = Axis("demo-saliency", "what a weight's removal is thought to cost")

class Fisher(Options):
    damp: float = parameter(0.01, "share of the mean diagonal added to it", gt=0, le=10, scale="log")
    block_size: int = parameter(50, "weights in a block", ge=1, unit="weights")

@SALIENCY.add("magnitude", formula="|w|", source="Han et al. 2015")
def magnitude(weight, options):
    return abs(weight)

@SALIENCY.add("fisher", formula="w^2 / (2 [F^-1]_qq)", source="Kurtic et al. 2022", needs="gradients",
              options=Fisher)
def fisher(weight, options):
    return weight**2 / options.damp

class Score(Instrument):
    """What the removal of one weight is thought to cost."""
    cached = False
    method: str = parameter("obert", "published method: what is not chosen follows from it")
    weight: float = parameter(2.0, "the weight", ge=0, le=4)
    saliency: Choice = SALIENCY.choice(None)
    second: Choice = SALIENCY.choice("fisher", "another one beside it")
    share: float = parameter(0.5, "share of weights", ge=0, lt=1)

    @classmethod
    def filled(cls, given):
        obert = given.get("method", "obert") == "obert"
        return {"saliency": {"name": "fisher", "damp": 0.5} if obert else "magnitude"}

    def _run(self, on, progress):
        score = self.saliency(self.weight)
        facts = {"score": score, "saliency": repr(self.saliency)}
        return self.result(pd.DataFrame({"score": [score]}), facts)

class On:
    name, fingerprint, history = "one weight", "0", ()

widgets.panel(Score, On())'''

FIT = """\
import widgets
from workbench.scaling import Runs, ScalingFit
runs = Runs.from_table({"params": [1e7, 3e7, 1e8, 3e8, 1e9], "tokens": [1e9, 2e9, 4e9, 8e9, 2e10],
                        "loss": [4.0, 3.6, 3.2, 2.9, 2.7]})
widgets.panel(ScalingFit, runs)"""

expect.set_options(timeout=PATIENCE)


@pytest.fixture(scope="module")
def lab(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Lab]:
    with serve_cells(tmp_path_factory, {"panel": PANEL, "fit": FIT}) as found:
        yield found


def test_options_follow_the_choice_and_reach_the_run(lab: Lab, watched: Watched) -> None:
    page = watched.page
    open_and_run(page, lab, "panel")
    panel = page.locator(".wb-panel")
    saliency = panel.locator(".wb-field-saliency")
    menu = saliency.get_by_label("saliency", exact=True)
    expect(saliency.get_by_text("gives fisher")).to_be_visible()
    photograph(page, "choice-left-to-the-method")
    menu.select_option(label="fisher")
    block = panel.locator(".wb-field-saliency-block_size").get_by_role("spinbutton")
    expect(block).to_have_value("50")
    block.fill("7")
    block.press("Enter")
    menu.select_option(label="magnitude")
    expect(block).to_be_hidden()
    menu.select_option(label="fisher")
    expect(block).to_have_value("7")
    panel.get_by_role("button", name="Run", exact=True).click()
    expect(panel.locator(".wb-facts").first).to_contain_text(re.compile("block_size=7"))
    panel.get_by_text("What the settings mean").click()
    panel.locator(".wb-help").get_by_text("2 choices").first.click()
    expect(panel.locator(".wb-help")).to_contain_text("w^2 / (2 [F^-1]_qq) (Kurtic et al. 2022)")
    photograph(page, "choice")


def test_an_instruments_own_view_opens_beside_its_panel(lab: Lab, watched: Watched) -> None:
    page = watched.page
    open_and_run(page, lab, "fit")
    panel = page.locator(".wb-panel-scaling-fit")
    panel.locator(".wb-field-law").get_by_label("law", exact=True).select_option(label="formula")
    expect(panel.locator(".wb-field-law-text input")).to_have_value("E + A/params**alpha")
    panel.get_by_role("button", name="Refit live, drop runs, spend a budget").click()
    expect(page.get_by_role("heading", name=re.compile("Scaling law of"))).to_be_visible()
    photograph(page, "choice-law")
