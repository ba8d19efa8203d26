"""Chromium, driven over a pipe with its DevTools protocol. Needs the program alone: no driver, no package and no port.

python -m tests.support.browser install   Debian's chromium, if there is no browser; needs root
"""

from __future__ import annotations

import base64
import itertools
import json
import os
import select
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

WAIT_S = 60.0

# fmt: off
_FLAGS = (
    "--headless=new", "--no-sandbox", "--disable-gpu", "--disable-dev-shm-usage", "--disable-quic", "--no-first-run", "--mute-audio",
    "--disable-extensions", "--disable-background-networking", "--disable-component-update", "--disable-sync",
    "--no-default-browser-check", "--password-store=basic", "--remote-debugging-pipe",
)
# fmt: on


def find_chromium() -> str | None:
    return next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)


class Browser:
    """A browser. Commands and events are JSON texts, each ended by a zero byte."""

    def __init__(self, commands: int, replies: int) -> None:
        self._commands, self._replies = commands, replies
        self._ids = itertools.count(1)
        self._rest = b""
        self.events: list[dict[str, Any]] = []

    def call(self, method: str, session: str | None = None, **parameters: Any) -> dict[str, Any]:
        """Sends a command and returns its result."""
        number = next(self._ids)
        sent = {"id": number, "method": method, "params": parameters, **({"sessionId": session} if session else {})}
        os.write(self._commands, json.dumps(sent).encode() + b"\0")
        deadline = time.monotonic() + WAIT_S
        while True:
            reply = self._next(deadline, method)
            if reply.get("id") == number:
                assert "error" not in reply, (method, reply["error"])
                result: dict[str, Any] = reply["result"]
                return result
            self.events.append(reply)

    def _next(self, deadline: float, method: str) -> dict[str, Any]:
        while b"\0" not in self._rest:
            ready, _, _ = select.select([self._replies], [], [], max(0.0, deadline - time.monotonic()))
            assert ready, f"{method} has no reply"
            data = os.read(self._replies, 1 << 16)
            assert data, "the browser has ended"
            self._rest += data
        message, _, self._rest = self._rest.partition(b"\0")
        found: dict[str, Any] = json.loads(message)
        return found

    def open(self, url: str, *, width: int = 1280, height: int = 800) -> Tab:
        """Opens a page in a tab of its own, which shares no storage with other tabs' sessions."""
        target = self.call("Target.createTarget", url="about:blank")["targetId"]
        session = self.call("Target.attachToTarget", targetId=target, flatten=True)["sessionId"]
        tab = Tab(self, session)
        for domain in ("Page", "Runtime", "Network", "Log"):
            tab.call(f"{domain}.enable")
        tab.resize(width, height)
        tab.call("Page.navigate", url=url)
        return tab


