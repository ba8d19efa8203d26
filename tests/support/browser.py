"""A headless Chromium that a test drives over a pipe (Chrome DevTools Protocol). Knows pages and requests, nothing of Palate.

python -m tests.support.browser install   Debian's chromium, if there is no browser; needs root
"""

from __future__ import annotations

import base64
import json
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

FLAGS = (
    *("--headless", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run", "--disable-dev-shm-usage"),
    *("--disable-background-networking", "--disable-component-update", "--disable-sync", "--hide-scrollbars"),
)
LIMIT_S = 60.0


def find_chromium() -> str | None:
    return next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)


class Browser:
    """One page of a browser.

    Attributes:
        requests: URLs of all requests of the page so far.
        said: Messages of its console, violations of its policy and errors of its scripts.
    """

    def __init__(self, reads: int, writes: int) -> None:
        self._reads, self._writes, self._buffer, self._number = reads, writes, b"", 0
        self.requests: list[str] = []
        self.said: list[str] = []
        target = self._send("Target.createTarget", url="about:blank")["targetId"]
        self._session: str | None = self._send("Target.attachToTarget", targetId=target, flatten=True)["sessionId"]
        for domain in ("Page", "Runtime", "Network", "Log"):
            self._send(f"{domain}.enable")

    _session: str | None = None

    def open(self, path: Path) -> None:
        """Opens a local file and waits until it is loaded."""
        self._send("Page.navigate", url=path.absolute().as_uri())
        self.until("document.readyState === 'complete'")

    def run(self, code: str) -> Any:
        """Returns the value of a JavaScript expression in the page. It runs in spite of the page's policy."""
        found = self._send("Runtime.evaluate", expression=code, returnByValue=True, awaitPromise=True)
        assert "exceptionDetails" not in found, found["exceptionDetails"]
        return found["result"].get("value")

    def until(self, code: str) -> Any:
        """Waits until an expression is true."""
        end = time.monotonic() + LIMIT_S
        while not (value := self.run(code)):
            assert time.monotonic() < end, f"{code} did not become true; the page said {self.said}"
        return value

    def resize(self, width: int, height: int, *, phone: bool = False, scale: float = 1) -> None:
        self._send(
            "Emulation.setDeviceMetricsOverride", width=width, height=height, deviceScaleFactor=scale, mobile=phone
        )
        self._send("Emulation.setTouchEmulationEnabled", enabled=phone)

    def print_as_on_paper(self, *, width: int) -> None:
        """Lets the page look as printed, `width` CSS pixels wide."""
        self._send("Emulation.setEmulatedMedia", media="print")
        self.resize(width, 1100)

    def picture(self) -> bytes:
        """Returns a PNG of what is visible."""
        return base64.b64decode(self._send("Page.captureScreenshot", format="png")["data"])

    def drag(self, start: tuple[float, float], end: tuple[float, float]) -> None:
        """Drags the mouse with its left button pressed."""
        for kind, (x, y) in (("mousePressed", start), ("mouseMoved", end), ("mouseReleased", end)):
            self._send("Input.dispatchMouseEvent", type=kind, x=x, y=y, button="left", buttons=1, clickCount=1)

    def _send(self, method: str, **parameters: Any) -> Any:
        self._number += 1
        message = {"id": self._number, "method": method, "params": parameters}
        if self._session:
            message["sessionId"] = self._session
        os.write(self._writes, json.dumps(message).encode() + b"\0")
        while True:
            while b"\0" not in self._buffer:
                data = os.read(self._reads, 1 << 20)
                assert data, "the browser has ended"
                self._buffer += data
            line, _, self._buffer = self._buffer.partition(b"\0")
            answer = json.loads(line)
            if answer.get("id") == self._number:
                assert "error" not in answer, answer["error"]
                return answer["result"]
            self._note(answer.get("method"), answer.get("params", {}))

    def _note(self, event: str | None, facts: dict[str, Any]) -> None:
        if event == "Network.requestWillBeSent":
            self.requests.append(facts["request"]["url"])
        elif event == "Runtime.consoleAPICalled":
            self.said.append(str([item.get("value", item.get("description")) for item in facts["args"]]))
        elif event == "Runtime.exceptionThrown":
            self.said.append(str(facts["exceptionDetails"]))
        elif event == "Log.entryAdded":
            self.said.append(facts["entry"]["text"])


@contextmanager
def running_browser() -> Iterator[Browser]:
    """Starts a browser with an empty profile. Skips the test if there is none."""
    program = find_chromium()
    if program is None:
        pytest.skip("NO BROWSER: chromium is not installed, no page is opened (apt-get install chromium)")
    theirs, writes = os.pipe()
    reads, answers = os.pipe()
    with tempfile.TemporaryDirectory(prefix="palate-browser-", ignore_cleanup_errors=True) as profile:

        def pipes() -> None:  # the browser reads commands from descriptor 3 and answers on 4
            first, second = os.dup(theirs), os.dup(answers)  # neither may be 3 or 4 when those are replaced
            os.dup2(first, 3)
            os.dup2(second, 4)

        process = subprocess.Popen(
            [program, *FLAGS, f"--user-data-dir={profile}", "--remote-debugging-pipe"],
            stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
            close_fds=False,  # 3 and 4 must stay open
            preexec_fn=pipes,
            start_new_session=True,
            env={**os.environ, "HOME": profile},
        )
        os.close(theirs)
        os.close(answers)
        try:
            yield Browser(reads, writes)
        finally:
            os.killpg(process.pid, signal.SIGKILL)  # with its helpers
            process.wait()
            os.close(reads)
            os.close(writes)


def install() -> None:
    """Installs Debian's Chromium, unless there is a browser."""
    if find_chromium() is None:
        for command in (["update", "-q"], ["install", "-qy", "--no-install-recommends", "chromium"]):
            subprocess.run(
                ["apt-get", *command],
                check=True,
                stdout=subprocess.DEVNULL,
                env={**os.environ, "DEBIAN_FRONTEND": "noninteractive"},
            )


if __name__ == "__main__":
    if sys.argv[1:] != ["install"]:
        sys.exit(str(__doc__))
    try:
        install()
    except (OSError, subprocess.CalledProcessError) as error:
        sys.exit(f"chromium cannot be installed: {error}")
