"""A browser that is driven: Chromium's DevTools protocol over a pipe."""

import base64
import contextlib
import json
import os
import subprocess
from itertools import count
from select import select

from visistage.tests.support.browser import find


class DrivenPage:
    """A page of a browser that runs; use ``driven``."""

    def __init__(self, send: int, receive: int):
        self._send, self._receive = send, receive
        self._numbers, self._held, self.complaints = count(1), b"", []
        target = self._call("Target.createTarget", url="about:blank")["targetId"]
        session = self._call("Target.attachToTarget", targetId=target, flatten=True)
        self._session = session["sessionId"]
        for domain in ("Page", "Runtime", "Log"):
            self.call(f"{domain}.enable")

    def call(self, method, **params):
        """The result of a command about the page."""
        return self._call(method, self._session, **params)

    def run(self, script):
        """The value of an expression in the page, awaited."""
        done = self.call(
            "Runtime.evaluate", expression=script, awaitPromise=True, returnByValue=True
        )
        assert "exceptionDetails" not in done, done["exceptionDetails"]
        return done["result"].get("value")

    def until(self, condition, seconds=10):
        """Wait until an expression is true."""
        poll = f"""new Promise((good, bad) => {{
            const end = Date.now() + {seconds * 1000};
            const look = () => ({condition}) ? good(true)
                : Date.now() > end ? good(false) : setTimeout(look, 20);
            look();
        }})"""
        assert self.run(poll), condition

    def size(self, width, height, dark=False):
        """Give the window a size, and a colour scheme."""
        metrics = {"width": width, "height": height, "deviceScaleFactor": 1, "mobile": False}
        self.call("Emulation.setDeviceMetricsOverride", **metrics)
        scheme = {"name": "prefers-color-scheme", "value": "dark" if dark else "light"}
        self.call("Emulation.setEmulatedMedia", features=[scheme])

    def shot(self, file):
        """Write a screenshot of the whole page."""
        done = self.call("Page.captureScreenshot", captureBeyondViewport=True)
        file.write_bytes(base64.b64decode(done["data"]))

    def _call(self, method, session=None, **params):
        number = next(self._numbers)
        asked = {"id": number, "method": method, "params": params}
        asked |= {"sessionId": session} if session else {}
        os.write(self._send, json.dumps(asked).encode() + b"\0")
        while True:
            message = self._message()
            if message.get("id") == number:
                assert "error" not in message, message
                return message["result"]
            if message.get("method") in ("Log.entryAdded", "Runtime.exceptionThrown"):
                self.complaints.append(message["params"])

    def _message(self):
        while b"\0" not in self._held:
            assert select([self._receive], [], [], 30)[0], "the browser says nothing"
            self._held += os.read(self._receive, 1 << 20)
        message, self._held = self._held.split(b"\0", 1)
        return json.loads(message)


@contextlib.contextmanager
def driven(folder):
    """A page of a browser without a window, whose files are in ``folder``."""
    theirs, send = os.pipe()
    receive, theirs_too = os.pipe()

    def take():
        ends = os.dup(theirs), os.dup(theirs_too)  # 3 and 4 may be these themselves
        for number, end in zip((3, 4), ends, strict=True):
            os.dup2(end, number)

    # fmt: off
    command = [
        find(), "--headless", "--no-sandbox", "--disable-gpu", "--no-first-run",
        "--hide-scrollbars", "--disable-background-networking", "--disable-component-update",
        "--disable-sync", f"--user-data-dir={folder}", "--remote-debugging-pipe",
    ]
    # fmt: on
    running = subprocess.Popen(command, preexec_fn=take, pass_fds=(3, 4), stderr=subprocess.DEVNULL)
    os.close(theirs)
    os.close(theirs_too)
    try:
        yield DrivenPage(send, receive)
    finally:
        running.terminate()
        running.wait(20)
        os.close(send)
        os.close(receive)
