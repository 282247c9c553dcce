"""The report in a real browser: it fetches and runs nothing, follows the theme, and is no wider than a phone."""

import html
import json
import re
import shutil
import subprocess
import threading
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest

from pipeline.report.page import finish_run, write_report
from pipeline.settings import PipelineConfig
from pipeline.stages import finished_stages

CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome", "chrome"))), None)
pytestmark = [pytest.mark.spark, pytest.mark.skipif(CHROMIUM is None, reason="no Chromium on this machine")]
FLAGS = (
    "--headless", "--no-sandbox", "--disable-gpu", "--no-first-run", "--disable-background-networking", "--hide-scrollbars",
    "--allow-file-access-from-files", "--virtual-time-budget=5000", "--dump-dom",
)  # fmt: skip
WIDTHS = (360, 390, 1200)
# A page that shows another in frames of several widths, and then nothing but what it has seen in them.
MEASURE = """<!doctype html><body><script>
const frames = %s.map(width => {
  const frame = document.createElement("iframe")
  Object.assign(frame, {src: "%s", width, height: 844})
  document.body.append(frame)
  return frame
})
function seen(frame) {
  const page = frame.contentDocument, style = (node, name) => node && frame.contentWindow.getComputedStyle(node)[name]
  page.querySelectorAll("details").forEach(part => part.open = true)
  const texts = [...page.querySelectorAll(".chart text")]
  const line = [...page.querySelectorAll(".chart path")].find(path => path.style.stroke == "var(--c0)")
  return {
    width: page.documentElement.scrollWidth, ground: style(page.body, "backgroundColor"), line: style(line, "stroke"),
    fonts: [...new Set([page.body, ...texts].map(node => style(node, "fontFamily")))],
    legible: texts.every(node => node.getBoundingClientRect().height > 9),
    text: page.body.innerText, title: page.title, active: page.scripts.length + page.images.length,
    links: [...page.links].map(link => link.getAttribute("href")),
  }
}
addEventListener("load", () => setTimeout(() => document.body.textContent = JSON.stringify(frames.map(seen)), 1000))
</script>"""
Look = Callable[..., list[dict[str, Any]]]


@pytest.fixture
def requests() -> Iterator[list[str]]:
    """What browsers ask of ads.invalid; the first element is where it really is."""
    asked: list[str] = []

    class AdServer(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            asked.append(self.path)
            self.send_error(404)

        def log_message(self, *_: object) -> None: ...

    with ThreadingHTTPServer(("127.0.0.1", 0), AdServer) as server:
        asked.append(f"127.0.0.1:{server.server_port}")
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield asked
        server.shutdown()


@pytest.fixture
def look(tmp_path: Path, requests: list[str]) -> Look:
    """What a browser shows of a page in frames of some widths."""

    def look(page: Path, *, dark: bool = False, widths: tuple[int, ...] = WIDTHS) -> list[dict[str, Any]]:
        measure = tmp_path / "measure.html"
        measure.write_text(MEASURE % (list(widths), page.as_uri()), encoding="utf-8")
        rules = (f"--host-resolver-rules=MAP ads.invalid {requests[0]}", f"--user-data-dir={tmp_path / 'profile'}")
        theme = f"--blink-settings=preferredColorScheme={0 if dark else 1}"
        command = [str(CHROMIUM), *FLAGS, *rules, theme, measure.as_uri()]
        done = subprocess.run(command, capture_output=True, text=True, timeout=120, check=True)
        return json.loads(html.unescape(re.findall(r"<body>(.*)</body>", done.stdout, re.S)[0]))

    return look


@pytest.fixture(scope="module")
def report(finished_run: PipelineConfig, hostile: str) -> Path:
    """The report of a whole run, in which MLflow's answer is hostile too."""
    records = list(finished_stages(finished_run.folder).values())
    finish_run(finished_run, "relevance-pipeline", records, [1.0] * len(records))
    file = finished_run.folder / "summary.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {"untracked": {"teacher": hostile}}))
    return write_report(finished_run.folder)


@pytest.mark.parametrize("dark", [False, True])
def test_hostile_text_stays_text_and_the_page_fits_its_screen(
    look: Look, report: Path, requests: list[str], hostile: str, dark: bool
) -> None:
    for width, page in zip(WIDTHS, look(report, dark=dark), strict=True):
        assert page["width"] <= width
        assert page["ground"] == ("rgb(20, 23, 27)" if dark else "rgb(255, 255, 255)")
        # The charts follow: the first line of each has the theme's first colour, and its text the page's font.
        assert page["line"] == ("rgb(99, 179, 255)" if dark else "rgb(11, 92, 173)")
        assert (len(page["fonts"]), page["legible"]) == (1, True)
        # Query, text and reason of the examples and of those for a second look, at least.
        assert page["text"].count(hostile) >= 3 * (30 + 20)
        assert page["active"] == 0
        assert {link[0] for link in page["links"]} == {"#"}
    assert requests[1:] == []


def test_the_policy_holds_for_text_that_is_not_escaped(
    look: Look, report: Path, requests: list[str], tmp_path: Path, hostile: str
) -> None:
    bad = f"<style>@import url(http://ads.invalid/y.css)</style>{hostile.replace('alert', 'document.title = ')}"
    (tmp_path / "bad.html").write_text(f"<!doctype html><title>t</title>{bad}", encoding="utf-8")
    text = report.read_text(encoding="utf-8").replace("<h1>", f"{bad}<h1>")
    (tmp_path / "report.html").write_text(text, encoding="utf-8")
    (page,) = look(tmp_path / "report.html", widths=(1200,))
    assert (page["title"], page["active"] > 0, requests[1:]) == ("tiny – relevance report", True, [])
    # Without a policy the same text does what it is made for: else this test would prove nothing.
    (page,) = look(tmp_path / "bad.html", widths=(1200,))
    assert page["title"] in ("x", "1")
    assert {"/x.css", "/y.css"} <= set(requests)
