"""The HTML report in a real browser: its switches, its slider, its width, its legibility."""

from __future__ import annotations

import importlib.util
import shutil

import pytest
from report_case import full_report, make_runs

from era.report import write_report

CHROMIUM = shutil.which("chromium") or shutil.which("google-chrome")
DRIVER = shutil.which("chromedriver")
needs_browser = pytest.mark.skipif(
    not (CHROMIUM and DRIVER and importlib.util.find_spec("selenium")),
    reason="needs chromium and chromedriver (apt-get install chromium chromium-driver) and selenium",
)
FLAGS = (
    "--headless", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run",
    "--disable-background-networking", "--disable-component-update", "--disable-sync",
)  # fmt: skip


@pytest.fixture
def made(tmp_path):
    """The folders of three runs."""
    return make_runs(tmp_path)


@pytest.fixture
def browser(tmp_path):
    """Headless Chromium with an empty profile, its console recorded."""
    from selenium import webdriver
    from selenium.webdriver.chrome.service import Service

    options = webdriver.ChromeOptions()
    options.binary_location = CHROMIUM
    for flag in (*FLAGS, f"--user-data-dir={tmp_path / 'profile'}"):
        options.add_argument(flag)
    options.set_capability("goog:loggingPrefs", {"browser": "ALL"})
    driver = webdriver.Chrome(options=options, service=Service(DRIVER))
    yield driver
    driver.quit()


def set_width(browser, width: int) -> None:
    size = {"width": width, "height": 844, "deviceScaleFactor": 1, "mobile": width < 600}
    browser.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", size)
    media = {"features": [{"name": "prefers-reduced-motion", "value": "reduce"}]}
    browser.execute_cdp_cmd("Emulation.setEmulatedMedia", media)


VISIBLE = """return [...document.querySelectorAll(arguments[0])]
    .filter(e => getComputedStyle(e).display !== "none" && e.getClientRects().length).length"""


@needs_browser
def test_in_a_browser(made, tmp_path, browser):
    path = full_report(made, tmp_path / "report.html")
    set_width(browser, 390)
    browser.get(path.as_uri())

    def visible(selector: str) -> int:
        return browser.execute_script(VISIBLE, selector)

    # The switches: ground truth, the two students, names; the teacher starts hidden.
    assert visible("g.box.truth") == 12 and visible("g.box.m1") == 8 and visible("g.box.m2") == 0
    for target, shown in (("m1", 8), ("truth", 12)):
        button = browser.find_element("css selector", f"[data-switch={target}]")
        browser.execute_script("arguments[0].focus()", button)
        button.send_keys(" ")  # by keyboard
        assert button.get_attribute("aria-pressed") == "false"
        assert visible(f"g.box.{target}") == visible(f"g.tag.{target}") == 0
        button.click()
        assert button.get_attribute("aria-pressed") == "true"
        assert visible(f"g.box.{target}") == visible(f"g.tag.{target}") == shown
    browser.find_element("css selector", "[data-switch=m2]").click()
    assert visible("g.box.m2") == 12
    names = browser.find_element("css selector", "[data-switch=names]")
    names.click()
    assert visible("g.tag") == 0 and visible("g.box.m1") == 8

    # The slider: from 0.3 on, each run has one mistake more in each of the six pictures.
    move = """const s = document.getElementById("threshold"); s.value = arguments[0];
        s.dispatchEvent(new Event("input"));"""
    browser.execute_script(move, "0.25")
    assert visible("g.box.m1") == 14
    counts = [e.text for e in browser.find_elements("css selector", "[data-count=m1] .wrong")]
    assert counts == ["1"] * 6
    browser.execute_script(move, "0.95")
    assert visible("g.box.m1") == 0 and visible("g.box.truth") == 12

    # No scrolling to the side, at either width; every picture is there.
    for width in (390, 1280):
        set_width(browser, width)
        wide = browser.execute_script("return document.documentElement.scrollWidth")
        assert wide <= width
        outside = """return [...document.querySelectorAll("h1, h2, h3, p, figure, .scroll, .tiles")]
            .filter(e => e.getBoundingClientRect().right > innerWidth + 0.5).length"""
        assert browser.execute_script(outside) == 0
        loaded = """document.querySelectorAll("img").forEach(i => i.loading = "eager");
            return Promise.all([...document.images].map(i => i.decode().then(() => i.naturalWidth)))"""
        assert browser.execute_script(loaded) == [160] * 6
    assert browser.get_log("browser") == []


