"""The server side of a runner's protocol: one JSON line in, one JSON line out.

    python RUNNER.py '{"model": ..., "threads": 2, ...}'

    ◀ {"ready": true, "import_ms": ..., "load_ms": ..., "peak_mib": ..., "about": {...}}
    ▶ {"image": "0.npy", "question": ..., "text": ..., "new": 32}
    ◀ {"prompt_tokens": ..., "tokens": [...], "first_ms": ..., "per_token_ms": ..., "peak_mib": ...}

``image`` is an RGB image (H, W, 3) of uint8 of the size that the vision encoder takes, so that
no resampling decides; it is read before the clock starts. ``text`` is ``question`` in the model's
own chat template. A runner ends with its stdin. Standard library and NumPy only: the Pythons of
peers import this file, and this project is not installed there.
"""

import json
import os
import sys
import time
from dataclasses import asdict, dataclass

STARTED = time.perf_counter()
"""When this process began to import, near enough: runners import this file first."""


@dataclass(frozen=True)
class Heard:
    """An answer: rows of its prompt, its token ids, and milliseconds.

    first_ms: from the call to the first id; per_token_ms: mean of the later ones.
    """

    prompt_tokens: int
    tokens: list
    first_ms: float
    per_token_ms: float


class Stopwatch:
    """Notes when each token is known; starts when it is made."""

    def __init__(self):
        self.started = time.perf_counter()
        self.tokens, self.times = [], []

    def hear(self, token):
        """Note the next token id."""
        self.tokens.append(int(token))
        self.times.append(time.perf_counter())

    def heard(self, prompt_tokens):
        """Return the answer, of two tokens at least."""
        first, last = self.times[0], self.times[-1]
        return Heard(
            prompt_tokens,
            self.tokens,
            (first - self.started) * 1e3,
            (last - first) / (len(self.times) - 1) * 1e3,
        )


def serve(make):
    """Load what ``make(**settings)`` makes and answer until stdin ends.

    It has ``about``, facts for the record, and ``ask(image, question, text, new) -> Heard``.
    """
    # Libraries print to stdout; the conversation keeps the real one to itself.
    out = os.fdopen(os.dup(1), "w", buffering=1)
    os.dup2(2, 1)
    imported = time.perf_counter()
    peer = make(**json.loads(sys.argv[1]))
    loaded = time.perf_counter()
    import numpy as np

    facts = {"import_ms": (imported - STARTED) * 1e3, "load_ms": (loaded - imported) * 1e3}
    print(json.dumps({"ready": True, **facts, **peak(), "about": peer.about}), file=out)
    for line in sys.stdin:
        asked = json.loads(line)
        image = np.load(asked.pop("image"))
        print(json.dumps({**asdict(peer.ask(image, **asked)), **peak()}), file=out)


def peak():
    """Return the largest resident set so far; ``ru_maxrss`` would start with the parent's."""
    with open("/proc/self/status") as status:
        kib = next(int(line.split()[1]) for line in status if line.startswith("VmHWM:"))
    return {"peak_mib": kib / 1024}
