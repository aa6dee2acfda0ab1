"""The report in a real browser: it opens from a file, scrolls, switches, sorts, and its console stays silent.

Skipped where Chromium, its driver or selenium is missing.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from data_cache.geometry import Box, Grid
from liverseg.pictures.page import Page, PageCase, write_page
from liverseg.pictures.slices import evaluation_volume

webdriver = pytest.importorskip("selenium.webdriver")
CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
DRIVER = shutil.which("chromedriver")
pytestmark = pytest.mark.skipif(CHROMIUM is None or DRIVER is None, reason="no Chromium with its driver")

FLAGS = (
    "--headless=new",
    "--no-sandbox",
    "--enable-unsafe-swiftshader",
    "--disable-background-networking",
    "--window-size=1200,1000",
)
GRID = Grid.from_array((20, 40, 50), np.diag([2.0, 2.0, 4.0, 1.0]))


def a_volume(tumour_z: int) -> str:
    """A block of liver on the patient's right, above the middle, with a tumour that starts at a slice."""
    truth = np.zeros(GRID.shape_zyx, dtype=np.uint8)
    truth[8:18, 10:30, 28:46] = 1
    truth[tumour_z : tumour_z + 3, 15:20, 35:40] = 2
    predicted = np.where(truth > 0, 1, 0).astype(np.uint8)
    predicted[:, :, 44:] = 0
    image = np.where(truth > 0, 90, -20).astype(np.int16)
    foreground = np.full((2, 10, 20, 25), 0.25, dtype=np.float32)
    box = Box.whole(GRID.shape_zyx)
    return json.dumps(evaluation_volume(image, truth, predicted, GRID, foreground_czyx=foreground, box=box))


@pytest.fixture(scope="module")
def page(tmp_path_factory: pytest.TempPathFactory) -> Path:
    cases = [
        PageCase(name=f"case_{i}", note="", cells=(dice, 10.0), volumes=iter([a_volume(9 + i)]))
        for i, dice in enumerate((0.5, None, 0.9))
    ]
    content = Page(title="t", subtitle="", sections=(), columns=("Dice", "mL"), digits=(3, 0), cases=cases)
    return write_page(content, tmp_path_factory.mktemp("page") / "page.html")


@pytest.fixture
def browser(page: Path) -> Iterator[Any]:
    """A page just opened; a line in its console fails the test."""
    options = webdriver.ChromeOptions()
    options.binary_location = CHROMIUM
    for flag in FLAGS:
        options.add_argument(flag)
    options.set_capability("goog:loggingPrefs", {"browser": "ALL"})
    driver = webdriver.Chrome(options=options, service=webdriver.ChromeService(DRIVER))
    try:
        driver.get(page.as_uri())
        wait_for(driver, "0/0")
        yield driver
        assert driver.get_log("browser") == []
    finally:
        driver.quit()


def wait_for(driver: Any, ready: str) -> None:
    from selenium.webdriver.support.ui import WebDriverWait

    WebDriverWait(driver, 20).until(lambda d: d.execute_script("return document.body.dataset.ready") == ready)


def by_id(driver: Any, name: str) -> Any:
    return driver.find_element("id", name)


def pixel(driver: Any, axis: int, across: float, down: float) -> list[int]:
    """RGB of a pane at shares of its width and height; read from a copy, since Chromium warns of reading a canvas often."""
    script = """
    const pane = document.getElementById("pane-" + arguments[0]), copy = document.createElement("canvas");
    const x = Math.floor(arguments[1] * pane.width), y = Math.floor(arguments[2] * pane.height);
    copy.width = copy.height = 1;
    const context = copy.getContext("2d");
    context.drawImage(pane, -x, -y);
    return [...context.getImageData(0, 0, 1, 1).data].slice(0, 3);"""
    found: list[int] = driver.execute_script(script, axis, across, down)
    return found


def switch_overlays(driver: Any) -> None:
    for box in driver.find_elements("css selector", "#layers input"):
        if box.is_selected():
            box.click()


def test_it_opens_at_the_tumour_with_the_patients_right_on_the_left(browser: Any) -> None:
    assert "10 of 20, the scan's slice 10" in by_id(browser, "where-0").text
    assert "truth: tumour · prediction: liver" in by_id(browser, "readout").text
    switch_overlays(browser)
    # Liver: 90 HU of -110..190 is 170; it lies at x 28..46 of 50, so shown at shares 4/50 to 22/50, and at y
    # 10..30 of 40, so from 10/40 to 30/40 down.
    assert pixel(browser, 0, 0.2, 0.35) == pytest.approx([170] * 3, abs=6)
    assert pixel(browser, 0, 0.7, 0.35) == pytest.approx([76] * 3, abs=6)
    # z 8..18 of 20: shown from 2/20 to 12/20 down.
    assert pixel(browser, 1, 0.2, 0.3) == pytest.approx([170] * 3, abs=6)
    assert pixel(browser, 1, 0.2, 0.8) == pytest.approx([76] * 3, abs=6)


