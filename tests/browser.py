"""A headless Chromium, driven by its own protocol over a WebSocket: enough to fill in a page and to look at it."""

import base64
import json
import shutil
import subprocess
import time
from pathlib import Path

BROWSER = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
_OPTIONS = ("--headless=new", "--no-sandbox", "--disable-gpu", "--disable-dev-shm-usage", "--no-first-run")
_QUIET = (
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
    "--remote-debugging-port=0",
)

_FILL = """(() => {
    const field = document.querySelector(%s);
    const kind = field.tagName === "TEXTAREA" ? HTMLTextAreaElement : HTMLInputElement;
    Object.getOwnPropertyDescriptor(kind.prototype, "value").set.call(field, %s);
    for (const name of %s) field.dispatchEvent(new Event(name, {bubbles: true}));
})()"""


class Browser:
    """One page in a browser. `requests` has the address of everything that the page asked for.

    Args:
        folder: for its profile.
        size: of the window.
    """

    def __init__(self, folder: Path, size: tuple[int, int] = (1180, 860)):
        from websockets.sync.client import connect

        self.requests: list[str] = []
        self._number, self._process = (
            0,
            subprocess.Popen(
                [str(BROWSER), *_OPTIONS, *_QUIET, f"--user-data-dir={folder}"],
                stdout=subprocess.DEVNULL,
                stderr=subprocess.DEVNULL,
            ),
        )
        try:
            port_file = folder / "DevToolsActivePort"
            _until(lambda: port_file.is_file() and port_file.read_text().count("\n") > 0, 60)
            port = port_file.read_text().split()[0]
            import httpx

            target = httpx.put(f"http://127.0.0.1:{port}/json/new", trust_env=False, timeout=60).json()
            self._socket = connect(target["webSocketDebuggerUrl"], max_size=None, proxy=None)
            for domain in ("Page", "Network", "Runtime"):
                self.call(f"{domain}.enable")
            self.call(
                "Emulation.setDeviceMetricsOverride",
                width=size[0],
                height=size[1],
                deviceScaleFactor=1,
                mobile=False,
            )
        except BaseException:
            self._process.kill()
            raise

    def call(self, method: str, **parameters):
        """Call a method of the protocol, and return its result."""
        self._number += 1
        self._socket.send(json.dumps({"id": self._number, "method": method, "params": parameters}))
        while True:
            message = json.loads(self._socket.recv(timeout=120))
            if message.get("method") == "Network.requestWillBeSent":
                self.requests.append(message["params"]["request"]["url"])
            if message.get("id") == self._number:
                assert "error" not in message, message
                return message["result"]

    def js(self, code: str):
        """Return the value of an expression."""
        result = self.call("Runtime.evaluate", expression=code, returnByValue=True, awaitPromise=True)
        assert "exceptionDetails" not in result, result
        return result["result"].get("value")

    def open(self, url: str, ready: str) -> None:
        """Open a page, and wait until an expression is true."""
        self.call("Page.navigate", url=url)
        self.wait(ready)

    def wait(self, code: str, seconds: float = 120) -> None:
        """Wait until an expression is true."""
        _until(lambda: self.js(code), seconds, code)

    def fill(self, selector: str, text: str, *events: str) -> None:
        """Write into a field as a user does, once it is there."""
        self.wait(f"!!document.querySelector({json.dumps(selector)})")
        self.js(_FILL % (json.dumps(selector), json.dumps(text), json.dumps(["input", "change", *events])))

    def click(self, selector: str) -> None:
        """Click on something, once it is there."""
        self.wait(f"!!document.querySelector({json.dumps(selector)})")
        self.js(f"document.querySelector({json.dumps(selector)}).click()")

    def value(self, selector: str) -> str:
        """Return the value of a field, or the text of anything else."""
        return self.js(f"(e => e.value ?? e.innerText)(document.querySelector({json.dumps(selector)}))")

    def screenshot(self, path: Path) -> None:
        """Save the window as a PNG."""
        path.write_bytes(base64.b64decode(self.call("Page.captureScreenshot", format="png")["data"]))

    def close(self) -> None:
        """End the browser."""
        self._socket.close()
        self._process.terminate()
        self._process.wait(30)


def _until(done, seconds: float, what: str = "the browser") -> None:
    end = time.monotonic() + seconds
    while not done():
        assert time.monotonic() < end, f"waited {seconds} s for {what}"
        time.sleep(0.1)
