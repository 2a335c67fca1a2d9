"""Token ids to text, piece by piece, as an answer grows.

A piece is returned only when no later token can change it, so the pieces joined are exactly what
decoding all ids at once would give:

    ids      31  | 240 159 | 152 130 |  13      (the bytes of one emoji, spread over two tokens)
    pieces  "Hi" |   ""    |   "🙂"  |  "!"

Two things are held back: an unfinished character, and text that may be the beginning of a stop
string. This module knows neither prompts nor sampling.
"""

import re
from collections.abc import Sequence

from tokenizers import Tokenizer

from ...graphs.errors import PromptError
from ...graphs.fields import show

MAX_STOPS = 16
MAX_STOP_CHARS = 1024
_BYTE_TOKEN = re.compile(r"<0x[0-9A-Fa-f]{2}>")
_REPLACEMENT = "\ufffd"


class TextStream:
    """Incremental detokeniser for one answer; special tokens are left out of the text.

    Only a short window of ids is decoded at each step: the last tokens already returned, for
    context (a leading space belongs to the text only when something precedes it), and those held
    back since. A run of byte-fallback tokens (``<0xF0>``) is held until it ends, because one bad
    byte turns the whole run into U+FFFD.

    Args:
        tokenizer: of the model.
        stops: up to 16 strings, or one, that end the answer. The first to be *completed* wins, and
            the text is cut before it, wherever pieces are cut.

    Attributes:
        stopped: a stop string was completed; every later piece is "".
        stop: that string, or None.

    Raises:
        PromptError: an empty, too long or non-text stop string, or too many.
    """

    def __init__(self, tokenizer: Tokenizer, stops: Sequence[str] | str = ()) -> None:
        self._tokenizer = tokenizer
        self._stops = checked_stops(stops)
        added = tokenizer.get_added_tokens_decoder()
        self._silent = {i for i, token in added.items() if token.special}
        self._byte_fallback = _has_byte_fallback(tokenizer)
        self._window: list[int] = []  # context, then the ids held back
        self._context = 0  # how many of them are context
        self._context_text = ""  # what the context alone decodes to
        self._tail = ""  # decoded text that may begin a stop string
        self._finished = False
        self.stopped = False
        self.stop: str | None = None

    def push(self, token_id: int) -> str:
        """Take the next id of the answer; return the text that is certain now, often "".

        Raises:
            RuntimeError: after ``finish``.
        """
        if self._finished:
            raise RuntimeError("push() after finish(): make a new TextStream for a new answer")
        # What decodes to nothing must not enter the window: it could never leave it.
        token = None if token_id in self._silent else self._tokenizer.id_to_token(token_id)
        if self.stopped or token is None:
            return ""
        self._window.append(token_id)
        if self._byte_fallback and _BYTE_TOKEN.fullmatch(token):
            return ""
        text = self._decode(self._window)
        if len(text) <= len(self._context_text) or not text.startswith(self._context_text):
            return ""
        if text.endswith(_REPLACEMENT) and not self._byte_fallback:
            return ""  # a character whose last bytes are still to come
        piece = text[len(self._context_text) :]
        del self._window[: self._context]
        self._context = len(self._window)
        self._context_text = self._decode(self._window)
        return self._release(piece)

    def finish(self) -> str:
        """End the answer: return everything held back. A second call returns ""."""
        if self._finished or self.stopped:
            self._finished = True
            return ""
        self._finished = True
        piece = self._release(self._decode(self._window)[len(self._context_text) :])
        tail, self._tail = self._tail, ""
        return piece + tail

    def _decode(self, ids: list[int]) -> str:
        return self._tokenizer.decode(ids, skip_special_tokens=True)

    def _release(self, piece: str) -> str:
        """Pass text through the stop strings; keep what may be the beginning of one."""
        if not self._stops:
            return piece
        text = self._tail + piece
        hits = [(at + len(stop), at, stop) for stop in self._stops if (at := text.find(stop)) >= 0]
        if hits:
            _, at, self.stop = min(hits)
            self.stopped, self._tail = True, ""
            return text[:at]
        keep = _possible_beginning(text, self._stops)
        self._tail = text[len(text) - keep :]
        return text[: len(text) - keep]


def _possible_beginning(text: str, stops: Sequence[str]) -> int:
    """Return how many last characters of ``text`` could be the first ones of a stop string."""
    longest = min(max(map(len, stops)) - 1, len(text))
    for count in range(longest, 0, -1):
        if any(stop.startswith(text[-count:]) for stop in stops):
            return count
    return 0


def _has_byte_fallback(tokenizer: Tokenizer) -> bool:
    # A decoder shows its kind only when pickled; serialising the whole tokenizer would take 30 ms.
    decoder = tokenizer.decoder
    return decoder is not None and b"ByteFallback" in decoder.__getstate__()


def checked_stops(stops: Sequence[str] | str) -> tuple[str, ...]:
    """Return one stop string, or several, as a tuple.

    Raises:
        PromptError: an empty, too long or non-text stop string, or too many.
    """
    if not isinstance(stops, (str, list, tuple, set, frozenset)):
        raise PromptError(f"stop is {show(stops)}; expected a string or a list of them.")
    stops = (stops,) if isinstance(stops, str) else tuple(stops)
    if len(stops) > MAX_STOPS:
        raise PromptError(f"{len(stops)} stop strings were given; at most {MAX_STOPS} are allowed.")
    for stop in stops:
        if not isinstance(stop, str) or not 0 < len(stop) <= MAX_STOP_CHARS:
            raise PromptError(
                f"stop string {show(stop)} cannot be used; expected text of 1 to {MAX_STOP_CHARS} "
                "characters. Leave it out to stop only at the end-of-sequence token."
            )
    return stops
