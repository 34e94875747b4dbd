"""The report in headless Chromium: wide, on a phone, and in dark mode. Skipped where Chromium or its driver is missing."""

from __future__ import annotations

import re
import shutil
from collections.abc import Iterator
from typing import Any

import pytest
from test_report import HOSTILE, NOISY_LABELS, bare, make_comparison, many_arms

from equipoise.comparison.report import write_report

webdriver = pytest.importorskip("selenium.webdriver", reason="selenium is not installed: pip install 'equipoise[dev]'")
from selenium.webdriver.common.by import By  # noqa: E402
from selenium.webdriver.common.keys import Keys  # noqa: E402

pytestmark = pytest.mark.browser
CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
DRIVER = shutil.which("chromedriver")
FLAGS = (
    "--headless=new",
    "--no-sandbox",
    "--disable-gpu",
    "--disable-dev-shm-usage",
    "--disable-quic",
    "--no-first-run",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
    "--disable-default-apps",
    "--disable-extensions",
)
BOXES = """return [...document.querySelectorAll("svg[role=img], img, canvas")].filter(e => !e.closest("details:not([open])"))
    .map(e => [e.getAttribute("aria-label").slice(0, 60), e.getBoundingClientRect().width, e.getBoundingClientRect().height])"""
# Text that sticks out of the window on the right or the left, outside containers that scroll.
SPILLED = """return [...document.querySelectorAll("svg text, p, h1, h2, h3, dd, li, summary")].filter(e => !e.closest(".scroll"))
    .filter(e => { const b = e.getBoundingClientRect(); return b.width && (b.right > innerWidth + 1 || b.left < -1) })
    .filter(e => !e.closest(".hidden")).map(e => e.textContent.slice(0, 60))"""
# Labels of one drawing that cover each other.
COVERED = """return [...document.querySelectorAll("svg[role=img]")].flatMap(svg => {
    const boxes = [...svg.querySelectorAll("text")].map(e => [e.textContent, e.getBoundingClientRect()]).filter(([, b]) => b.width);
    return boxes.flatMap(([s, a], i) => boxes.slice(i + 1).filter(([, b]) =>
        Math.min(a.right, b.right) - Math.max(a.left, b.left) > 1 && Math.min(a.bottom, b.bottom) - Math.max(a.top, b.top) > 3)
        .map(([t]) => `${s} | ${t}`)) })"""


