"""The page of a report in a real browser: drawn without a network, at both widths, and everything on it works."""

import os
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from locobench.report import page as parts
from locobench.report import second_order, write
from locobench.report.results import load
from locobench.report.summary import summarize
from locobench.series import DIRECTIONS

playwright = pytest.importorskip("playwright.sync_api", reason="needs playwright: pip install playwright")
BROWSER = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
pytestmark = pytest.mark.skipif(BROWSER is None, reason="needs a browser: apt-get install chromium")
RESULTS = Path(__file__).parent.parent.parent / "results"
LOSSES = ["train-epochs", "train-seconds", "train-adam-steps", "test-epochs"]
PLOTS = [*LOSSES, "sensitivity", "local", *(f"second-order-{name}" for name in DIRECTIONS)]


class Tab:
    """A tab with the page, and everything that went wrong in it."""

    def __init__(self, browser: Any, file: Path, width: int) -> None:
        self.troubles: list[str] = []
        self.page = browser.new_page(viewport={"width": width, "height": 900})
        self.page.set_default_timeout(60_000)
        self.page.on("console", lambda message: self.troubles.append(f"{message.type}: {message.text}"))
        self.page.on("pageerror", lambda error: self.troubles.append(str(error)))
        self.page.on("request", self._request)
        self.page.goto(file.as_uri())
        self.page.wait_for_selector("html[data-ready=yes]")

    def _request(self, request: Any) -> None:
        if not request.url.startswith("data:") and not request.url.endswith("/report.html"):
            self.troubles.append(f"request: {request.url}")

    def curves(self, plot: str) -> int:
        """Lines and sets of points that are drawn in a plot."""
        count: int = self.page.locator(f"#{plot} .scatterlayer .trace").count()
        return count

    def ask(self, script: str) -> Any:
        return self.page.evaluate(script)

    def column(self, title: str) -> list[str]:
        heads = [text.lower() for text in self.page.locator("thead button").all_inner_texts()]
        number = heads.index(title) + 1
        return [text.strip() for text in self.page.locator(f"tbody tr > :nth-child({number})").all_inner_texts()]


