"""Firefox for tests, by Marionette: the protocol that every Firefox speaks itself, over a local socket.

Playwright drives a Firefox of its own only, and Debian has no geckodriver, which would do no more than this.
"""

from __future__ import annotations

import base64
import json
import os
import shutil
import socket
import subprocess
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from browsing import HEIGHT, WAIT, WIDTH

NAMES = ("firefox-esr", "firefox")
START = 60
"""Seconds."""

PREFERENCES = {
    "marionette.port": 0,
    "app.normandy.enabled": False,
    "app.update.enabled": False,
    "browser.aboutwelcome.enabled": False,
    "browser.safebrowsing.downloads.remote.enabled": False,
    "browser.safebrowsing.malware.enabled": False,
    "browser.safebrowsing.phishing.enabled": False,
    "browser.shell.checkDefaultBrowser": False,
    "datareporting.policy.dataSubmissionEnabled": False,
    "extensions.update.enabled": False,
    "network.captive-portal-service.enabled": False,
    "network.connectivity-service.enabled": False,
    "services.settings.server": "data:,",
    "toolkit.telemetry.enabled": False,
}


def firefox() -> str | None:
    """The Firefox to use, if one is installed."""
    return next(filter(None, map(shutil.which, NAMES)), None)


class Firefox:
    """A running Firefox."""

    def __init__(self, port: int) -> None:
        self._socket = socket.create_connection(("127.0.0.1", port), timeout=START)
        self._count = 0
        self._read()
        self.send("WebDriver:NewSession", capabilities={"alwaysMatch": {"acceptInsecureCerts": True}})

    def send(self, command: str, **parameters: Any) -> Any:
        """A command of WebDriver, by its name in Marionette; raises ``RuntimeError`` with what Firefox says."""
        self._count += 1
        message = json.dumps([0, self._count, command, parameters]).encode()
        self._socket.sendall(b"%d:%s" % (len(message), message))
        _, _, error, result = self._read()
        if error:
            raise RuntimeError(f"{command}: {error['error']}: {error['message']}")
        return result["value"] if isinstance(result, dict) and "value" in result else result

    def _read(self) -> Any:
        length = b""
        while (byte := self._socket.recv(1)) != b":":
            if not byte:
                raise RuntimeError("Firefox has closed the connection")
            length += byte
        message = b""
        while len(message) < int(length):
            message += self._socket.recv(int(length) - len(message))
        return json.loads(message)

    def open(self, page: Path, width: int) -> None:
        """Opens a page in a frame of ``width`` pixels in MLflow's sandbox; the window itself cannot be narrow."""
        outer = page.with_name("frame.html")
        frame = (
            f"<iframe sandbox='allow-scripts' src='{page.name}' style='border:0;width:{width}px;height:900px'></iframe>"
        )
        outer.write_text(f"<!doctype html><style>body{{margin:0}}</style>{frame}", encoding="utf-8")
        self.send("WebDriver:SetWindowRect", width=max(width, 600) + 40, height=1000)
        self.send("WebDriver:Navigate", url=outer.as_uri())
        (found,) = self.send("WebDriver:FindElement", using="css selector", value="iframe").values()
        self.send("WebDriver:SwitchToFrame", element=found)

    def visit(self, address: str, script: str = "") -> None:
        """Goes to ``address``, in a window of the usual size; ``script`` runs there before the page is loaded again."""
        self.send("WebDriver:SwitchToFrame")
        self.send("WebDriver:SetWindowRect", width=WIDTH, height=HEIGHT)
        # An address that differs after the # alone would be the same page.
        self.send("WebDriver:Navigate", url="about:blank")
        self.send("WebDriver:Navigate", url=address)
        if script:
            self.run(script)
            self.send("WebDriver:Refresh")

    def enter(self, selector: str) -> None:
        """Goes on in the frame that ``selector`` finds."""
        self.send("WebDriver:SwitchToFrame", element=self._find(selector))

    def wait(self, condition: str, *arguments: Any) -> Any:
        """What the JavaScript expression ``condition`` gives as soon as it is true there."""
        until = time.monotonic() + WAIT / 1000
        while not (found := self.run(f"return {condition}", *arguments)):
            if time.monotonic() > until:
                raise AssertionError(f"not within {WAIT // 1000} s: {condition} {arguments}")
            time.sleep(0.1)
        return found

    def run(self, script: str, *arguments: Any) -> Any:
        """What ``script`` returns, or the promise that it returns gives."""
        return self.send("WebDriver:ExecuteScript", script=script, args=list(arguments))

    def press(self, selector: str, keys: str) -> None:
        """Types ``keys`` into the first element of a selector."""
        self.send("WebDriver:ElementSendKeys", id=self._find(selector), text=keys)

    def click(self, selector: str) -> None:
        self.send("WebDriver:ElementClick", id=self._find(selector))

    def _find(self, selector: str) -> str:
        (element,) = self.send("WebDriver:FindElement", using="css selector", value=selector).values()
        return str(element)

    def shot(self, path: Path) -> None:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(base64.b64decode(self.send("WebDriver:TakeScreenshot", full=False)))


@contextmanager
def launched(dark: bool = False) -> Iterator[Firefox]:
    """A Firefox that prefers dark or light pages."""
    program = firefox()
    assert program is not None
    # 0: dark, 1: light.
    preferences = {**PREFERENCES, "layout.css.prefers-color-scheme.content-override": 0 if dark else 1}
    with TemporaryDirectory(prefix="dit-firefox-", ignore_cleanup_errors=True) as folder:
        lines = [f"user_pref({json.dumps(name)}, {json.dumps(value)});" for name, value in preferences.items()]
        Path(folder, "user.js").write_text("\n".join(lines))
        arguments = [program, "--headless", "--marionette", "--no-remote", "--profile", folder]
        # It would write reports of crashes below the home folder.
        environment = {**os.environ, "HOME": folder}
        process = subprocess.Popen(arguments, env=environment, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        try:
            yield Firefox(_port(Path(folder, "MarionetteActivePort"), process))
        finally:
            process.terminate()
            try:
                process.wait(20)
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()


def _port(file: Path, process: subprocess.Popen[bytes]) -> int:
    until = time.monotonic() + START
    while time.monotonic() < until:
        if process.poll() is not None:
            raise RuntimeError(f"Firefox ended with exit code {process.returncode}")
        if file.exists() and (text := file.read_text()):
            return int(text)
        time.sleep(0.05)
    raise RuntimeError(f"Firefox opened no port in {START} s")
