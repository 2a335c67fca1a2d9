"""The server side of a runner's protocol: one JSON line in, one JSON line out.

    python RUNNER.py '{"model": ..., "threads": 2, ...}'

    ◀ {"ready": true, "import_ms": ..., "load_ms": ..., "peak_mib": ..., "about": {...}}
    ▶ {"image": "0.npy", "question": ..., "text": ..., "new": 32}
    ◀ {"prompt_tokens": ..., "tokens": [...], "first_ms": ..., "per_token_ms": ..., "peak_mib": ...}

or, where several callers ask at once (``serve_crowds``):

    ▶ {"questions": [{"image": ..., "question": ..., "text": ...}, ...], "callers": 8, "new": 32}
    ◀ {"seconds": ..., "answers": [{"tokens": [...], "first_ms": ..., "total_ms": ...}, ...], ...}

``image`` is an RGB image (H, W, 3) of uint8 of the size that the vision encoder takes, so that
no resampling decides; it is read before the clock starts. ``text`` is ``question`` in the model's
own chat template. A runner ends with its stdin. Standard library and NumPy only: the Pythons of
peers import this file, and this project is not installed there.
"""

import itertools
import json
import os
import sys
import threading
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


class Crowd:
    """Answers to questions that several callers ask, by number; times count from each asking."""

    def __init__(self, count):
        self.started = time.perf_counter()
        self.asked, self.answers = [0.0] * count, [None] * count

    def ask(self, number):
        """Note that a caller asks."""
        self.asked[number] = time.perf_counter()
        self.answers[number] = {"tokens": [], "first_ms": None, "total_ms": None}

    def hear(self, number, tokens):
        """Note the next tokens of an answer."""
        answer, elapsed_ms = self.answers[number], self._elapsed_ms(number)
        if answer["first_ms"] is None:
            answer["first_ms"] = elapsed_ms
        answer["tokens"] += [int(token) for token in tokens]
        answer["total_ms"] = elapsed_ms

    def note(self, number, tokens, first_ms):
        """Note a whole answer, whose first token came after ``first_ms``."""
        self.answers[number] = {
            "tokens": list(tokens),
            "first_ms": first_ms,
            "total_ms": self._elapsed_ms(number),
        }

    def call(self, callers, ask):
        """Have callers ask with ``ask(number)``, each the next question once his is answered."""
        turns, lock = itertools.count(), threading.Lock()

        def caller():
            while True:
                with lock:
                    number = next(turns)
                if number >= len(self.answers):
                    return
                self.ask(number)
                ask(number)

        threads = [threading.Thread(target=caller) for _ in range(callers)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        return self

    def _elapsed_ms(self, number):
        return (time.perf_counter() - self.asked[number]) * 1e3


def serve(make):
    """Load what ``make(**settings)`` makes and answer until stdin ends.

    It has ``about``, facts for the record, and ``ask(image, question, text, new) -> Heard``.
    """

    def answer(peer, load, image, **asked):
        return asdict(peer.ask(load(image), **asked))

    _serve(make, answer)


def serve_crowds(make):
    """Do the same for callers: ``crowd(questions, callers, new) -> Crowd``."""

    def answer(peer, load, questions, **asked):
        read = [(load(own["image"]), own["question"], own["text"]) for own in questions]
        crowd = peer.crowd(read, **asked)
        return {"seconds": time.perf_counter() - crowd.started, "answers": crowd.answers}

    _serve(make, answer)


def _serve(make, answer):
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
        print(json.dumps({**answer(peer, np.load, **json.loads(line)), **peak()}), file=out)


def peak():
    """Return the largest resident set so far; ``ru_maxrss`` would start with the parent's."""
    with open("/proc/self/status") as status:
        kib = next(int(line.split()[1]) for line in status if line.startswith("VmHWM:"))
    return {"peak_mib": kib / 1024}
