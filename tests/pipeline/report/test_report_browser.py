"""The report in a real browser: nothing is fetched or run, no console line, nothing wider than a phone."""

import contextlib
import json
import shutil
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from urllib.request import urlopen

import pytest

from pipeline.report.page import finish_run, write_report
from pipeline.settings import PipelineConfig
from pipeline.stages import finished_stages

websockets = pytest.importorskip("websockets.sync.client")
CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome", "chrome"))), None)
pytestmark = [pytest.mark.spark, pytest.mark.skipif(CHROMIUM is None, reason="no Chromium on this machine")]
FLAGS = (
    "--headless", "--no-sandbox", "--disable-gpu", "--no-first-run", "--disable-background-networking", "--disable-sync",
    "--disable-component-update", "--hide-scrollbars", "--remote-debugging-port=0",
)  # fmt: skip
WATCHED = ("Page", "Network", "Runtime", "Log", "Audits")


class Browser:
    """One page of a headless Chromium, over its DevTools protocol; `events` is all that it reported since `open`."""

    def __init__(self, socket: Any) -> None:
        self._socket, self._sent = socket, 0
        self.events: list[dict[str, Any]] = []
        for domain in WATCHED:
            self.call(f"{domain}.enable")

    def call(self, method: str, **parameters: Any) -> dict[str, Any]:
        sent = self._send(method, **parameters)
        while (message := json.loads(self._socket.recv(timeout=60))).get("id") != sent:
            self._note(message)
        assert "error" not in message, message
        return message["result"]

    def _send(self, method: str, **parameters: Any) -> int:
        self._sent += 1
        self._socket.send(json.dumps({"id": self._sent, "method": method, "params": parameters}))
        return self._sent

    def _note(self, message: dict[str, Any]) -> None:
        if "method" not in message:  # the answer to a request of this function
            return
        self.events.append(message)
        if message["method"] == "Page.javascriptDialogOpening":  # an alert would hold the page, and this test
            self._send("Page.handleJavaScriptDialog", accept=True)

    def open(self, file: Path) -> None:
        self.events = []
        self.call("Page.navigate", url=file.as_uri())
        deadline = time.monotonic() + 60
        while not self.seen("Page.loadEventFired"):
            if time.monotonic() > deadline:
                raise TimeoutError(f"{file} does not load")
            with contextlib.suppress(TimeoutError):
                self._note(json.loads(self._socket.recv(timeout=1)))
        self.run("document.querySelectorAll('details').forEach(part => part.open = true)")
        self.run("new Promise(done => requestAnimationFrame(() => setTimeout(done, 100)))")  # what a page does late

    def seen(self, method: str) -> list[dict[str, Any]]:
        return [event["params"] for event in self.events if event["method"] == method]

    def run(self, script: str) -> Any:
        found = self.call("Runtime.evaluate", expression=script, returnByValue=True, awaitPromise=True)
        assert "exceptionDetails" not in found, found
        return found["result"].get("value")

    def complaints(self) -> list[str]:
        """Whatever a page may not do: messages, errors, dialogs, breaches of the policy."""
        methods = ("Runtime.consoleAPICalled", "Runtime.exceptionThrown", "Log.entryAdded", "Page.javascriptDialogOpening",
                   "Audits.issueAdded")  # fmt: skip
        return [json.dumps(event) for event in self.events if event["method"] in methods]

    def requests(self) -> list[str]:
        return [event["request"]["url"] for event in self.seen("Network.requestWillBeSent")]


@pytest.fixture(scope="module")
def browser(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Browser]:
    profile = tmp_path_factory.mktemp("chromium")
    process = subprocess.Popen(
        [str(CHROMIUM), *FLAGS, f"--user-data-dir={profile}", "about:blank"],
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )
    try:
        port = profile / "DevToolsActivePort"
        deadline = time.monotonic() + 60
        while not (port.exists() and "\n" in port.read_text()):
            if process.poll() is not None or time.monotonic() > deadline:
                pytest.skip("Chromium does not start on this machine")
            time.sleep(0.1)
        with urlopen(f"http://127.0.0.1:{port.read_text().split()[0]}/json", timeout=60) as pages:
            page = next(page for page in json.load(pages) if page["type"] == "page")
        with websockets.connect(page["webSocketDebuggerUrl"], max_size=None) as socket:
            yield Browser(socket)
    finally:
        process.terminate()
        process.wait(timeout=60)


