"""The report in a real browser: nothing is fetched or run, no console line, nothing wider than a phone."""

import contextlib
import json
import shutil
import subprocess
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any
from urllib.request import urlopen

import pytest

from pipeline.artifacts import StageRecord
from pipeline.report.page import write_report
from pipeline.report.summary import finish_run
from pipeline.settings import PipelineConfig

websockets = pytest.importorskip("websockets.sync.client")
CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome", "chrome"))), None)
pytestmark = pytest.mark.skipif(CHROMIUM is None, reason="no Chromium on this machine")

Fill = Callable[[PipelineConfig, tuple[str, ...]], list[StageRecord]]
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
        self._sent += 1
        self._socket.send(json.dumps({"id": self._sent, "method": method, "params": parameters}))
        while (message := json.loads(self._socket.recv(timeout=60))).get("id") != self._sent:
            self._note(message)
        assert "error" not in message, message
        return message["result"]

    def _note(self, message: dict[str, Any]) -> None:
        if "method" not in message:  # the answer to a request of this function
            return
        self.events.append(message)
        if message["method"] == "Page.javascriptDialogOpening":  # an alert would hold the page, and this test
            self._sent += 1
            self._socket.send(
                json.dumps({"id": self._sent, "method": "Page.handleJavaScriptDialog", "params": {"accept": True}})
            )

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


def test_hostile_text_stays_text(browser: Browser, settings: PipelineConfig, fill: Fill, hostile: str) -> None:
    finish_run(
        settings, "relevance-pipeline", fill(settings, ("data", "teacher", "annotate", "student", "export")), [1.0] * 5
    )
    file = settings.folder / "summary.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {"untracked": {"teacher": hostile}}))
    report = write_report(settings.folder)
    browser.open(report)
    assert browser.requests() == [report.as_uri()]
    assert browser.complaints() == []
    text = browser.run("document.body.innerText")
    # Query, title, text and reason of the examples and of those for a second look, at least.
    assert text.count(hostile) >= 4 * (30 + 19)
    assert browser.run("document.scripts.length + document.images.length") == 0
    assert browser.run("[...document.links].every(link => link.getAttribute('href').startsWith('#'))")


def test_the_policy_holds_even_if_a_text_were_not_escaped(
    browser: Browser, settings: PipelineConfig, fill: Fill, hostile: str
) -> None:
    report = Path(finish_run(settings, "data-prepare", fill(settings, ("data",)), [1.0])["report"])
    report.write_text(report.read_text(encoding="utf-8").replace("<h1>", f"{hostile}<h1>"), encoding="utf-8")
    browser.open(report)
    assert not browser.seen("Page.javascriptDialogOpening")
    answered = [event["response"]["url"] for event in browser.seen("Network.responseReceived")]
    assert answered == [report.as_uri()]
    refused = {event["blockedReason"] for event in browser.seen("Network.loadingFailed")}
    assert refused == {"csp"}
    assert browser.complaints()  # and the breach is reported


@pytest.mark.parametrize("theme", ["light", "dark"])
@pytest.mark.parametrize("width", [360, 390, 1200])
def test_it_fits_its_screen(browser: Browser, width: int, theme: str, settings: PipelineConfig, fill: Fill) -> None:
    records = fill(settings, ("data", "teacher", "annotate", "student", "export"))
    report = Path(finish_run(settings, "relevance-pipeline", records, [1.0] * 5)["report"])
    browser.call("Emulation.setDeviceMetricsOverride", width=width, height=844, deviceScaleFactor=1, mobile=width < 500)
    browser.call("Emulation.setEmulatedMedia", features=[{"name": "prefers-color-scheme", "value": theme}])
    browser.open(report)
    assert browser.run("document.documentElement.scrollWidth") <= width
    # The style sheet is the one that the policy's hash names: were it refused, the page would be white in both themes.
    dark = browser.run("getComputedStyle(document.body).backgroundColor") == "rgb(20, 23, 27)"
    assert dark == (theme == "dark")
    assert browser.complaints() == []