def test_overlays_switch_and_fade(browser: Any) -> None:
    def tinted() -> list[int]:
        return pixel(browser, 0, 0.2, 0.35)

    with_both = tinted()
    browser.find_element("id", "layer-0").click()
    without_truth = tinted()
    browser.find_element("id", "layer-1").click()
    plain = tinted()
    assert len({tuple(with_both), tuple(without_truth), tuple(plain)}) == 3
    assert plain[0] == plain[1] == plain[2]
    browser.find_element("id", "layer-0").click()
    browser.execute_script(
        "const f = document.getElementById('fade'); f.value = 0; f.dispatchEvent(new Event('input'))"
    )
    assert tinted() == plain


def test_keys_wheel_slider_and_clicks_move_through_the_slices(browser: Any) -> None:
    from selenium.webdriver.common.action_chains import ActionChains
    from selenium.webdriver.common.keys import Keys

    pane = by_id(browser, "pane-0")
    pane.send_keys(Keys.ARROW_UP)
    assert by_id(browser, "where-0").text.startswith("11 of 20")
    pane.send_keys(Keys.PAGE_DOWN)
    assert by_id(browser, "where-0").text.startswith("1 of 20")
    pane.send_keys(Keys.ARROW_DOWN)
    assert by_id(browser, "where-0").text.startswith("1 of 20")
    browser.execute_script(
        "document.getElementById('pane-0').dispatchEvent(new WheelEvent('wheel', {deltaY: -1, cancelable: true}))"
    )
    assert by_id(browser, "where-0").text.startswith("2 of 20")
    browser.execute_script(
        "const s = document.getElementById('scroll-0'); s.value = 12; s.dispatchEvent(new Event('input'))"
    )
    assert by_id(browser, "where-0").text.startswith("13 of 20")
    ActionChains(browser).move_to_element_with_offset(pane, -pane.size["width"] // 4, 0).click().perform()
    # A quarter of the width: 50 · 3/4 from the patient's left.
    assert by_id(browser, "where-2").text.startswith("38 of 50")


def test_windows_and_cases_change(browser: Any) -> None:
    switch_overlays(browser)
    before = pixel(browser, 0, 0.7, 0.35)
    browser.find_element("xpath", "//button[text()='wide']").click()
    assert pixel(browser, 0, 0.7, 0.35) != before
    by_id(browser, "next").click()
    wait_for(browser, "1/0")
    assert by_id(browser, "name").text == "case_1"
    assert by_id(browser, "where-0").text.startswith("11 of 20")
    assert not browser.find_element("id", "layer-0").is_selected()  # what was switched stays switched
    browser.find_element("xpath", "//button[@class='open'][text()='case_2']").click()
    wait_for(browser, "2/0")


def test_the_table_sorts_and_what_has_no_value_comes_last(browser: Any) -> None:
    def order() -> list[str]:
        return [row.text for row in browser.find_elements("css selector", "#rows .open")]

    header = browser.find_element("xpath", "//th/button[text()='Dice']")
    header.click()
    assert order() == ["case_2", "case_0", "case_1"]
    header.click()
    assert order() == ["case_0", "case_2", "case_1"]


def test_a_finger_moves_the_cross(browser: Any) -> None:
    touch = """
    const pane = document.getElementById("pane-0"), box = pane.getBoundingClientRect();
    const at = (x, y) => ({pointerId: 1, pointerType: "touch", buttons: 1, bubbles: true,
      clientX: box.left + x * box.width, clientY: box.top + y * box.height});
    pane.setPointerCapture = () => {};
    pane.dispatchEvent(new PointerEvent("pointerdown", at(0.5, 0.5)));
    pane.dispatchEvent(new PointerEvent("pointermove", at(0.1, 0.9)));"""
    browser.execute_script(touch)
    assert by_id(browser, "where-2").text.startswith("45 of 50")
    assert by_id(browser, "where-1").text.startswith("4 of 40")


def test_nothing_is_wider_than_a_phone(browser: Any) -> None:
    browser.set_window_size(500, 900)
    assert browser.execute_script("return document.documentElement.scrollWidth <= innerWidth")
