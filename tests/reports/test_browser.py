"""The page in a real browser: nothing is wider than the window. Skipped where there is no Chromium."""

from __future__ import annotations

import re
import shutil
import subprocess
from pathlib import Path

import pytest

from compress.reports.html import render_html

from .example import example_report, hostile_report

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
FLAGS = [
    *("--headless", "--no-sandbox", "--disable-gpu", "--hide-scrollbars", "--allow-file-access-from-files"),
    *("--no-first-run", "--disable-background-networking", "--disable-component-update", "--disable-sync"),
]


def widths(page: Path, width: int, profile: Path) -> tuple[int, int]:
    """(width of the content, width of the window) of `page` in a window of `width` pixels.

    The window is a frame: Chromium's own has a least width. The script that measures is outside the page.
    """
    frame = page.with_name(f"frame{width}.html")
    frame.write_text(
        f'<iframe src="{page.name}" width={width} height=800 style="border:0"></iframe><script>onload = () => {{'
        "const root = document.querySelector('iframe').contentDocument.documentElement;"
        "document.title = `${root.scrollWidth} ${root.clientWidth}`}</script>"
    )
    command = [str(CHROMIUM), *FLAGS, f"--user-data-dir={profile}", "--dump-dom", frame.as_uri()]
    dom = subprocess.run(command, capture_output=True, text=True, timeout=60, check=True).stdout
    found = re.search(r"<title>(\d+) (\d+)</title>", dom)
    assert found, dom[:500]
    return int(found[1]), int(found[2])


pytestmark = pytest.mark.skipif(CHROMIUM is None, reason="no Chromium on this machine")


@pytest.mark.parametrize("width", [400, 1280])
@pytest.mark.parametrize("kind", ["example", "hostile"])
def test_nothing_overflows(tmp_path: Path, kind: str, width: int) -> None:
    page = tmp_path / "report.html"
    page.write_text(render_html(example_report() if kind == "example" else hostile_report()), encoding="utf-8")
    content, window = widths(page, width, tmp_path / "profile")
    assert window == width
    assert content <= window


def test_the_measurement_notices_what_is_too_wide(tmp_path: Path) -> None:
    page = tmp_path / "report.html"
    wide = '<div style="width: 500px">wide</div></body>'
    page.write_text(render_html(example_report()).replace("</body>", wide), encoding="utf-8")
    content, window = widths(page, 400, tmp_path / "profile")
    assert content > window
