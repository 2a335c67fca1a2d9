"""Seeded mutations for tests of readers: of plain data, of its JSON text, of any bytes.

    for name, value in mutations(data, random.Random(0)): ...        # plain data, one change each
    for name, text in json_mutations(data, random.Random(0)): ...    # its JSON, and what only
                                                                     # a text can hold
    name, content = mutated_bytes(content, random.Random(0))         # one change of a binary file

``name`` says place and change, such as ``config.text.layers: negative``, and goes into the
messages of failed tests. Equal seeds give equal mutations. ``HOSTILE_NAMES`` are names of files
that must not be followed out of a folder.
"""

from __future__ import annotations

import json
import random
from collections.abc import Callable, Iterator
from typing import Any

Place = tuple[Any, ...]
"""Keys and indices that lead to a value; () is the whole."""

HOSTILE_NAMES = {
    "absolute": "/etc/hostname",
    "parent": "../outside.bin",
    "hidden parent": "inner/../../outside.bin",
    "dot": ".",
    "parent alone": "..",
    "empty": "",
    "NUL": "weights.bin\0.txt",
    "long": "a" * 5000,
    "long path": "a/" * 3000 + "b",
    "drive": "C:/outside.bin",
    "drive alone": "C:outside.bin",
    "backslash": "..\\outside.bin",
    "server": "//server/share/outside.bin",
    "stream": "manifest.json::$DATA",
    "line": "weights\n.bin",
    "bidi": "weights\u202e.bin",
    "lone surrogate": "weights\udc80.bin",
    "missing": "no-such-file.bin",
    "folder": "engines",
}

DEEP = 300
"""Levels of nesting in plain data; texts have ``DEEPEST``."""
DEEPEST = 100_000

_NEAR = {"float32": "float16", "float16": "bfloat16", "int8": "float32", "B": "Q", "S": "N"}


def places(value: Any, at: Place = ()) -> Iterator[tuple[Place, Any]]:
    """Yield every place in plain data, and the value there; the whole comes first."""
    yield at, value
    if isinstance(value, (dict, list)):
        for key, item in value.items() if isinstance(value, dict) else enumerate(value):
            yield from places(item, (*at, key))


def replaced(value: Any, place: Place, by: Any) -> Any:
    """Return plain data with another value at ``place``; nothing else is copied."""
    if not place:
        return by
    new = dict(value) if isinstance(value, dict) else list(value)
    new[place[0]] = replaced(value[place[0]], place[1:], by)
    return new


def without(value: Any, place: Place) -> Any:
    """Return plain data without the item at ``place``."""
    *before, last = place
    holder = value
    for key in before:
        holder = holder[key]
    new = dict(holder) if isinstance(holder, dict) else list(holder)
    del new[last]
    return replaced(value, tuple(before), new)


def mutations(value: Any, rng: random.Random) -> Iterator[tuple[str, Any]]:
    """Yield (name, plain data with one change): every change at every place, in random order.

    A change is another type, sign, size or depth, a missing, doubled or additional item. Take a
    number of them with ``itertools.islice``; the order mixes places and changes.
    """
    jobs = list(_value_jobs(value))
    rng.shuffle(jobs)
    for name, make in jobs:
        yield name, make()


def _value_jobs(value: Any) -> Iterator[tuple[str, Callable[[], Any]]]:
    for place, old in places(value):
        at = ".".join(map(str, place)) or "the whole"
        for name, by in changes(old).items():
            yield f"{at}: {name}", lambda p=place, b=by: replaced(value, p, b)
        if place:
            yield f"{at}: missing", lambda p=place: without(value, p)


def changes(old: Any) -> dict[str, Any]:
    """Return what may stand in place of ``old``, by name."""
    deep: Any = 0
    for _ in range(DEEP):
        deep = [deep]
    new: dict[str, Any] = {
        "null": None,
        "true": True,
        "text": "x",
        "empty text": "",
        "long text": "x" * 100_000,
        "control characters": "\x1b[31m\u202e\u2028\0",
        "lone surrogate": "\udc80",
        "zero": 0,
        "negative": -1,
        "one more": 1,
        "half": 0.5,
        "huge": 10**30,
        "very huge": 10**400,
        "64 bits": 2**63 - 1,
        "32 bits": 2**31,
        "NaN": float("nan"),
        "infinity": float("inf"),
        "list": [],
        "list of one": [1],
        "list in a list": [[1, -1]],
        "mapping": {},
        "mapping of one": {"x": 1},
        "deep": deep,
    }
    if isinstance(old, bool):
        new["other"] = not old
    elif isinstance(old, (int, float)):
        new |= {"minus": -old, "one more": old + 1, "one less": old - 1, "as text": str(old)}
        new |= {"twice": old * 2, "float": float(old) if abs(old) < 2**53 else 0.1}
    elif isinstance(old, str):
        new |= {"near": _NEAR.get(old, f"{old}x"), "upper": old.upper(), "shorter": old[:-1]}
        new |= {f"{name} name": hostile for name, hostile in HOSTILE_NAMES.items()}
    elif isinstance(old, list):
        new |= {"doubled": old + old, "shorter": old[:-1], "reversed": old[::-1]}
        new["extra"] = [*old, None]
        new["many"] = (old or [0]) * 1000
    elif isinstance(old, dict):
        new |= {"extra": old | {"extra\x1b[31m": 1}, "values alone": list(old.values())}
    return {name: by for name, by in new.items() if not _same(by, old)}


