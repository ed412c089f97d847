"""The pages in a real browser, wide and narrow, light and dark: nothing overflows, nothing in a picture is cut off.

Skipped where there is no Chromium; `.ci/run` installs it where it may.
"""

from __future__ import annotations

import json
import re
import shutil
import subprocess
from html import unescape
from pathlib import Path
from typing import Any

import pytest

from compress.reports.html import render_html
from compress.reports.previous import compare
from compress.reports.report import Report, ServingPoint
from compress.reports.site import Entry, Shelf, site
from compress.reports.standing import ChannelMark, Standing, Waiver

from .example import HOSTILE, example_report, hostile_report, memory, task

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
FLAGS = [
    *("--headless", "--no-sandbox", "--disable-gpu", "--hide-scrollbars", "--allow-file-access-from-files"),
    *("--no-first-run", "--disable-background-networking", "--disable-component-update", "--disable-sync"),
]
DARK = "--blink-settings=preferredColorScheme=0"
MEASURE = """
const page = document.querySelector('iframe').contentDocument, root = page.documentElement;
const wide = root.clientWidth, out = [], style = page.defaultView.getComputedStyle(page.body);
const edge = page.body.getBoundingClientRect().right - parseFloat(style.paddingRight);
for (const each of page.body.querySelectorAll('*')) {
  const head = each.closest('thead');  // on narrow pages it is for screen readers only
  if (head && page.defaultView.getComputedStyle(head).position === 'absolute') continue;
  const box = each.getBoundingClientRect();
  if (box.width > 1.5 && (box.right > edge + 1 || box.left < -1)) out.push(each.tagName + ' ' + each.className);
}
for (const text of page.querySelectorAll('svg text')) {
  const inside = text.getBoundingClientRect(), around = text.closest('svg').getBoundingClientRect();
  if (inside.right > around.right + 1 || inside.left < around.left - 1 || inside.bottom > around.bottom + 1)
    out.push('cut off: ' + text.textContent);
}
const ground = style.backgroundColor;
const size = Math.min(...[...page.querySelectorAll('p, td, li, dd')].map(
  each => parseFloat(page.defaultView.getComputedStyle(each).fontSize)));
document.title = JSON.stringify({content: root.scrollWidth, window: wide, out, ground, size});
"""

pytestmark = pytest.mark.skipif(CHROMIUM is None, reason="no Chromium on this machine: apt-get install chromium")


def chromium(folder: Path, *arguments: str) -> str:
    command = [str(CHROMIUM), *FLAGS, f"--user-data-dir={folder / 'profile'}", *arguments]
    return subprocess.run(command, capture_output=True, text=True, timeout=60, check=True).stdout


def measured(page: Path, width: int, *flags: str) -> dict[str, Any]:
    """Width of the content and of the window, what lies outside, the ground's colour, the smallest text in pixels.

    The window is a frame: Chromium's own has a least width. The script that measures is outside the page.
    """
    frame = page.with_name(f"frame-{page.stem}-{width}.html")
    frame.write_text(
        f'<iframe src="{page.name}" width={width} height=800 style="border:0"></iframe>'
        f"<script>onload = () => {{{MEASURE}}}</script>"
    )
    dom = chromium(page.parent, *flags, "--dump-dom", frame.as_uri())
    found = re.search(r"<title>(\{.*?\})</title>", dom)
    assert found, dom[:500]
    read: dict[str, Any] = json.loads(unescape(found[1]))
    return read


def full_report() -> Report:
    """Everything a report can show at once."""
    served = [
        ServingPoint(context=context, concurrency=many, kv_cache_bytes=131_072 * context * many)
        for context in (4096, 8192, 16384, 32768, 65536, 131_072)
        for many in (1, 4, 8, 16, 64)
    ]
    report = example_report(
        "failed", tasks=[task()], memory=memory().model_copy(update={"serving": served, "max_context": 131_072})
    )
    return report.model_copy(update={"previous": compare(report, example_report(), "the newest version that passed")})


def write_pages(folder: Path) -> dict[str, Path]:
    waiver = Waiver(
        "kim", "needed for the demonstration in spring", "2026-05-01", ("perplexity.x",), "SHA256:" + "a" * 43
    )
    standing = Standing((ChannelMark("production", "2026-02-01T10:00:00Z", "kim"),), (waiver,))
    hostile = Standing((ChannelMark(*[HOSTILE] * 3),), (Waiver(*[HOSTILE] * 3, (HOSTILE,), HOSTILE),))
    digest = "ab" * 32
    entries = tuple(
        Entry(f"v000{at}", report.verdict, "2026-01-05T10:00:00", 1, digest, standing, report)
        for at, report in ((2, full_report()), (1, example_report()))
    )
    pages = site([Shelf("a-model-with-quite-a-long-name-as-people-give-them", entries)], "Models")
    texts = {
        "report": render_html(full_report(), standing),
        "hostile": render_html(hostile_report(), hostile),
        "index": pages["index.html"],
        "model": next(text for path, text in pages.items() if path.startswith("models/") and path.count("/") == 2),
    }
    for name, text in texts.items():
        (folder / f"{name}.html").write_text(text, encoding="utf-8")
    return {name: folder / f"{name}.html" for name in texts}


@pytest.mark.parametrize("width", [400, 700, 1000, 1280])
@pytest.mark.parametrize("kind", ["report", "hostile", "index", "model"])
def test_nothing_overflows_and_text_is_large_enough(tmp_path: Path, kind: str, width: int) -> None:
    found = measured(write_pages(tmp_path)[kind], width)
    assert found["window"] == width
    assert found["content"] <= width and found["out"] == []
    assert found["size"] >= 12


@pytest.mark.parametrize(("flags", "ground"), [((), "rgb(255, 255, 255)"), ((DARK,), "rgb(15, 19, 24)")])
@pytest.mark.parametrize("width", [400, 1280])
def test_light_and_dark_follow_the_reader(tmp_path: Path, flags: tuple[str, ...], ground: str, width: int) -> None:
    found = measured(write_pages(tmp_path)["report"], width, *flags)
    assert found["ground"] == ground
    assert found["content"] <= width and found["out"] == []


def test_the_measurement_notices_what_is_too_wide_and_what_is_cut_off(tmp_path: Path) -> None:
    page = tmp_path / "report.html"
    wide = '<div style="width: 500px">wide</div><svg viewBox="0 0 9 9" width="9"><text>cut</text></svg></body>'
    page.write_text(render_html(example_report()).replace("</body>", wide), encoding="utf-8")
    found = measured(page, 400)
    assert found["content"] > found["window"]
    assert any(each.startswith("DIV") for each in found["out"]) and "cut off: cut" in found["out"]


def test_it_prints_on_white_paper_whatever_the_screen(tmp_path: Path) -> None:
    page = write_pages(tmp_path)["report"]
    chromium(tmp_path, DARK, "--no-pdf-header-footer", f"--print-to-pdf={tmp_path / 'report.pdf'}", page.as_uri())
    content = (tmp_path / "report.pdf").read_bytes()
    assert content.startswith(b"%PDF") and 3 <= len(re.findall(rb"/Type\s*/Page\b", content)) <= 20


def test_a_picture_of_it_can_be_taken(tmp_path: Path) -> None:
    page = write_pages(tmp_path)["report"]
    shot = tmp_path / "shot.png"
    chromium(tmp_path, "--window-size=1280,900", f"--screenshot={shot}", page.as_uri())
    assert shot.read_bytes().startswith(b"\x89PNG") and shot.stat().st_size > 20_000
