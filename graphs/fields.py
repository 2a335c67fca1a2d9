"""The one strict reader of JSON: a dataclass says what is read, an exact error what is wrong.

    read_bytes(file, error, remedy, most)     contents of a file, bounded in size
    read_json(file, error, remedy)            plain data of a file, bounded in size and depth
    parse_json(text, error, remedy)           the same of a text that is in memory
    from_json(cls, data, error, remedy)       a ``cls``, its fields checked against its annotations
    check_format(data, number, error, remedy) the keys beside "format", which must be ``number``
    to_json(value)                            the inverse of ``from_json``, for ``json.dumps``
    split_options(text, error, remedy)        the short form ``name:key=value,key=value``
    reject(...), check_word(...)              their errors, for checks of one's own

``error`` is the class to raise and ``remedy`` the sentence that says what to type or do next:

    calibration.json: samples.count: found 'ten', expected an integer. Calibrate again: ...

Annotations may be ``bool``, ``int``, ``float``, ``str``, ``None``, ``Any``, ``Literal``, unions,
``tuple``, ``list``, ``dict`` and ``Mapping`` (keys ``str`` or ``int``) and dataclasses of these.
Nothing is converted but lists to tuples and keys to integers: an integer is a ``float``, too, and
stays what it was. A nested class with a ``from_dict`` or a ``to_dict`` of its own is asked for it.
Metadata of a field: ``{"key": name}`` is its name in JSON where that is another; ``{"omit": True}``
leaves it out where it is the default.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Collection, Iterable, Mapping
from dataclasses import MISSING, Field, dataclass, fields, is_dataclass
from functools import cache
from pathlib import Path
from types import MappingProxyType, UnionType
from typing import Any, Literal, NoReturn, TypeVar, Union, get_args, get_origin, get_type_hints

from .errors import VisistageError, nearest

T = TypeVar("T")

MAX_BYTES = 16 << 20
MAX_DEPTH = 64
"""Levels of lists and objects; ours have ten at most."""

_HALF = re.compile(r"\\u[dD][89a-fA-F]")
"""Half of a character, as JSON spells it; most are beside their other half."""

_KINDS = {
    bool: "true or false",
    int: "an integer",
    float: "a finite number",
    str: "text",
    type(None): "null",
    tuple: "a list",
    list: "a list",
}


class Words(str):
    """A finding in our own words; everything else is quoted, as it may hold terminal escapes."""


def show(value: Any) -> str:
    """Return ``value`` as messages quote it: escaped, and short whatever it is."""
    try:
        text = str(value) if isinstance(value, Words) else repr(value)
    except (ValueError, RecursionError):  # integers of thousands of digits, deep nesting
        return f"a huge {type(value).__name__}"
    return text if len(text) <= 80 else text[:77] + "..."


def reject(
    field: str, found: Any, expected: str, error: type[VisistageError], remedy: str
) -> NoReturn:
    """Raise the error that says what ``field`` holds, what was expected, and what to do."""
    at = f"{field}: " if field else ""
    raise error(f"{at}found {show(found)}, expected {expected}. {remedy}")


def check_word(
    field: str,
    word: Any,
    known: Collection[Any],
    error: type[VisistageError],
    remedy: str,
    hints: Mapping[str, str] = MappingProxyType({}),
) -> None:
    """Refuse a word that is not among the ``known``; ``hints``: remedies for certain others.

    Raises:
        error: with the hint, the nearest known word, or the remedy.
    """
    if not _is_among(known, word):
        reject(field, word, _one_of(known), error, _hint(word, known, hints) or remedy)


def is_int(value: Any) -> bool:
    """Return whether ``value`` is an integer of 64 bits; true and false are none."""
    return isinstance(value, int) and not isinstance(value, bool) and abs(value) < 2**63


def is_number(value: Any) -> bool:
    """Return whether ``value`` is a finite number."""
    return is_int(value) or (isinstance(value, float) and math.isfinite(value))


def read_bytes(file: Path, error: type[VisistageError], remedy: str, most_bytes: int) -> bytes:
    """Return the contents of a file of a bounded size.

    Raises:
        error: it cannot be read, or is larger than ``most_bytes``; names the file.
    """
    try:
        with file.open("rb") as stream:
            content = stream.read(most_bytes + 1)
    except (OSError, ValueError) as failure:  # ValueError: a NUL in the name
        reason = getattr(failure, "strerror", None) or failure
        raise error(f"{file} cannot be read: {reason}. {remedy}") from None
    if len(content) > most_bytes:
        reject(str(file), Words("a larger file"), f"at most {most_bytes} bytes", error, remedy)
    return content


def read_json(
    file: Path, error: type[VisistageError], remedy: str, most_bytes: int = MAX_BYTES
) -> Any:
    """Return the plain data of a JSON file; errors name the file.

    Raises:
        error: ``read_bytes`` or ``parse_json`` refuses it.
    """
    return parse_json(read_bytes(file, error, remedy, most_bytes), error, remedy, str(file))


def parse_json(
    text: str | bytes, error: type[VisistageError], remedy: str, where: str = "the text"
) -> Any:
    """Return the plain data of a JSON text; ``where`` names it in errors.

    Raises:
        error: no UTF-8, no JSON, a repeated key, a number that is not finite, half of a character,
            or more levels than ``MAX_DEPTH``.
    """
    try:
        text = text if isinstance(text, str) else text.decode("utf-8-sig")
        data = json.loads(
            text, object_pairs_hook=_once, parse_constant=_finite, parse_float=_finite
        )
        _check_depth(data)
        if _HALF.search(text):
            _check_characters(data)
    except (ValueError, RecursionError) as failure:  # UnicodeDecodeError is a ValueError
        reason = "it is nested too deeply" if isinstance(failure, RecursionError) else failure
        raise error(f"{where} is not JSON as it should be: {reason}. {remedy}") from None
    return data


def check_format(
    data: Any, number: int, error: type[VisistageError], remedy: str, where: str = ""
) -> dict[str, Any]:
    """Return what ``data`` holds beside its "format".

    Raises:
        error: the format is not ``number``, or ``data`` is no mapping.
    """
    found = data.get("format") if isinstance(data, Mapping) else data
    if not isinstance(data, Mapping) or not is_int(found) or found != number:
        at = f"{where} " if where else ""
        raise error(f"{at}has format {show(found)}, this version reads format {number}. {remedy}")
    return {key: value for key, value in data.items() if key != "format"}


def from_json(
    cls: type[T],
    data: Any,
    error: type[VisistageError],
    remedy: str,
    where: str = "",
    *,
    defaults: bool = False,
    hints: Mapping[str, str] = MappingProxyType({}),
) -> T:
    """Return a ``cls`` whose fields are those of ``data``, exactly.

    Args:
        cls: a dataclass.
        data: what ``parse_json`` returned, or the like.
        error: class of the errors.
        remedy: last sentence of their messages.
        where: first words of their messages, such as the file's name.
        defaults: fields with a default may be missing, here and in nested classes.
        hints: remedies for words that are not among those of a ``Literal``.

    Raises:
        error: a key that is unknown or missing, or a value that is not as annotated; whatever
            the constructor of ``cls`` raises besides.
    """
    reader = _Reader(error, remedy, f"{where}: " if where else "", defaults, hints)
    return reader.instance(cls, data, "")


def to_json(value: Any) -> Any:
    """Return ``value`` as plain data: dataclasses and mappings as dicts, tuples as lists."""
    if is_dataclass(value) and not isinstance(value, type):
        return {
            _key(field): _item_json(getattr(value, field.name))
            for field in fields(value)
            if not (field.metadata.get("omit") and getattr(value, field.name) == _default(field))
        }
    if isinstance(value, Mapping):
        return {str(key): _item_json(item) for key, item in value.items()}
    if isinstance(value, (tuple, list)):
        return [_item_json(item) for item in value]
    return value


def _item_json(value: Any) -> Any:
    return value.to_dict() if hasattr(value, "to_dict") else to_json(value)


def split_options(
    text: str, error: type[VisistageError], remedy: str, repeatable: Collection[str] = ()
) -> tuple[str, list[tuple[str, str]]]:
    """Return the name in ``name:key=value,key=value``, and the pairs of key and value.

    Raises:
        error: an item without a key or a value, or a key that occurs twice and is not
            ``repeatable``.
    """
    name, _, tail = text.partition(":")
    name = name.strip()
    pairs: list[tuple[str, str]] = []
    for item in tail.split(",") if tail.strip() else ():
        key, _, value = (part.strip() for part in item.partition("="))
        if not (key and value):
            reject(f"{name}: option", item, "key=value", error, remedy)
        if any(key == known for known, _ in pairs) and key not in repeatable:
            reject(f"{name}: {_plain(key)}", Words("it twice"), "it once", error, "Remove one.")
        pairs.append((key, value))
    return name, pairs


@dataclass(frozen=True)
class _Reader:
    """One call of ``from_json``: ``at`` is the path of a value, as errors name it."""

    error: type[VisistageError]
    remedy: str
    where: str
    defaults: bool
    hints: Mapping[str, str]

    def instance(self, cls: Any, data: Any, at: str) -> Any:
        if not isinstance(data, Mapping):
            self.reject(at, data, "a mapping")
        known = {_key(field): field for field in fields(cls)}
        listing = _one_of(known) if known else "none"
        for key in data:
            if key not in known:
                place = f"{at}.{_plain(key)}" if at else _plain(key)
                self.reject(place, Words("an unknown key"), listing, _hint(key, known, {}))
        values = {}
        for key, field in known.items():
            place = f"{at}.{key}" if at else key
            if key in data:
                values[field.name] = self.value(_hints(cls)[field.name], data[key], place)
            elif not field.metadata.get("omit") and not (
                self.defaults and _default(field) is not MISSING
            ):
                self.reject(place, Words("nothing"), "a value")
        return cls(**values)

    def value(self, kind: Any, value: Any, at: str) -> Any:
        """Read one value; of a union, as the first kind that fits its outermost level."""
        kinds = get_args(kind) if get_origin(kind) in (Union, UnionType) else (kind,)
        kind = next((kind for kind in kinds if _fits(kind, value)), None)
        if kind is None:
            words = [
                word for kind in kinds if get_origin(kind) is Literal for word in get_args(kind)
            ]
            expected = " or ".join(_describe(kind) for kind in kinds)
            self.reject(at, value, expected, _hint(value, words, self.hints))
        origin, args = get_origin(kind), get_args(kind)
        if origin in (tuple, list):
            kinds = args if origin is tuple and ... not in args else (args[0],) * len(value)
            if len(kinds) != len(value):
                self.reject(at, value, f"a list of {len(kinds)}")
            items = enumerate(zip(kinds, value, strict=True))
            return origin(self.value(kind, item, f"{at}[{i}]") for i, (kind, item) in items)
        if origin in (dict, Mapping):
            return {
                self.key(args[0], key, at): self.value(args[1], item, f"{at}.{_plain(key)}")
                for key, item in value.items()
            }
        if is_dataclass(kind):
            own = getattr(kind, "from_dict", None)
            return own(value) if own else self.instance(kind, value, at)
        return value

    def key(self, kind: type, key: Any, at: str) -> str | int:
        if not isinstance(key, str) or (kind is int and not key.isdecimal()):
            self.reject(f"{at}.{_plain(key)}", Words("a key"), f"{_describe(kind)} for a key")
        return kind(key)

    def reject(self, at: str, found: Any, expected: str, hint: str = "") -> NoReturn:
        field = f"{self.where}{at}".removesuffix(": ")
        reject(field, found, expected, self.error, hint or self.remedy)


def _key(field: Field) -> str:
    return field.metadata.get("key", field.name)


def _default(field: Field) -> Any:
    """Return the field's default, ``MISSING`` where it has none."""
    return field.default if field.default_factory is MISSING else field.default_factory()


