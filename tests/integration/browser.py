"""A headless Chromium, driven through the pipe of its DevTools protocol; it needs no package of its own."""

from __future__ import annotations

import json
import os
import select
import shutil
import subprocess
import time
from pathlib import Path
from typing import Any

CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)


class Browser:
    """One page. `errors` holds what console and scripts complained of, `requests` every address it asked for."""

    def __init__(self, folder: Path) -> None:
        to_browser, self.send_fd = os.pipe()
        self.receive_fd, from_browser = os.pipe()
        self.number, self.session, self.buffer = 0, "", b""
        self.errors: list[str] = []
        self.requests: list[str] = []
        command = [str(CHROMIUM), "--headless=new", "--no-sandbox", "--remote-debugging-pipe", "--disable-gpu-sandbox"]
        # no GPU here: WebGL, which parallel coordinates use, is computed on the CPU
        command += ["--use-angle=swiftshader", "--enable-unsafe-swiftshader", "--window-size=1400,1000"]
        command += [f"--user-data-dir={folder / 'profile'}", "--no-first-run", "--disable-dev-shm-usage", "about:blank"]

        def place_pipes() -> None:  # Chromium reads its orders from 3 and answers on 4
            os.dup2(to_browser, 100)
            os.dup2(from_browser, 101)
            os.dup2(100, 3)
            os.dup2(101, 4)

        self.process = subprocess.Popen(
            command, preexec_fn=place_pipes, close_fds=False, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
        )
        os.close(to_browser)
        os.close(from_browser)
        page = next(t for t in self.call("Target.getTargets")["targetInfos"] if t["type"] == "page")
        attached = self.call("Target.attachToTarget", targetId=page["targetId"], flatten=True)
        self.session = attached["sessionId"]
        for domain in ("Page", "Runtime", "Log", "Network"):
            self.call(f"{domain}.enable")

    def call(self, method: str, timeout_s: float = 60, **params: Any) -> dict[str, Any]:
        """Give an order and wait for its answer; events on the way are noted."""
        self.number += 1
        order = {"id": self.number, "method": method, "params": params}
        if self.session:
            order["sessionId"] = self.session
        os.write(self.send_fd, json.dumps(order).encode() + b"\0")
        deadline = time.monotonic() + timeout_s
        while True:
            message = self._next(deadline)
            if message.get("id") == self.number:
                assert "error" not in message, message
                return message["result"]
            self._note(message)

    def value(self, script: str) -> Any:
        """What a script gives in the page; promises are waited for."""
        found = self.call("Runtime.evaluate", expression=script, returnByValue=True, awaitPromise=True)
        assert "exceptionDetails" not in found, found["exceptionDetails"]
        return found["result"].get("value")

    def open(self, path: Path, ready: str) -> None:
        """Open a file and wait until the script `ready` is true."""
        self.call("Page.navigate", url=path.as_uri())
        deadline = time.monotonic() + 60
        while not self.value(ready):
            assert time.monotonic() < deadline, (ready, self.errors)
            time.sleep(0.1)

    def picture(self, path: Path) -> None:
        """The whole page as PNG."""
        import base64

        data = self.call("Page.captureScreenshot", captureBeyondViewport=True)["data"]
        path.write_bytes(base64.b64decode(data))

    def close(self) -> None:
        """End the browser."""
        self.process.terminate()
        self.process.wait(timeout=20)
        os.close(self.send_fd)
        os.close(self.receive_fd)

    def _next(self, deadline: float) -> dict[str, Any]:
        while b"\0" not in self.buffer:
            left = deadline - time.monotonic()
            assert left > 0, "the browser does not answer"
            assert select.select([self.receive_fd], [], [], left)[0], "the browser does not answer"
            read = os.read(self.receive_fd, 1 << 20)
            assert read, "the browser has ended"
            self.buffer += read
        first, self.buffer = self.buffer.split(b"\0", 1)
        return json.loads(first)

    def _note(self, message: dict[str, Any]) -> None:
        method, params = message.get("method"), message.get("params", {})
        if method == "Runtime.exceptionThrown":
            details = params["exceptionDetails"]
            self.errors.append(str(details.get("exception", {}).get("description") or details["text"]))
        elif method == "Log.entryAdded" and params["entry"]["level"] == "error":
            self.errors.append(params["entry"]["text"])
        elif method == "Runtime.consoleAPICalled" and params["type"] in ("error", "assert"):
            self.errors.append(str(params["args"]))
        elif method == "Network.requestWillBeSent":
            self.requests.append(params["request"]["url"])