@pytest.fixture(scope="module")
def report_file(finished_study: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    study = load(finished_study)
    resemblance = second_order.read(RESULTS / "second-order.json")
    text = parts.render(study, summarize(study), write.title_of(study), "the command", resemblance)
    file = tmp_path_factory.mktemp("page") / "report.html"
    file.write_text(text, encoding="utf-8")
    return file


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    # Chromium refuses its sandbox to root, as in containers.
    root = hasattr(os, "geteuid") and os.geteuid() == 0
    with playwright.sync_playwright() as driver:
        started = driver.chromium.launch(executable_path=BROWSER, args=["--no-sandbox"] if root else [])
        yield started
        started.close()


@pytest.fixture(scope="module", params=[1280, 390], ids=["desktop", "phone"])
def any_tab(browser: Any, report_file: Path, request: pytest.FixtureRequest) -> Iterator[Tab]:
    tab = Tab(browser, report_file, request.param)
    yield tab
    tab.page.close()


@pytest.fixture(scope="module")
def shared_tab(browser: Any, report_file: Path) -> Iterator[Tab]:
    tab = Tab(browser, report_file, 1280)
    yield tab
    tab.page.close()


@pytest.fixture
def tab(shared_tab: Tab) -> Iterator[Tab]:
    """A desktop's tab in which nothing may go wrong."""
    yield shared_tab
    assert shared_tab.troubles == []


def test_everything_is_drawn_without_a_network(any_tab: Tab):
    assert any_tab.troubles == []
    assert [name for name in PLOTS if any_tab.curves(name) == 0] == []
    for name in LOSSES:
        assert any_tab.curves(name) == 2 * 4, "a line and a band for each of four methods"
    assert any_tab.curves("sensitivity") == 3
    assert any_tab.curves("local") == 4
    empty = any_tab.ask(
        """[...document.querySelectorAll(".scatterlayer .trace")].filter((trace) =>
             ![...trace.querySelectorAll("path")].some((path) => (path.getAttribute("d") || "").length > 5)).length"""
    )
    assert empty == 0, "every trace has a path"
    images = any_tab.ask("[...document.images].map((image) => [image.naturalWidth, image.alt])")
    assert len(images) == 1 + 4
    assert all(width == 10 * 4 and alt for width, alt in images)


def test_no_button_sends_anything_anywhere(any_tab: Tab):
    buttons = any_tab.ask("[...document.querySelectorAll('.modebar-btn')].map((button) => button.dataset.title)")
    assert set(buttons) == {"Download plot as a PNG", "Zoom", "Pan", "Zoom in", "Zoom out", "Reset axes"}


def test_nothing_is_wider_than_the_window(any_tab: Tab):
    widths = any_tab.ask("[document.documentElement.scrollWidth, window.innerWidth]")
    assert widths[0] <= widths[1]
    assert any_tab.ask(
        """[...document.querySelectorAll(".plot")].every((plot) =>
             plot.getBoundingClientRect().right <= window.innerWidth && plot.querySelector("svg").clientWidth > 200)"""
    )


def test_methods_are_toggled_by_mouse_and_by_key(tab: Tab):
    adam = tab.page.locator('.chip[data-method="adam"]')
    assert adam.get_attribute("aria-pressed") == "true"
    adam.click()
    assert adam.get_attribute("aria-pressed") == "false"
    assert [tab.curves(name) for name in LOSSES] == [6] * 4
    assert tab.curves("sensitivity") == 2
    assert tab.curves("local") == 4
    adam.focus()
    tab.page.keyboard.press("Space")
    assert [tab.curves(name) for name in LOSSES] == [8] * 4
    tab.page.click("#show-none")
    assert [tab.curves(name) for name in LOSSES] == [0] * 4
    tab.page.get_by_role("button", name="first-order", exact=True).click()
    assert [tab.curves(name) for name in LOSSES] == [6] * 4
    tab.page.click("#show-all")
    assert [tab.curves(name) for name in LOSSES] == [8] * 4


def test_the_scales_switch(tab: Tab):
    def scales(axis: str) -> list[str]:
        return [tab.ask(f"document.getElementById('{name}')._fullLayout.{axis}.type") for name in LOSSES]

    assert (scales("yaxis"), scales("xaxis")) == (["log"] * 4, ["linear"] * 4)
    labels = tab.page.locator("#train-epochs .ytick text").all_text_contents()
    tab.page.get_by_role("group", name="loss").get_by_label("linear").check()
    assert scales("yaxis") == ["linear"] * 4
    assert tab.page.locator("#train-epochs .ytick text").all_text_contents() != labels
    tab.page.get_by_role("group", name="time").get_by_label("log").check()
    assert scales("xaxis") == ["linear", "log", "log", "linear"]
    tab.page.get_by_role("group", name="loss").get_by_label("log").check()
    tab.page.get_by_role("group", name="time").get_by_label("linear").check()
    assert (scales("yaxis"), scales("xaxis")) == (["log"] * 4, ["linear"] * 4)
    assert tab.page.locator("#train-epochs .ytick text").all_text_contents() == labels


def test_the_table_sorts(tab: Tab):
    def numbers(title: str) -> list[float]:
        return [float(text.split()[0].rstrip("*")) for text in tab.column(title) if text != "–" and text != "never"]

    assert numbers("train") == sorted(numbers("train"))
    tab.page.get_by_role("button", name="step ÷ Adam").click()
    assert numbers("step ÷ adam") == sorted(numbers("step ÷ adam"))
    tab.page.get_by_role("button", name="step ÷ Adam").click()
    assert numbers("step ÷ adam") == sorted(numbers("step ÷ adam"), reverse=True)
    assert tab.page.locator("th[aria-sort]").all_inner_texts() == ["step ÷ Adam"]
    for order in ("ascending", "descending"):
        tab.page.get_by_role("button", name="bytes ÷ Adam").click()
        assert tab.page.locator("th[aria-sort]").get_attribute("aria-sort") == order
        assert tab.column("bytes ÷ adam")[-1] == "–", "RMSProp has no price"
    tab.page.get_by_role("button", name="method", exact=True).click()
    assert tab.column("method") == ["Adam", "LocoProp-M", "RMSProp", "SGD"]


def test_hovering_tells_the_numbers(tab: Tab):
    tab.page.locator("#train-epochs").scroll_into_view_if_needed()
    point = tab.ask(
        """(() => {
             const plot = document.getElementById("train-epochs"), { xaxis, yaxis } = plot._fullLayout;
             const { x, y } = plot.data.findLast((trace) => trace.meta.kind === "curve");
             const box = plot.getBoundingClientRect();
             return [box.left + xaxis._offset + xaxis.d2p(x[1]), box.top + yaxis._offset + yaxis.d2p(y[1])];
           })()"""
    )
    tab.page.mouse.move(*point)
    tab.page.wait_for_selector("#train-epochs .hovertext")
    assert "epoch 2: " in tab.page.locator("#train-epochs .hovertext").text_content()


def test_the_target_of_the_local_loss_moves(tab: Tab):
    def curve() -> list[float]:
        values: list[float] = tab.ask("Array.from(document.getElementById('local').data[0].y)")
        return values

    def drawn() -> str:
        path: str = tab.ask("document.querySelector('#local .scatterlayer .trace path.js-line').getAttribute('d')")
        return path

    first, path = curve(), drawn()
    tab.page.fill("#target", "-0.5")
    assert tab.page.inner_text("#target-value") == "-0.5"
    assert curve() != first
    assert drawn() != path
    assert min(curve()) == pytest.approx(0, abs=1e-9)
    tanh = curve()
    tab.page.select_option("#transfer", "relu")
    assert curve() != tanh
    assert curve()[0] == 0, "relu is indifferent below zero"
    tab.page.locator("#target").press("ArrowRight")
    assert tab.page.inner_text("#target-value") == "-0.4"
    tab.page.locator("#local").scroll_into_view_if_needed()
    box = tab.page.locator("#local").bounding_box()
    tab.page.mouse.move(box["x"] + box["width"] / 2, box["y"] + box["height"] / 2)
    tab.page.mouse.down()
    tab.page.mouse.move(box["x"] + box["width"] * 0.75, box["y"] + box["height"] / 2)
    tab.page.mouse.up()
    assert float(tab.page.inner_text("#target-value")) > 1, "dragged"


def test_the_second_order_views(tab: Tab):
    def shown() -> list[float]:
        values: list[float] = tab.ask(
            "Array.from(document.getElementById('second-order-foof').data.find((trace) => trace.visible).y)"
        )
        return values

    before = shown()
    tab.page.select_option("#view", index=1)
    tab.page.wait_for_function("document.querySelectorAll('#second-order-legend li').length === 5")
    assert shown() != before
    assert tab.curves("second-order-kfac") == 5