@cache
def _hints(cls: type) -> dict[str, Any]:
    return get_type_hints(cls)


def _fits(kind: Any, value: Any) -> bool:
    """Return whether ``value`` is of this kind, as far as its outermost level tells."""
    origin = get_origin(kind) or kind
    if origin is Literal:
        return _is_among(get_args(kind), value)
    if origin is int:
        return is_int(value)
    if origin is float:
        return is_number(value)
    if origin in (tuple, list):
        return isinstance(value, (list, tuple))
    if origin in (dict, Mapping) or is_dataclass(origin):
        return isinstance(value, Mapping)
    return origin is Any or isinstance(value, origin)


def _describe(kind: Any) -> str:
    if get_origin(kind) is Literal:
        return _one_of(get_args(kind))
    return _KINDS.get(get_origin(kind) or kind, "a mapping")


def _is_among(words: Iterable[Any], value: Any) -> bool:
    return any(type(word) is type(value) and word == value for word in words)


def _hint(word: Any, known: Iterable[Any], hints: Mapping[str, str]) -> str:
    if not isinstance(word, str):
        return ""
    return (
        hints.get(word) or nearest(word, [item for item in known if isinstance(item, str)]).strip()
    )


def _one_of(words: Collection[Any]) -> str:
    listing = ", ".join(map(str, words))
    return listing if len(words) == 1 else f"one of {listing}"