@needs_browser
def test_texts_are_legible_in_a_browser(made, tmp_path, browser):
    """WCAG's contrast of 4.5 between text and what it stands on, and no text below 10 px on a phone."""
    browser.get(full_report(made, tmp_path / "report.html").as_uri())
    contrast = """
        const rgb = c => (c.match(/[\\d.]+/g) || []).map(Number);
        const lum = c => { const [r, g, b] = c.slice(0, 3).map(v => { v /= 255;
            return v <= .03928 ? v / 12.92 : ((v + .055) / 1.055) ** 2.4; });
            return .2126 * r + .7152 * g + .0722 * b; };
        const ground = e => { for (; e; e = e.parentElement) {
            const c = rgb(getComputedStyle(e).backgroundColor);
            if (c.length === 3 || c[3] === 1) return c; } return [255, 255, 255]; };
        const worst = [];
        for (const e of document.querySelectorAll("p,th,td,small,button span,dt,dd b,li,a,caption,span")) {
            if (!e.textContent.trim() || !e.getClientRects().length) continue;
            const [a, b] = [lum(rgb(getComputedStyle(e).color)), lum(ground(e))];
            const ratio = (Math.max(a, b) + .05) / (Math.min(a, b) + .05);
            if (ratio < 4.5) worst.push([e.tagName, e.className, e.textContent.slice(0, 20), ratio]);
        }
        return worst;"""
    smallest = """return Math.min(...[...document.querySelectorAll(".chart text, .tag text")]
        .filter(e => e.getClientRects().length)
        .map(e => parseFloat(getComputedStyle(e).fontSize) * e.getScreenCTM().a))"""
    set_width(browser, 390)
    assert browser.execute_script(contrast) == []
    assert browser.execute_script(smallest) >= 10


@needs_browser
def test_masks_are_switched_with_their_boxes_and_by_themselves(tmp_path, browser):
    made = make_runs(tmp_path, masks=True)
    set_width(browser, 1280)
    browser.get(write_report([made["plain"], made["era"]], tmp_path / "r.html").as_uri())

    def visible(selector: str) -> int:
        return browser.execute_script(VISIBLE, selector)

    def click(target: str) -> None:
        browser.find_element("css selector", f"[data-switch={target}]").click()

    assert visible(".truth .mask") == 12 and visible(".m1 .mask") == 8
    click("m1")
    assert visible(".m1 .mask") == 0 and visible(".truth .mask") == 12
    click("m1")
    click("masks")
    assert visible(".mask") == 0 and visible(".m1 .stroke") == 8
    assert browser.get_log("browser") == []


@needs_browser
def test_the_drawings_of_a_page_keep_their_own_look(made, tmp_path, browser):
    """Every chart is drawn in its runs' colours, as high as it should be, with its text inside."""
    browser.get(write_report([made["plain"], made["era"]], tmp_path / "r.html").as_uri())
    set_width(browser, 1280)
    drawn = browser.execute_script("""
        return [...document.querySelectorAll(".chart > svg")].map(svg => {
            const whole = svg.getBoundingClientRect();
            const outside = [...svg.querySelectorAll("text")].map(t => t.getBoundingClientRect())
                .filter(r => r.left < whole.left - 1 || r.right > whole.right + 1
                    || r.bottom > whole.bottom + 1).length;
            const lines = [...svg.querySelectorAll("path")].filter(p => p.getTotalLength() > 100)
                .map(p => getComputedStyle(p).stroke);
            return [whole.height / whole.width, outside, lines]; })""")
    assert len(drawn) == 2
    for ratio, outside, lines in drawn:
        assert abs(ratio - 320 / 480) < 0.01 and outside == 0
        assert "rgb(0, 114, 178)" in lines  # the second run, and the first term
