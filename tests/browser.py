"""Chromium without a window, driven through its DevTools protocol over a pipe. It reaches no network."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

_NAMES = ("chromium", "chromium-browser", "google-chrome")
CHROMIUM = next((path for name in _NAMES if (path := shutil.which(name))), "")
_WORDS = ("--headless", "--no-sandbox", "--disable-gpu", "--disable-dev-shm-usage", "--remote-debugging-pipe")
_NO_NETWORK = ("--host-resolver-rules=MAP * ~NOTFOUND", "--disable-background-networking", "--disable-component-update")
_DOMAINS = ("Page", "Runtime", "Log", "Network")


class Browser:
    """One page. `events` has what happened in it, in order: requests, console messages, uncaught errors."""

    def __init__(self, sending: int, receiving: int) -> None:
        self.sending, self.receiving, self.number, self.unread = sending, receiving, 0, b""
        self.session: str | None = None
        self.events: list[dict[str, Any]] = []
        target = self.call("Target.createTarget", url="about:blank")["targetId"]
        self.session = self.call("Target.attachToTarget", targetId=target, flatten=True)["sessionId"]
        for domain in _DOMAINS:
            self.call(f"{domain}.enable")

    def call(self, method: str, **parameters: Any) -> dict[str, Any]:
        """The result of a command. Messages end with a zero byte; events that come in between are kept."""
        self.number += 1
        message = {"id": self.number, "method": method, "params": parameters}
        message |= {"sessionId": self.session} if self.session else {}
        os.write(self.sending, json.dumps(message).encode() + b"\0")
        while True:
            answer = self._read()
            if answer.get("id") == self.number:
                assert "error" not in answer, answer
                result: dict[str, Any] = answer["result"]
                return result
            self.events.append(answer)

    def _read(self) -> dict[str, Any]:
        while b"\0" not in self.unread:
            part = os.read(self.receiving, 1 << 20)
            assert part, "the browser has ended"
            self.unread += part
        line, _, self.unread = self.unread.partition(b"\0")
        message: dict[str, Any] = json.loads(line)
        return message

    def run(self, script: str) -> Any:
        """The value of a JavaScript expression; a promise is awaited."""
        result = self.call("Runtime.evaluate", expression=script, returnByValue=True, awaitPromise=True)
        assert "exceptionDetails" not in result, result
        return result["result"].get("value")

    def until(self, script: str, timeout_s: float = 60) -> None:
        """Wait until an expression is true."""
        deadline = time.monotonic() + timeout_s
        while not self.run(script):
            assert time.monotonic() < deadline, f"waited {timeout_s} s for {script}"
            time.sleep(0.05)

    def open(self, page: Path) -> None:
        self.call("Page.navigate", url=page.resolve().as_uri())
        self.until(f"location.protocol == 'file:' && location.pathname.endsWith({json.dumps(page.name)})")
        self.until("document.readyState == 'complete'")

    def requests(self) -> list[str]:
        """The URLs of all requests, without those of data within the page."""
        sent = [each["params"]["request"]["url"] for each in self._of("Network.requestWillBeSent")]
        return [url for url in sent if not url.startswith(("data:", "blob:"))]

    def problems(self) -> list[dict[str, Any]]:
        """Uncaught errors, console messages and other entries of the log, such as what the page's policy refused."""
        methods = ("Runtime.exceptionThrown", "Runtime.consoleAPICalled", "Log.entryAdded")
        return [each["params"] for method in methods for each in self._of(method)]

    def _of(self, method: str) -> list[dict[str, Any]]:
        return [each for each in self.events if each.get("method") == method]


@contextmanager
def browser(profile: Path, width: int = 1200, height: int = 900) -> Iterator[Browser]:
    """Start Chromium, and end it with all of its processes."""
    reading, sending = os.pipe()
    receiving, writing = os.pipe()
    words = [CHROMIUM, *_WORDS, *_NO_NETWORK, f"--user-data-dir={profile}", f"--window-size={width},{height}"]
    shell = ["bash", "-c", f'exec "$@" 3<&{reading} 4>&{writing}', "bash"]  # Chromium reads from 3 and writes to 4
    process = subprocess.Popen(
        [*shell, *words], pass_fds=(reading, writing), stderr=subprocess.DEVNULL, start_new_session=True
    )
    os.close(reading)
    os.close(writing)
    try:
        yield Browser(sending, receiving)
    finally:
        os.close(sending)
        os.close(receiving)
        os.killpg(process.pid, signal.SIGKILL)
        process.wait()
