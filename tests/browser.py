"""A real headless Chromium for tests, over the WebDriver protocol (W3C) and nothing but the standard library."""

from __future__ import annotations

import base64
import json
import shutil
import socket
import subprocess
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

CHROMIUM, DRIVER = shutil.which("chromium") or shutil.which("google-chrome"), shutil.which("chromedriver")
FLAGS = (
    *("--headless=new", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run", "--disable-sync"),
    *("--disable-background-networking", "--disable-component-update", "--disable-dev-shm-usage"),
)


def lacking() -> str:
    """Why there is no browser to test with; nothing where there is one."""
    missing = [name for name, found in (("chromium", CHROMIUM), ("chromedriver", DRIVER)) if not found]
    return f"needs Chromium: {' and '.join(missing)} not found" if missing else ""


@dataclass(frozen=True)
class Browser:
    """One window."""

    session: str

    def open(self, page: Path, width: int = 1280, height: int = 900, *, dark: bool = False) -> None:
        """Load a page from disk, in a window of this size; what it complains of is in `complaints`."""
        self._devtools(
            "Emulation.setEmulatedMedia",
            features=[{"name": "prefers-color-scheme", "value": "dark" if dark else "light"}],
        )
        self._devtools(
            "Emulation.setDeviceMetricsOverride", width=width, height=height, deviceScaleFactor=1, mobile=width < 600
        )
        self._post("url", url=page.resolve().as_uri())

    def run(self, script: str) -> Any:
        """What `return …` gives in the page."""
        return self._post("execute/sync", script=script, args=[])

    def click(self, selector: str) -> None:
        """As a person does: scrolled to, and refused where something else lies on top of it."""
        found = self._post("element", using="css selector", value=selector)
        self._post(f"element/{next(iter(found.values()))}/click")

    def tap(self, x: float, y: float) -> None:
        """With a finger, at a place of the window."""
        self._devtools("Emulation.setTouchEmulationEnabled", enabled=True)
        self._devtools("Input.dispatchTouchEvent", type="touchStart", touchPoints=[{"x": x, "y": y}])
        self._devtools("Input.dispatchTouchEvent", type="touchEnd", touchPoints=[])
        self._devtools("Emulation.setTouchEmulationEnabled", enabled=False)

    def complaints(self) -> list[str]:
        """What the console says since it was asked last: errors of scripts, refused loads."""
        return [entry["message"] for entry in self._post("se/log", type="browser")]

    def picture(self, *, whole: bool = False) -> bytes:
        """What is seen, as PNG."""
        return base64.b64decode(self._devtools("Page.captureScreenshot", captureBeyondViewport=whole)["data"])

    def _devtools(self, command: str, **parameters: Any) -> Any:
        return self._post("goog/cdp/execute", cmd=command, params=parameters)

    def _post(self, command: str, **parameters: Any) -> Any:
        return _request("POST", f"{self.session}/{command}", parameters)


@contextmanager
def browser() -> Iterator[Browser]:
    """A browser of its own, gone afterwards."""
    assert CHROMIUM
    assert DRIVER
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    with TemporaryDirectory() as profile:
        driver = subprocess.Popen([DRIVER, f"--port={port}"], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        address = f"http://127.0.0.1:{port}"
        try:
            _wait(address, driver)
            options = {"binary": CHROMIUM, "args": [*FLAGS, f"--user-data-dir={profile}"]}
            wanted = {"goog:chromeOptions": options, "goog:loggingPrefs": {"browser": "ALL"}}
            begun = _request("POST", f"{address}/session", {"capabilities": {"alwaysMatch": wanted}})
            session = f"{address}/session/{begun['sessionId']}"
            yield Browser(session)
            _request("DELETE", session, None)
        finally:
            driver.terminate()
            driver.wait()


def _wait(address: str, driver: subprocess.Popen[bytes]) -> None:
    while driver.poll() is None:
        try:
            if _request("GET", f"{address}/status", None)["ready"]:
                return
        except OSError:
            time.sleep(0.05)
    raise AssertionError("chromedriver ended")


def _request(method: str, address: str, parameters: Any) -> Any:
    body = None if parameters is None else json.dumps(parameters).encode()
    request = urllib.request.Request(address, body, {"Content-Type": "application/json"}, method=method)
    try:
        with urllib.request.urlopen(request, timeout=300) as answer:
            return json.load(answer)["value"]
    except urllib.error.HTTPError as error:
        raise AssertionError(json.load(error)["value"]["message"]) from None