class Tab:
    """A page in the browser."""

    def __init__(self, browser: Browser, session: str) -> None:
        self._browser, self._session = browser, session

    def call(self, method: str, **parameters: Any) -> dict[str, Any]:
        return self._browser.call(method, self._session, **parameters)

    def run(self, script: str) -> Any:
        """Returns the value of an expression, awaited if it is a promise."""
        done = self.call("Runtime.evaluate", expression=script, returnByValue=True, awaitPromise=True)
        assert "exceptionDetails" not in done, (script, done["exceptionDetails"])
        return done["result"].get("value")

    def wait(self, condition: str) -> None:
        """Waits until an expression is true: the page tells it at the next frame."""
        asked = (
            f"new Promise((tell) => {{ const end = performance.now() + {WAIT_S * 1000};"
            f" const look = () => {{ let is = false; try {{ is = Boolean({condition}); }} catch {{}}"
            " if (is || performance.now() > end) tell(is); else setTimeout(look, 10); }; look(); })"
        )
        assert self.run(asked), f"{condition} did not come true; the page shows {self.text('body')!r}"

    def text(self, selector: str) -> str:
        """Returns the text that an element shows."""
        return str(self.run(f"document.querySelector({json.dumps(selector)}).innerText"))

    def texts(self, selector: str) -> list[str]:
        found: list[str] = self.run(
            f"[...document.querySelectorAll({json.dumps(selector)})].map((one) => one.innerText)"
        )
        return found

    def click(self, selector: str) -> None:
        """Clicks into the middle of an element, as a mouse does."""
        name = json.dumps(selector)
        self.run(f"document.querySelector({name}).scrollIntoView({{block: 'nearest'}})")
        x, y = self.run(f"(() => {{ const at = document.querySelector({name}).getBoundingClientRect();"
                        " return [at.x + at.width / 2, at.y + at.height / 2]; })()")  # fmt: skip
        for kind in ("mousePressed", "mouseReleased"):
            self.call("Input.dispatchMouseEvent", type=kind, x=x, y=y, button="left", clickCount=1)

    def write(self, text: str) -> None:
        """Types into what has the focus."""
        self.call("Input.insertText", text=text)

    def key(self, key: str, *, shift: bool = False) -> None:
        """Presses one key, such as `Enter` or `1`."""
        text = {"Enter": "\r"}.get(key, key if len(key) == 1 else "")
        code = {"Enter": 13, "Escape": 27}.get(key, ord(key[0].upper()))
        facts = {"key": key, "windowsVirtualKeyCode": code, "modifiers": 8 if shift else 0}
        self.call("Input.dispatchKeyEvent", type="keyDown", **facts, **({"text": text} if text else {}))
        self.call("Input.dispatchKeyEvent", type="keyUp", **facts)

    def drag(self, start: tuple[float, float], end: tuple[float, float]) -> None:
        """Drags the mouse with its left button pressed."""
        for kind, (x, y) in (("mousePressed", start), ("mouseMoved", end), ("mouseReleased", end)):
            self.call("Input.dispatchMouseEvent", type=kind, x=x, y=y, button="left", buttons=1, clickCount=1)

    def print_as_on_paper(self, *, width: int) -> None:
        """Lets the page look as printed, `width` CSS pixels wide."""
        self.resize(width, 1100)
        self.call("Emulation.setEmulatedMedia", media="print")

    def resize(self, width: int, height: int, *, scale: float = 1, dark: bool = False) -> None:
        self.call(
            "Emulation.setDeviceMetricsOverride",
            width=width,
            height=height,
            deviceScaleFactor=scale,
            mobile=width < 600,
        )
        scheme = "dark" if dark else "light"
        self.call("Emulation.setEmulatedMedia", features=[{"name": "prefers-color-scheme", "value": scheme}])

    def picture(self, file: Path) -> None:
        file.write_bytes(base64.b64decode(self.call("Page.captureScreenshot", format="png")["data"]))

    def _events(self) -> list[dict[str, Any]]:
        self.run("0")  # events that were sent before have arrived with its reply
        return [event for event in self._browser.events if event.get("sessionId") == self._session]

    def requests(self) -> list[str]:
        """Returns the addresses that the page has requested, its own first."""
        asked = [event["params"] for event in self._events() if event["method"] == "Network.requestWillBeSent"]
        return [str(one["request"]["url"]) for one in asked]

    def complaints(self) -> list[str]:
        """Returns the errors and warnings of the console, such as a breach of the page's content policy."""
        found = []
        for event in self._events():
            if event["method"] == "Log.entryAdded" and event["params"]["entry"]["level"] in ("error", "warning"):
                found.append(event["params"]["entry"]["text"])
            if event["method"] == "Runtime.exceptionThrown":
                found.append(str(event["params"]["exceptionDetails"]))
        return found


@contextmanager
def browser(downloads: Path) -> Iterator[Browser]:
    """Runs a browser with an empty profile until the block ends. Skips the test if there is none.

    Args:
        downloads: Folder for what a page saves.
    """
    program = find_chromium()
    if program is None:
        pytest.skip("NO BROWSER: chromium is not installed, no page is opened (apt-get install chromium)")
    from_test, to_browser = os.pipe()
    from_browser, to_test = os.pipe()
    with tempfile.TemporaryDirectory(prefix="palate-browser-", ignore_cleanup_errors=True) as profile:
        # The pipe's ends have to be 3 and 4 there.
        shell = f'exec "$@" 3<&{from_test} 4>&{to_test}'
        command = ["bash", "-c", shell, "bash", program, *_FLAGS, f"--user-data-dir={profile}", "about:blank"]
        process = subprocess.Popen(
            command,
            pass_fds=[from_test, to_test],
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
            start_new_session=True,
            env={**os.environ, "HOME": profile},
        )
        os.close(from_test)
        os.close(to_test)
        try:
            one = Browser(to_browser, from_browser)
            one.call("Browser.setDownloadBehavior", behavior="allow", downloadPath=str(downloads))
            yield one
        finally:
            os.killpg(process.pid, signal.SIGKILL)
            process.wait()
            os.close(to_browser)
            os.close(from_browser)


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
