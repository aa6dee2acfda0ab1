"""The report in a real browser: it opens from a file, moves, zooms, jumps, sorts, and its console stays silent.

Skipped where Chromium, its driver or selenium is missing.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from data_cache.geometry import Box, Grid
from liverseg.pictures.page import Page, PageCase, html_table, write_page
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
GRID = Grid.from_array((40, 80, 100), np.diag([2.0, 2.0, 4.0, 1.0]))
Open = Callable[..., Any]


def a_case(tumour_z: int) -> str:
    """A block of liver on the patient's right, above the middle, with a tumour that is missed and one that is not there.

    Wide margins leave the rest of the scan to the second volume.
    """
    truth = np.zeros(GRID.shape_zyx, dtype=np.uint8)
    truth[18:28, 30:50, 48:66] = 1
    truth[tumour_z : tumour_z + 3, 35:40, 55:60] = 2
    predicted = np.where(truth > 0, 1, 0).astype(np.uint8)
    predicted[:, :, 64:] = 0
    predicted[26, 32:35, 50:53] = 2
    image = np.where(truth > 0, 90, -20).astype(np.int16)
    foreground = np.full((2, 10, 20, 25), 0.25, dtype=np.float32)
    box = Box.whole(GRID.shape_zyx)
    return json.dumps(evaluation_volume(image, truth, predicted, GRID, foreground_czyx=foreground, box=box))


def a_page(path: Path, *, max_cases: int = 20) -> Path:
    cases = [
        PageCase(name=f"case_{i}", note="", cells=(dice, 10.0), content=partial(a_case, 19 + i))
        for i, dice in enumerate((0.5, None, 0.9))
    ]
    columns = ("Dice", *(f"column {n}" for n in range(12)))
    for i, case in enumerate(cases):
        cases[i] = PageCase(
            name=case.name, note="", cells=(case.cells[0], *[10.0] * 12), content=case.content
        )
    scores = html_table(
        ("mean", "liver, 12 cases", "tumour, 12 cases"), [("Dice", *2 * ("0.948 [0.925, 0.971], n 12",))]
    )
    lesions = html_table(
        ("lesions of all cases", *("false positives",) * 6), [("one to one, IoU > 0.5, 10–20 mm", *"123456")]
    )
    headline = f'<div class="headline"><div>{scores}</div><div class="rest">a</div><div>{lesions}</div></div>'
    content = Page(
        title="t", subtitle="", sections=(headline,), order="", columns=columns, digits=(3,) * 13, cases=cases
    )
    return write_page(content, path, max_cases=max_cases).path


@pytest.fixture(scope="module")
def page(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return a_page(tmp_path_factory.mktemp("page") / "page.html")


@pytest.fixture
def open_page() -> Iterator[Open]:
    """Opens a page; a line in a console fails the test."""
    drivers = []

    def start(path: Path, *, fragment: str = "", phone: bool = False, dark: bool = False) -> Any:
        options = webdriver.ChromeOptions()
        options.binary_location = CHROMIUM
        for flag in (
            *FLAGS,
            *(["--force-dark-mode", "--blink-settings=preferredColorScheme=0"] if dark else []),
        ):
            options.add_argument(flag)
        options.set_capability("goog:loggingPrefs", {"browser": "ALL"})
        if phone:
            metrics = {"width": 390, "height": 844, "pixelRatio": 2, "touch": True}
            options.add_experimental_option("mobileEmulation", {"deviceMetrics": metrics})
        drivers.append(webdriver.Chrome(options=options, service=webdriver.ChromeService(DRIVER)))
        drivers[-1].get(path.as_uri() + fragment)
        return drivers[-1]

    try:
        yield start
        for driver in drivers:
            assert driver.get_log("browser") == []
    finally:
        for driver in drivers:
            driver.quit()


@pytest.fixture
def browser(page: Path, open_page: Open) -> Any:
    driver = open_page(page)
    wait_for(driver, "0/0")
    return driver


def until(driver: Any, condition: Callable[[Any], bool]) -> None:
    from selenium.webdriver.support.ui import WebDriverWait

    WebDriverWait(driver, 20).until(condition)


def wait_for(driver: Any, ready: str) -> None:
    until(driver, lambda d: d.execute_script("return document.body.dataset.ready") == ready)


def settle(driver: Any) -> None:
    """Until what was asked for is drawn: a frame, and another one."""
    driver.execute_async_script(
        "const done = arguments[0]; requestAnimationFrame(() => requestAnimationFrame(() => done()))"
    )


def by_id(driver: Any, name: str) -> Any:
    return driver.find_element("id", name)


def where(driver: Any) -> list[str]:
    """The native slices of all planes, as they are written below them."""
    settle(driver)
    return [by_id(driver, f"where-{axis}").text.split()[0] for axis in range(3)]


def pixel(driver: Any, axis: int, native_u: float, native_v: float) -> list[int]:
    """RGB of a pane at a voxel of the scan; read from a copy, since Chromium warns of reading a canvas often."""
    settle(driver)
    script = """
    const here = geometry(arguments[0]), copy = document.createElement("canvas");
    const x = Math.floor(here.x(mm(here.u, arguments[1]))), y = Math.floor(here.y(mm(here.v, arguments[2])));
    copy.width = copy.height = 1;
    const context = copy.getContext("2d");
    context.drawImage(here.canvas, -x, -y);
    return [...context.getImageData(0, 0, 1, 1).data].slice(0, 3);"""
    found: list[int] = driver.execute_script(script, axis, native_u, native_v)
    return found


def drag(driver: Any, axis: int, by: tuple[int, int], *, button: str = "left", kind: str = "mouse") -> None:
    """A pointer that goes down in the middle of a pane, moves and goes up."""
    script = """
    const [axis, dx, dy, buttons, pointerType] = arguments, pane = document.getElementById("pane-" + axis);
    const box = pane.getBoundingClientRect(), x = box.left + box.width / 2, y = box.top + box.height / 2;
    const send = (name, x, y, buttons) => pane.dispatchEvent(new PointerEvent(name,
      { pointerId: 1, pointerType, buttons, bubbles: true, cancelable: true, clientX: x, clientY: y }));
    pane.setPointerCapture = () => {};
    send("pointerdown", x, y, buttons); send("pointermove", x + dx, y + dy, buttons); send("pointerup", x + dx, y + dy, 0);"""
    driver.execute_script(script, axis, *by, {"left": 1, "right": 2}[button], kind)


def test_it_opens_at_the_first_lesion_with_the_patients_right_on_the_left(browser: Any) -> None:
    assert where(browser) == ["21", "38", "58"]
    assert "truth: tumour · prediction: liver" in by_id(browser, "readout").text
    for box in browser.find_elements("css selector", "#layers input"):
        if box.is_selected():
            box.click()
    # Liver: 90 HU of -110..190 is 170, the rest -20 HU and 76.
    assert pixel(browser, 0, 62, 45) == pytest.approx([170] * 3, abs=6)
    assert pixel(browser, 0, 44, 45) == pytest.approx([76] * 3, abs=6)
    assert pixel(browser, 1, 62, 25) == pytest.approx([170] * 3, abs=6)
    assert pixel(browser, 1, 62, 29.9) == pytest.approx([76] * 3, abs=6)
    # The patient's right, where x is larger, is on the left, and the head on top.
    left, right = (browser.execute_script(f"return geometry(0).x(mm(2, {x}))") for x in (60, 50))
    top, bottom = (browser.execute_script(f"return geometry(1).y(mm(0, {z}))") for z in (26, 20))
    assert left < right
    assert top < bottom


def test_contours_switch_stay_apart_and_fills_are_off(browser: Any) -> None:
    def colours() -> set[tuple[int, ...]]:
        settle(browser)
        script = """
        const pane = document.getElementById("pane-0"), copy = document.createElement("canvas");
        copy.width = pane.width; copy.height = pane.height;
        const context = copy.getContext("2d"); context.drawImage(pane, 0, 0);
        return [...context.getImageData(0, 0, pane.width, pane.height).data];"""
        rgba = np.array(browser.execute_script(script)).reshape(-1, 4)[:, :3]
        return {tuple(c) for c in rgba[np.ptp(rgba, axis=1) > 60]}

    blue, yellow, purple = (0x56, 0xB4, 0xE9), (0xF0, 0xE4, 0x42), (0xB7, 0x40, 0xFF)
    assert {blue, yellow, purple} <= colours()  # where both agree, dashes leave the truth to be seen
    inside = pixel(browser, 0, 52, 45)
    assert np.ptp(inside) == 0  # no fill
    by_id(browser, "layer-0").click()
    assert yellow in colours()
    assert not {blue, purple} & colours()
    by_id(browser, "fill").click()
    assert np.ptp(pixel(browser, 0, 52, 45)) > 10
    by_id(browser, "layer-1").click()
    assert colours() == set()


def test_keys_wheel_slider_and_clicks_move_through_the_scans_own_slices(browser: Any) -> None:
    from selenium.webdriver.common.keys import Keys

    pane = by_id(browser, "pane-0")
    pane.send_keys(Keys.ARROW_UP)
    assert where(browser)[0] == "22"
    pane.send_keys(Keys.PAGE_DOWN)
    assert where(browser)[0] == "16"  # the close view begins 12 mm, or 3 slices, below the liver
    browser.execute_script(
        "document.getElementById('pane-0').dispatchEvent(new WheelEvent('wheel', {deltaY: -1, cancelable: true}))"
    )
    assert where(browser)[0] == "17"
    browser.execute_script(
        "const s = document.getElementById('scroll-0'); s.value = 2; s.dispatchEvent(new Event('input'))"
    )
    assert where(browser)[0] == "18"
    drag(browser, 0, (10_000, 10_000))
    # To the patient's left and back: the ends of the close view, which begins 6 voxels before the liver.
    assert where(browser)[1:] == ["25", "43"]


def test_zoom_pan_and_window(browser: Any) -> None:
    def at_lesion() -> list[float]:
        settle(browser)
        found: list[float] = browser.execute_script(
            "const g = geometry(0); return [g.x(mm(2, 57)), g.y(mm(1, 37)), g.perMm]"
        )
        return found

    x, y, per_mm = at_lesion()
    pane = by_id(browser, "pane-0")
    pane.send_keys("+")
    zoomed = at_lesion()
    assert zoomed[2] == pytest.approx(1.25 * per_mm)
    assert zoomed[:2] == pytest.approx([x, y], abs=1)  # zooming keeps the crosshair where it is
    browser.find_element("xpath", "//button[text()='pan']").click()
    drag(browser, 0, (30, -20))
    panned = at_lesion()
    assert panned[:2] == pytest.approx([zoomed[0] + 30, zoomed[1] - 20], abs=1)
    assert where(browser) == ["21", "38", "58"]
    pane.send_keys("0")
    assert at_lesion() == pytest.approx([x, y, per_mm], abs=0.01)
    before = pixel(browser, 0, 44, 45)
    drag(browser, 0, (0, -60), button="right")
    assert pixel(browser, 0, 44, 45)[0] > before[0] + 20  # a lower level is brighter
    assert "window -170 to 130 HU" in by_id(browser, "readout").text
    pane.send_keys("w")
    settle(browser)
    assert "window -110 to 190 HU" in by_id(browser, "readout").text


def test_lesions_are_listed_and_jumped_to(browser: Any) -> None:
    buttons = browser.find_elements("css selector", "#lesions button")
    assert [b.text for b in buttons] == ["○ missed 13.1 mm, 1.2 mL", "✕ false positive 6.5 mm, 0.14 mL"]
    buttons[1].click()
    assert where(browser) == ["27", "34", "52"]
    assert "truth: liver · prediction: tumour" in by_id(browser, "readout").text
    browser.find_element("tag name", "body").send_keys("n")  # round to the first again
    assert where(browser) == ["21", "38", "58"]


def test_a_key_on_a_switch_keeps_the_focus_there(browser: Any) -> None:
    from selenium.webdriver.common.keys import Keys

    browser.find_elements("css selector", "#lesions button")[1].send_keys(Keys.ENTER)
    settle(browser)
    assert browser.switch_to.active_element.text == "✕ false positive 6.5 mm, 0.14 mL"
    browser.find_element("xpath", "//button[text()='wide']").send_keys(Keys.ENTER)
    settle(browser)
    assert browser.switch_to.active_element.text == "wide"


def test_the_tables_on_top_show_all_their_columns(browser: Any) -> None:
    beyond = browser.execute_script(
        "return [...document.querySelectorAll('.headline .scroll')].map((e) => e.scrollWidth - e.clientWidth)"
    )
    assert beyond == [0, 0]


def test_parts_and_cases_change_and_what_was_switched_stays(browser: Any) -> None:
    by_id(browser, "layer-0").click()
    browser.find_element("xpath", "//button[text()='around']").click()
    wait_for(browser, "0/1")
    assert where(browser) == ["21", "38", "58"]  # the place stays
    by_id(browser, "next").click()
    wait_for(browser, "1/0")
    assert by_id(browser, "name").text == "case_1"
    assert not by_id(browser, "layer-0").is_selected()
    browser.find_element("xpath", "//button[@class='open'][text()='case_2']").click()
    wait_for(browser, "2/0")


def test_the_address_holds_case_and_place(page: Path, open_page: Open, browser: Any) -> None:
    by_id(browser, "next").click()
    wait_for(browser, "1/0")
    by_id(browser, "pane-0").send_keys("\ue013")
    until(browser, lambda d: d.current_url.endswith("#case=case_1&part=1&z=23&y=38&x=58"))
    other = open_page(page, fragment="#case=case_2&part=2&z=5&y=6&x=7")
    wait_for(other, "2/1")
    assert where(other) == ["9", "6", "7"]  # 40 mm below the liver is where this part begins
    other.execute_script("location.hash = '#case=case_0&z=20&y=36&x=57'")
    wait_for(other, "0/0")
    assert where(other) == ["20", "36", "57"]
    pressed = "#lesions button[aria-pressed='true']"
    assert not other.find_elements("css selector", pressed)
    other.execute_script("location.hash = '#case=case_0&z=27&y=34&x=52'")  # copied at a lesion
    until(
        other,
        lambda d: (
            [b.text for b in d.find_elements("css selector", pressed)] == ["✕ false positive 6.5 mm, 0.14 mL"]
        ),
    )


def test_the_table_sorts_and_what_has_no_value_comes_last(browser: Any) -> None:
    def order() -> list[str]:
        return [row.text for row in browser.find_elements("css selector", "#rows .open")]

    header = browser.find_element("xpath", "//th/button[text()='Dice']")
    header.click()
    assert order() == ["case_2", "case_0", "case_1"]
    header.click()
    assert order() == ["case_0", "case_2", "case_1"]


def test_help_opens_by_key_and_the_panes_leave_no_hole(browser: Any) -> None:
    browser.find_element("tag name", "body").send_keys("?")
    assert by_id(browser, "help").is_displayed()
    boxes = [by_id(browser, f"pane-{axis}").rect for axis in range(3)]
    assert boxes[0]["width"] > 1.8 * boxes[1]["width"]
    assert boxes[1]["x"] == boxes[2]["x"]
    assert boxes[0]["y"] + boxes[0]["height"] == pytest.approx(boxes[2]["y"] + boxes[2]["height"], abs=3)


def test_many_cases_are_walked_through_file_by_file(tmp_path: Path, open_page: Open) -> None:
    browser = open_page(a_page(tmp_path / "index.html", max_cases=2))
    browser.find_element("link text", "case_1").click()
    wait_for(browser, "0/0")
    assert by_id(browser, "name").text == "case_1"
    by_id(browser, "next").click()
    until(browser, lambda d: "case_2.html" in d.current_url)
    wait_for(browser, "0/0")
    browser.find_element("partial link text", "all 3 cases").click()
    until(browser, lambda d: "index.html" in d.current_url)


def test_on_a_phone(page: Path, open_page: Open) -> None:
    browser = open_page(page, phone=True)
    wait_for(browser, "0/0")
    settle(browser)
    assert browser.execute_script("return document.documentElement.scrollWidth <= innerWidth")
    table = browser.find_element("css selector", ".scroll")
    assert browser.execute_script("return arguments[0].scrollWidth > arguments[0].clientWidth + 100", table)
    small = browser.execute_script("""
      return [...document.querySelectorAll("button, .controls label, .open")].filter((e) => e.offsetParent)
        .map((e) => [e.textContent, e.getBoundingClientRect().height, e.getBoundingClientRect().width])
        .filter(([, height, width]) => height < 43.5 || width < 43.5);""")
    assert small == []
    # The list of lesions is one row to swipe along.
    first, second = browser.find_elements("css selector", "#lesions button")
    assert first.rect["y"] == second.rect["y"]
    second.click()
    settle(browser)
    left, width = browser.execute_script(
        "const e = document.querySelectorAll('#lesions button')[1].getBoundingClientRect(); return [e.left, e.width]"
    )
    assert 0 <= left <= 390 - width
    by_id(browser, "help-open").click()
    assert browser.execute_script("return document.getElementById('help').scrollTop") == 0
    browser.find_element("xpath", "//dialog//button[text()='close']").click()
    # A finger that slides the page past a picture moves nothing; a tap moves the crosshair.
    assert by_id(browser, "pane-0").value_of_css_property("touch-action") == "pan-y"
    before = where(browser)
    browser.execute_script("""
      const pane = document.getElementById("pane-0"); pane.setPointerCapture = () => {};
      const send = (name) => pane.dispatchEvent(new PointerEvent(name, { pointerId: 1, pointerType: "touch",
        buttons: 1, bubbles: true, clientX: 100, clientY: pane.getBoundingClientRect().top + 20 }));
      send("pointerdown"); send("pointercancel");""")
    assert where(browser) == before
    drag(browser, 0, (40, 40), kind="touch")
    assert where(browser) != before