@pytest.fixture(scope="module")
def reports(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    hostile = (NOISY_LABELS[0], (HOSTILE, HOSTILE, 0.05, 3.0, 0.1))
    cases = {
        "usual": make_comparison(),
        "many": many_arms(),
        "bare": bare(),
        "hostile": make_comparison(hostile, command=HOSTILE),
    }
    folder = tmp_path_factory.mktemp("reports")
    return {name: write_report(found, folder / name).as_uri() for name, found in cases.items()}


@pytest.fixture(scope="module")
def browser(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Any]:
    if not CHROMIUM or not DRIVER:
        pytest.skip("no chromium or chromedriver: install Debian's chromium and chromium-driver")
    options = webdriver.ChromeOptions()
    options.binary_location = CHROMIUM
    for flag in (*FLAGS, f"--user-data-dir={tmp_path_factory.mktemp('profile')}"):
        options.add_argument(flag)
    options.set_capability("goog:loggingPrefs", {"browser": "ALL", "performance": "ALL"})
    driver = webdriver.Chrome(options=options, service=webdriver.ChromeService(DRIVER))
    yield driver
    driver.quit()


def show(browser: Any, address: str, *, width: int = 1200, height: int = 900, dark: bool = False) -> None:
    size = {"width": width, "height": height, "deviceScaleFactor": 1, "mobile": width < 600}
    browser.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", size)
    scheme = {"name": "prefers-color-scheme", "value": "dark" if dark else "light"}
    browser.execute_cdp_cmd("Emulation.setEmulatedMedia", {"media": "", "features": [scheme]})
    browser.get(address)


@pytest.mark.parametrize("case", ["usual", "many", "bare", "hostile"])
@pytest.mark.parametrize("width", [1200, 375])
def test_page_is_whole_and_fits(browser: Any, reports: dict[str, str], case: str, width: int) -> None:
    browser.get_log("browser"), browser.get_log("performance")
    show(browser, reports[case], width=width)
    assert browser.get_log("browser") == []
    asked = re.findall(
        r'"url":"([^"]*)"',
        " ".join(e["message"] for e in browser.get_log("performance") if "requestWillBeSent" in e["message"]),
    )
    assert {url.split(":")[0] for url in asked} <= {"file", "data"}
    assert browser.execute_script("return document.documentElement.scrollWidth") <= width
    for opened in (False, True):
        if opened:
            browser.execute_script("document.querySelectorAll('details').forEach(d => { d.open = true })")
        boxes = browser.execute_script(BOXES)
        assert boxes or case == "bare"
        assert all(w > 80 and h > 40 for _, w, h in boxes), boxes
        assert browser.execute_script(SPILLED) == []
        assert browser.execute_script(COVERED) == []
        assert browser.execute_script("return document.documentElement.scrollWidth") <= width
    assert browser.execute_script("return window.hacked") is None


def column(browser: Any, index: int) -> list[str]:
    return browser.execute_script(  # type: ignore[no-any-return]
        "return [...document.querySelectorAll('#leaderboard tbody tr')].map(r => r.cells[arguments[0]].textContent)",
        index,
    )


def test_leaderboard_sorts_by_click_and_by_keyboard(browser: Any, reports: dict[str, str]) -> None:
    show(browser, reports["usual"])
    headers = browser.find_elements(By.CSS_SELECTOR, "#leaderboard thead th")
    means = column(browser, 2)
    assert headers[2].get_attribute("aria-sort") == "descending"
    assert means == sorted(means, key=float, reverse=True)

    headers[2].find_element(By.TAG_NAME, "button").click()
    assert headers[2].get_attribute("aria-sort") == "ascending"
    assert column(browser, 2) == means[::-1]

    headers[0].find_element(By.TAG_NAME, "button").send_keys(Keys.ENTER)
    assert headers[0].get_attribute("aria-sort") == "ascending"
    assert headers[2].get_attribute("aria-sort") is None
    assert column(browser, 0) == sorted(column(browser, 0))
    assert browser.find_element(By.ID, "sorted").get_attribute("textContent") == "Sorted by Arm, ascending"

    for direction in ("descending", "ascending"):
        headers[5].find_element(By.TAG_NAME, "button").send_keys(Keys.SPACE)
        assert headers[5].get_attribute("aria-sort") == direction
        differences = column(browser, 5)
        assert differences[-1] == ""  # the baseline has none, and stays last
        numbers = [float(text.replace("−", "-")) for text in differences[:-1]]
        assert numbers == sorted(numbers, reverse=direction == "descending")


def test_tab_reaches_the_skip_link_the_contents_and_the_table(browser: Any, reports: dict[str, str]) -> None:
    show(browser, reports["usual"])
    seen = []
    for _ in range(14):
        browser.switch_to.active_element.send_keys(Keys.TAB)
        seen.append(
            browser.execute_script(
                "const e = document.activeElement; return [e.tagName, e.textContent.trim().slice(0, 20)]"
            )
        )
    assert seen[0] == ["A", "Skip to the results"]
    assert ["A", "Verdicts"] in seen
    assert ["BUTTON", "Arm"] in seen


def test_dark_mode_reaches_page_and_figures(browser: Any, reports: dict[str, str]) -> None:
    colours = """const style = (q, p) => getComputedStyle(document.querySelector(q))[p];
        return [style("body", "backgroundColor"), style("body", "color"),
            style("#forest text.name", "fill"), style("#forest .halo", "stroke")]"""
    show(browser, reports["usual"])
    light = browser.execute_script(colours)
    show(browser, reports["usual"], dark=True)
    dark = browser.execute_script(colours)

    def brightness(colour: str) -> int:
        return sum(map(int, re.findall(r"\d+", colour)[:3]))

    assert brightness(light[0]) > 600 > 200 > brightness(light[1])
    assert brightness(dark[0]) < 200 < 600 < brightness(dark[1])
    for colour, page in ((light, light[0]), (dark, dark[0])):
        assert colour[2] == colour[1]
        assert colour[3] == page


def test_screen_reader_finds_landmarks_names_and_tables(browser: Any, reports: dict[str, str]) -> None:
    show(browser, reports["usual"])
    nodes = browser.execute_cdp_cmd("Accessibility.getFullAXTree", {})["nodes"]
    roles: dict[str, list[str]] = {}
    for node in nodes:
        if not node.get("ignored"):
            roles.setdefault(node["role"]["value"], []).append(str(node.get("name", {}).get("value", "")))
    assert {"banner", "navigation", "main", "contentinfo", "complementary"} <= set(roles)
    pictures = roles.get("image", []) + roles.get("img", [])
    assert len(pictures) >= 3 + 2 * len(NOISY_LABELS)
    assert all(len(name) > 10 for name in pictures)
    assert all(roles["table"])
    assert len(roles["rowheader"]) >= len(NOISY_LABELS)
    assert all(roles["region"])
    assert all(roles["button"])


def test_paper_shows_the_closed_parts(browser: Any, reports: dict[str, str]) -> None:
    show(browser, reports["usual"])
    closed = "return document.querySelectorAll('details:not([open])').length"
    before = browser.execute_script(closed)
    assert before > 5
    browser.execute_script("dispatchEvent(new Event('beforeprint'))")
    assert browser.execute_script(closed) == 0
    browser.execute_script("dispatchEvent(new Event('afterprint'))")
    assert browser.execute_script(closed) == before