def _same(by: Any, old: Any) -> bool:
    return type(by) is type(old) and by == old


def json_mutations(value: Any, rng: random.Random) -> Iterator[tuple[str, bytes]]:
    """Yield (name, JSON text): ``mutations``, and what only a text can hold, in random order.

    That is a key found twice, nesting of ``DEEPEST`` levels, numbers of thousands of digits, and
    texts that are no JSON or no UTF-8.
    """
    jobs: list[tuple[str, Callable[[], bytes]]] = []
    text = json.dumps(value).encode()
    for place, old in places(value):
        at = ".".join(map(str, place)) or "the whole"
        for name, raw in raw_texts(old).items():
            jobs.append((f"{at}: {name}", lambda p=place, r=raw: _spliced(value, p, r)))
    half = len(text) // 2
    for name, content in {
        "empty": b"",
        "cut": text[:half],
        "doubled": text + text,
        "byte order mark": b"\xef\xbb\xbf" + text,
        "UTF-16": text.decode().encode("utf-16"),
        "no UTF-8": text[:half] + b"\xff" + text[half:],
        "NUL": text[:half] + b"\0" + text[half:],
        "spaces": text + b" " * 1_000_000,
        "17 MB": text + b" " * (17 << 20),
    }.items():
        jobs.append((f"the text: {name}", lambda c=content: c))
    for _ in range(64):
        jobs.append(_any_bytes(text, random.Random(rng.random())))
    for name, change in _value_jobs(value):
        jobs.append((name, lambda c=change: json.dumps(c()).encode()))
    rng.shuffle(jobs)
    for name, make in jobs:
        yield name, make()


def _any_bytes(text: bytes, rng: random.Random) -> tuple[str, Callable[[], bytes]]:
    name, content = mutated_bytes(text, rng)
    return f"the text: {name}", lambda: content


def raw_texts(old: Any) -> dict[str, bytes]:
    """Return JSON texts that may stand in place of ``old`` and that no plain data gives."""
    texts = {
        "deepest list": b"[" * DEEPEST + b"]" * DEEPEST,
        "deepest mapping": b'{"a":' * DEEPEST + b"1" + b"}" * DEEPEST,
        "open lists": b"[" * DEEPEST,
        "many digits": b"9" * 5000,
        "many decimals": b"0." + b"9" * 5000,
        "exponent": b"1e999",
        "minus zero": b"-0",
    }
    if isinstance(old, dict) and old:
        key, item = next(iter(old.items()))
        again = f"{json.dumps(key)}: {json.dumps(item)}".encode()
        texts["key twice"] = b"{" + again + b", " + json.dumps(old)[1:].encode()
    return texts


def _spliced(value: Any, place: Place, raw: bytes) -> bytes:
    mark = "\ue000 the place \ue000"
    return json.dumps(replaced(value, place, mark)).encode().replace(json.dumps(mark).encode(), raw)


def mutated_bytes(data: bytes, rng: random.Random) -> tuple[str, bytes]:
    """Return (name, bytes) with one change: flipped, cut, inserted, doubled, zeroed, or swapped."""
    at = rng.randrange(len(data) + 1)
    end = min(len(data), at + rng.choice((1, 2, 4, 8, 64, 4096)))
    kind = rng.choice(("bit", "byte", "cut", "out", "in", "twice", "zeros", "ones", "size", "end"))
    there = data[at:end]
    new = {
        "bit": lambda: bytes(byte ^ (1 << rng.randrange(8)) for byte in there[:1]) + there[1:],
        "byte": lambda: bytes(rng.randrange(256) for _ in there),
        "out": lambda: b"",
        "in": lambda: there + rng.randbytes(rng.choice((1, 8, 1000))),
        "twice": lambda: there + there,
        "zeros": lambda: bytes(len(there)),
        "ones": lambda: b"\xff" * len(there),
        "size": lambda: rng.choice((2**31 - 1, 2**32 - 1, 2**63 - 1, 2**64 - 1)).to_bytes(
            8, rng.choice(("little", "big"))
        ),
    }
    if kind == "cut":
        return f"cut at {at}", data[:at]
    if kind == "end":
        return "bytes at the end", data + rng.randbytes(rng.choice((1, 1000)))
    return f"{kind} at {at}..{end}", data[:at] + new[kind]() + data[end:]
