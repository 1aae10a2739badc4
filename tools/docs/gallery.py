#!/usr/bin/env python3
"""Renew the pictures of docs/gallery.md out of the folder of a demo: its figures, and its report as a browser shows it.

    python tools/docs/gallery.py output/demo docs/gallery

needs selenium (extra dev), chromium and chromedriver (apt-get install chromium chromium-driver).
"""

import argparse
import io
import shutil
from pathlib import Path

from PIL import Image
from selenium import webdriver
from selenium.webdriver.chrome.service import Service
from selenium.webdriver.common.by import By

FIGURES = ("ap.png", "losses.png", "charts.png")
WIDTH, HEIGHT = 1100, 900  # of the browser's window, CSS pixels
COLOURS = (
    128  # of a picture's palette: figures and pages need no more, and stay small in the repository
)


def main() -> None:
    """Write the pictures into the folder."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("demo", type=Path, help="folder that make demo left")
    parser.add_argument("output", type=Path, help="folder for the pictures")
    args = parser.parse_args()
    args.output.mkdir(parents=True, exist_ok=True)
    for name in FIGURES:
        save(Image.open(args.demo / name), args.output / name)
    for name, picture in sections(args.demo / "report.html"):
        save(picture, args.output / f"report_{name}.png")


def sections(report: Path):
    """Yield every section of a report, by its name, as far as one window of a browser shows it."""
    options = webdriver.ChromeOptions()
    options.binary_location = shutil.which("chromium")
    for flag in ("--headless", "--no-sandbox", "--disable-gpu", f"--window-size={WIDTH},{HEIGHT}"):
        options.add_argument(flag)
    browser = webdriver.Chrome(options=options, service=Service(shutil.which("chromedriver")))
    try:
        browser.get(report.resolve().as_uri())
        for section in browser.find_elements(By.TAG_NAME, "section"):
            browser.execute_script("arguments[0].scrollIntoView({behavior: 'instant'})", section)
            picture = Image.open(io.BytesIO(browser.get_screenshot_as_png()))
            yield section.get_attribute("id"), picture
    finally:
        browser.quit()


def save(picture: Image.Image, path: Path) -> None:
    """Write a PNG of few colours, and say how large it is."""
    flat = Image.new("RGB", picture.size, "white")
    flat.paste(picture, mask=picture.getchannel("A") if picture.mode == "RGBA" else None)
    flat.quantize(COLOURS, method=Image.Quantize.MEDIANCUT, dither=Image.Dither.NONE).save(
        path, optimize=True
    )
    print(f"{path}: {path.stat().st_size / 1024:.0f} KiB")


if __name__ == "__main__":
    main()