def _plain(key: Any) -> str:
    """Return a key of a foreign file, safe to print on a terminal."""
    return key if isinstance(key, str) and key.isprintable() and len(key) <= 80 else show(key)


def _once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    data = dict(pairs)
    if len(data) != len(pairs):
        keys = [key for key, _ in pairs]
        twice = next(key for key in data if keys.count(key) > 1)
        raise ValueError(f"{_plain(twice)}: found twice, expected once")
    return data


def _finite(text: str) -> float:
    number = float(text)
    if not math.isfinite(number):
        raise ValueError(f"{text[:40]} is no finite number")
    return number


def _check_characters(data: Any) -> None:
    """Refuse text that no UTF-8 holds: it could neither be printed nor written."""
    try:
        json.dumps(data, ensure_ascii=False).encode("utf-8")
    except UnicodeEncodeError:
        raise ValueError("it holds half of a character") from None


def _check_depth(data: Any) -> None:
    level, depth = [data], 0
    while level:
        if depth > MAX_DEPTH:
            raise ValueError(f"it has more than {MAX_DEPTH} levels")
        level = [
            item
            for holder in level
            if isinstance(holder, (dict, list))
            for item in (holder.values() if isinstance(holder, dict) else holder)
            if isinstance(item, (dict, list))
        ]
        depth += 1
