"""Drive a real headless Chromium through its debugging pipe: no package, no port, no network."""

import base64
import json
import os
import select
import shutil
import subprocess
import time
from pathlib import Path

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser")
_WAIT_S = 60.0


class Browser:
    """One page of one browser; what it asks the network for and what it complains of is kept."""

    def __init__(self, home: Path, *, dark: bool = False) -> None:
        """Start it with an empty profile; it never outlives `close`."""
        assert CHROMIUM is not None
        ours, theirs = os.pipe(), os.pipe()
        self._out, self._in = ours[1], theirs[0]
        self.requests: list[str] = []
        self.complaints: list[str] = []
        self._left = b""
        self._number = 0
        options = [
            "--headless", "--no-sandbox", "--disable-gpu", "--disable-dev-shm-usage",
            "--remote-debugging-pipe", "--window-size=1300,1000", "--hide-scrollbars",
            "--no-first-run", "--disable-background-networking", f"--user-data-dir={home}",
            *(["--blink-settings=preferredColorScheme=0"] if dark else []),
        ]  # fmt: skip
        self._process = subprocess.Popen(
            ["timeout", "-k", "5", "120", "bash", "-c",
             f'exec "$0" "$@" 3<&{ours[0]} 4>&{theirs[1]}', CHROMIUM, *options],
            pass_fds=(ours[0], theirs[1]), stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, start_new_session=True,
        )  # fmt: skip
        os.close(ours[0])
        os.close(theirs[1])
        self._session: str | None = None
        target = self.call("Target.createTarget", url="about:blank")["targetId"]
        session = self.call("Target.attachToTarget", targetId=target, flatten=True)["sessionId"]
        self._session = str(session)
        for domain in ("Page", "Runtime", "Network", "Log"):
            self.call(f"{domain}.enable")

    def call(self, method: str, **given: object) -> dict[str, object]:
        """Call one method of the protocol and return its result."""
        self._number += 1
        number = self._number
        asked: dict[str, object] = {"id": number, "method": method, "params": given}
        if self._session is not None:
            asked["sessionId"] = self._session
        os.write(self._out, json.dumps(asked).encode() + b"\0")
        deadline = time.monotonic() + _WAIT_S
        while True:
            message = self._next(deadline)
            if message.get("id") == number:
                assert "error" not in message, message
                result = message["result"]
                assert isinstance(result, dict)
                return result

    def _next(self, deadline: float) -> dict[str, object]:
        while b"\0" not in self._left:
            ready, _, _ = select.select([self._in], [], [], max(0.0, deadline - time.monotonic()))
            data = os.read(self._in, 1 << 20) if ready else b""
            assert data, "the browser does not answer"
            self._left += data
        raw, _, self._left = self._left.partition(b"\0")
        message: dict[str, object] = json.loads(raw)
        self._note(message)
        return message

    def _note(self, event: dict[str, object]) -> None:
        given = event.get("params")
        if not isinstance(given, dict):
            return
        match event.get("method"):
            case "Network.requestWillBeSent":
                self.requests.append(str(given["request"]["url"]))
            case "Runtime.exceptionThrown":
                self.complaints.append(json.dumps(given["exceptionDetails"]))
            case "Runtime.consoleAPICalled" | "Log.entryAdded":
                self.complaints.append(json.dumps(given))

    def open(self, path: Path, *, url: str = "") -> float:
        """Load a page until it says that it is ready; return how long that took, in ms."""
        self.call("Page.navigate", url=url or path.as_uri())
        deadline = time.monotonic() + _WAIT_S
        while True:
            ready = self.run("document.documentElement?.dataset.ready ?? ''")
            if ready:
                return float(str(ready))
            assert time.monotonic() < deadline, (self.complaints, self.requests)

    def run(self, expression: str) -> object:
        """Evaluate an expression in the page and return its value."""
        answer = self.call("Runtime.evaluate", expression=expression, returnByValue=True)
        assert "exceptionDetails" not in answer, answer
        result = answer["result"]
        assert isinstance(result, dict)
        return result.get("value")

    def type(self, words: str) -> None:
        """Type text where the focus is."""
        self.call("Input.insertText", text=words)

    def mouse(self, kind: str, x: float, y: float, **more: object) -> None:
        """Move, press, release or turn the wheel: mouseMoved, mousePressed, …, mouseWheel."""
        self.call("Input.dispatchMouseEvent", type=kind, x=x, y=y, **more)

    def click(self, x: float, y: float, count: int = 1) -> None:
        """Click there with the left button."""
        for kind in ("mousePressed", "mouseReleased"):
            self.mouse(kind, x, y, button="left", clickCount=count)

    def drag(self, begin: tuple[float, float], end: tuple[float, float], steps: int = 8) -> None:
        """Drag from one place to another with the left button."""
        self.mouse("mousePressed", *begin, button="left", clickCount=1)
        for step in range(1, steps + 1):
            x, y = (a + (b - a) * step / steps for a, b in zip(begin, end, strict=True))
            self.mouse("mouseMoved", x, y, button="left", buttons=1)
        self.mouse("mouseReleased", *end, button="left", clickCount=1)

    def resize(self, width: int, height: int, *, phone: bool = False) -> None:
        """Make the window another size; a phone has a finger, too."""
        self.call("Emulation.setDeviceMetricsOverride", width=width, height=height,
                  deviceScaleFactor=1, mobile=phone)  # fmt: skip
        self.call("Emulation.setTouchEmulationEnabled", enabled=phone)

    def tap(self, x: float, y: float) -> None:
        """Touch a place for a moment."""
        self.call("Input.dispatchTouchEvent", type="touchStart", touchPoints=[{"x": x, "y": y}])
        self.call("Input.dispatchTouchEvent", type="touchEnd", touchPoints=[])

    def frames(self) -> None:
        """Wait until what was asked for is drawn."""
        twice = "requestAnimationFrame(() => requestAnimationFrame(done))"
        self.call(
            "Runtime.evaluate", expression=f"new Promise((done) => {twice})", awaitPromise=True
        )

    def picture(self, path: Path) -> None:
        """Keep a picture of what is in the window."""
        path.write_bytes(base64.b64decode(str(self.call("Page.captureScreenshot")["data"])))

    def press(self, key: str) -> None:
        """Press one key."""
        text = key if len(key) == 1 else ""
        for kind in ("keyDown", "keyUp"):
            self.call("Input.dispatchKeyEvent", type=kind, key=key, text=text)

    def close(self) -> None:
        """End it, whatever it does."""
        os.close(self._out)
        os.close(self._in)
        self._process.terminate()
        self._process.wait()
