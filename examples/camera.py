"""An example: python examples/camera.py engines "How many objects are there?" [0 | video | folder].

Asks about the newest frame of a camera, over and over (`pip install opencv-python-headless`), or
about the images of a folder, and prints a line for each answer. Frames that come while an answer is
written are dropped: an answer is about what was there when it was asked, not about a queue.
"""

import sys
import threading
from pathlib import Path

from visistage import runtime


class Camera:
    """The newest frame of a camera or a video, read in a thread of its own."""

    def __init__(self, source):
        import cv2

        self.cv2, self.capture = cv2, cv2.VideoCapture(int(source) if source.isdigit() else source)
        if not self.capture.isOpened():
            sys.exit(f"{source} cannot be opened. Give the number of a camera, or a video")
        self.frame, self.over, self.came = None, False, threading.Condition()
        threading.Thread(target=self.read, daemon=True).start()

    def read(self):
        """Keep the newest frame."""
        there = True
        while there:
            there, frame = self.capture.read()
            with self.came:
                self.frame, self.over = (frame if there else self.frame), not there
                self.came.notify()

    def __iter__(self):
        while True:
            with self.came:
                self.came.wait_for(lambda: self.frame is not None or self.over)
                frame, self.frame = self.frame, None
            if frame is None:
                return
            yield self.cv2.cvtColor(frame, self.cv2.COLOR_BGR2RGB)


def main(bundle, question, source="0"):
    """Answer until there are no more frames, or Ctrl-C."""
    folder = Path(source)
    frames = sorted(folder.glob("*.[pj][np]g")) if folder.is_dir() else Camera(source)
    with runtime.load(bundle) as session:
        for frame in frames:
            answer = session.infer(frame, question, max_tokens=20)
            print(f"{answer.timings.first_token_ms:5.0f} ms  {answer.text.strip()}", flush=True)


if __name__ == "__main__":
    main(*sys.argv[1:])