def test_the_watch_sees_what_a_page_does(browser: Browser, tmp_path: Path, hostile: str) -> None:
    """Without this the next test would prove nothing: the same text, not escaped, in a page without a policy."""
    page = tmp_path / "bad.html"
    page.write_text(f"<!doctype html><p>{hostile}</p>", encoding="utf-8")
    browser.open(page)
    assert browser.seen("Page.javascriptDialogOpening")
    assert any("ads.invalid" in url for url in browser.requests())


@pytest.fixture(scope="module")
def report(finished_run: PipelineConfig, hostile: str) -> Path:
    """The report of a whole run, in which MLflow's answer is hostile too."""
    records = list(finished_stages(finished_run.folder).values())
    finish_run(finished_run, "relevance-pipeline", records, [1.0] * len(records))
    file = finished_run.folder / "summary.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {"untracked": {"teacher": hostile}}))
    return write_report(finished_run.folder)


def test_hostile_text_stays_text(browser: Browser, report: Path, hostile: str) -> None:
    browser.open(report)
    assert browser.requests() == [report.as_uri()]
    assert browser.complaints() == []
    text = browser.run("document.body.innerText")
    # Query, text and reason of the examples and of those for a second look, at least.
    assert text.count(hostile) >= 3 * (30 + 20)
    assert browser.run("document.scripts.length + document.images.length") == 0
    assert browser.run("[...document.links].every(link => link.getAttribute('href').startsWith('#'))")


def test_the_policy_holds_for_text_that_is_not_escaped(
    browser: Browser, report: Path, tmp_path: Path, hostile: str
) -> None:
    bad = (
        f"<style>@import url(http://ads.invalid/y.css); h1 {{ background: url(http://ads.invalid/z) }}</style>{hostile}"
    )
    text = report.read_text(encoding="utf-8").replace("<h1>", f"{bad}<h1>")
    report = tmp_path / "report.html"
    report.write_text(text, encoding="utf-8")
    browser.open(report)
    assert not browser.seen("Page.javascriptDialogOpening")
    answered = [event["response"]["url"] for event in browser.seen("Network.responseReceived")]
    assert answered == [report.as_uri()]
    refused = {event["blockedReason"] for event in browser.seen("Network.loadingFailed")}
    assert refused == {"csp"}
    assert browser.complaints()  # and the breach is reported


@pytest.mark.parametrize("theme", ["light", "dark"])
@pytest.mark.parametrize("width", [360, 390, 1200])
def test_it_fits_its_screen(browser: Browser, width: int, theme: str, report: Path) -> None:
    browser.call("Emulation.setDeviceMetricsOverride", width=width, height=844, deviceScaleFactor=1, mobile=width < 500)
    browser.call("Emulation.setEmulatedMedia", features=[{"name": "prefers-color-scheme", "value": theme}])
    browser.open(report)
    assert browser.run("document.documentElement.scrollWidth") <= width
    dark = browser.run("getComputedStyle(document.body).backgroundColor") == "rgb(20, 23, 27)"
    assert dark == (theme == "dark")
    # The charts follow: the first line of each has the theme's first colour, and its text the page's font.
    line = "[...document.querySelectorAll('.chart path')].find(path => path.style.stroke == 'var(--c0)')"
    assert browser.run(f"getComputedStyle({line}).stroke") == ("rgb(99, 179, 255)" if dark else "rgb(11, 92, 173)")
    font = "getComputedStyle(document.querySelector('{}')).fontFamily"
    assert browser.run(font.format(".chart text")) == browser.run(font.format("body"))
    assert browser.run("[...document.querySelectorAll('.chart text')].every(t => t.getBoundingClientRect().height > 9)")
    assert browser.complaints() == []
