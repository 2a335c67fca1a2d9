"""A chat template of a checkpoint, rendered in a sandbox with what Hugging Face offers templates.

Templates come with downloaded checkpoints, so they are not trusted: jinja's immutable sandbox,
plain JSON data only, no underscore names in namespaces, filters and methods from a list, and bounds
on steps and memory (``metering``). Any error inside is a PromptError. This module knows neither
tokens nor images.
"""

import datetime
import json
import threading
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, NoReturn

import jinja2
from jinja2 import nodes
from jinja2.ext import Extension
from jinja2.parser import Parser
from jinja2.sandbox import ImmutableSandboxedEnvironment, SecurityError
from jinja2.utils import Namespace

from ...graphs.errors import ModelError, PromptError
from ...graphs.fields import read_json
from .metering import (
    MOST_POWER,
    MeteredTree,
    TemplateBudget,
    check_percent,
    install,
    method_table,
    read,
)

MAX_TEMPLATE_CHARS, MAX_TEMPLATE_NODES = 100_000, 6_000  # several times the longest published
_MOST_WORDS = 300  # of a template's own error


class ChatTemplate:
    """A compiled chat template.

    Args:
        source: jinja text.
        variables: given to every rendering beside the messages: ``bos_token``, ``eos_token``, ...
        max_chars: longest text a rendering may give.

    Raises:
        PromptError: too long, or not jinja.
    """

    def __init__(
        self, source: str, variables: Mapping[str, str] | None = None, *, max_chars: int = 1_000_000
    ) -> None:
        if len(source) > MAX_TEMPLATE_CHARS:
            raise PromptError(
                f"the chat template has {len(source)} characters; the limit is "
                f"{MAX_TEMPLATE_CHARS}. Is chat_template.jinja really a template?"
            )
        self._variables = dict(variables or {})
        self._max_chars = max_chars
        self._environment = _Environment(max_chars)
        self._lock = threading.Lock()  # of the budget
        try:
            self._tree = self._environment.parse(source)
            if sum(1 for _ in self._tree.find_all(nodes.Node)) > MAX_TEMPLATE_NODES:
                raise PromptError(
                    f"the chat template has more than {MAX_TEMPLATE_NODES} parts. Is "
                    "chat_template.jinja really a template?"
                )
            self._template = self._environment.from_string(MeteredTree().visit(self._tree))
        except jinja2.TemplateSyntaxError as error:
            raise PromptError(
                f"the chat template is not valid jinja, line {error.lineno}: "
                f"{_short(error.message)}. Correct chat_template.jinja."
            ) from error
        except PromptError:
            raise
        except Exception as error:  # a tree too deep, for one
            raise PromptError(f"the chat template cannot be compiled: {_short(error)}.") from error

    @property
    def literals(self) -> str:
        """The text that the template writes by itself, joined with NULs."""
        written = {node.data for node in self._tree.find_all(nodes.TemplateData)}
        constants = {node.value for node in self._tree.find_all(nodes.Const)}
        return "\0".join(written | {value for value in constants if isinstance(value, str)})

    def render(
        self, messages: Sequence[Mapping[str, Any]], *, add_generation_prompt: bool = True
    ) -> str:
        """Render a conversation as text for the tokenizer.

        Args:
            messages: plain data, [{"role": str, "content": str or list of blocks}, ...].
            add_generation_prompt: end with the beginning of the assistant's turn.

        Raises:
            PromptError: the template refuses the messages, fails, or writes or takes too much.
        """
        with self._lock:
            return self._render(messages, add_generation_prompt)

    def _render(self, messages: Sequence[Mapping[str, Any]], add_generation_prompt: bool) -> str:
        pieces, length, budget = [], 0, self._environment.budget
        try:
            budget.refill(messages)
            for piece in self._template.generate(
                messages=messages,
                tools=None,
                documents=None,
                add_generation_prompt=add_generation_prompt,
                **self._variables,
            ):
                pieces.append(piece)
                length += len(piece)
                budget.check(length)
        except _Rejected as refusal:
            why = _short(refusal)
            raise PromptError(f"the chat template refuses these messages: {why}") from None
        except PromptError:
            raise
        except Exception as error:  # a template can raise anything its expressions can
            raise PromptError(
                f"the chat template failed on these messages: {type(error).__name__}: "
                f"{_short(error)}. "
                "Check the roles and contents, or correct chat_template.jinja."
            ) from error
        finally:
            budget.refill(())  # it holds what it has weighed
        return "".join(pieces)


def find_template(
    paths: Mapping[str, Path], tokenizer_config: Mapping[str, Any], processor: Mapping[str, Any]
) -> str:
    """Return the template that Hugging Face would take, where several files have one.

    Args:
        paths: of the files with the roles "chat_template" and "chat_template_json", if any.
        tokenizer_config: the parsed ``tokenizer_config.json``.
        processor: the parsed ``processor_config.json``.

    Raises:
        ModelError: a file that cannot be read.
        PromptError: there is no template.
    """
    candidates: list[Any] = [processor.get("chat_template")]
    for role in ("chat_template_json", "chat_template"):
        if role not in paths:
            continue
        if paths[role].suffix == ".json":
            candidates.append(read_tokenizer_json(paths[role]).get("chat_template"))
        else:
            try:
                candidates.append(paths[role].read_text(encoding="utf-8"))
            except (OSError, ValueError) as error:
                raise ModelError(f"{paths[role]} cannot be read ({error}).") from error
    candidates.append(tokenizer_config.get("chat_template"))
    for found in candidates:
        if isinstance(found, list):  # [{"name": ..., "template": ...}]
            found = {entry.get("name"): entry.get("template") for entry in found}
        if isinstance(found, Mapping):
            found = found.get("default")
        if isinstance(found, str) and found:
            return found
    raise PromptError(
        "there is no chat template: none of chat_template.jinja, chat_template.json, "
        "processor_config.json and tokenizer_config.json has one. Add a chat_template.jinja beside "
        "tokenizer.json; the model's card says how it is prompted."
    )


def read_tokenizer_json(path: Path) -> dict[str, Any]:
    """Read a JSON object from a checkpoint's file.

    Raises:
        ModelError: no such file, or something else in it.
    """
    data = read_json(path, ModelError, "Fetch it again.")
    if not isinstance(data, dict):
        raise ModelError(f"{path} holds no JSON object. Fetch it again.")
    return data


class _Rejected(Exception):
    """Raised by a template's ``raise_exception()``."""


class _Generation(Extension):
    """``{% generation %}`` marks the assistant's words for training; here it changes nothing."""

    tags = {"generation"}  # noqa: RUF012 - jinja declares it so

    def parse(self, parser: Parser) -> nodes.Node:
        line = next(parser.stream).lineno
        body = parser.parse_statements(("name:endgeneration",), drop_needle=True)
        # A call block, not the body itself: names set inside stay inside, as in Hugging Face.
        return nodes.CallBlock(self.call_method("_same"), [], [], body).set_lineno(line)

    def _same(self, caller: Callable[[], str]) -> str:
        return caller()


class _PlainNamespace(Namespace):
    """``namespace()`` without names such as ``__call__``, a way out of the sandbox."""

    def __init__(*args: Any, **kwargs: Any) -> None:
        self, *rest = args
        values = dict(*rest, **kwargs)
        for name in values:
            _plain_name(name)
        Namespace.__init__(self, values)

    def __setitem__(self, name: str, value: Any) -> None:
        _plain_name(name)
        super().__setitem__(name, value)


class _Environment(ImmutableSandboxedEnvironment):
    intercepted_binops = frozenset(ImmutableSandboxedEnvironment.default_binop_table)

    def __init__(self, max_chars: int) -> None:
        super().__init__(
            trim_blocks=True,
            lstrip_blocks=True,
            finalize=read,
            extensions=[_Generation, "jinja2.ext.loopcontrols"],
        )
        self.budget = TemplateBudget(max_chars)
        self.filters["tojson"] = _tojson
        install(self)
        self.globals.update(
            raise_exception=_raise_exception,
            strftime_now=_strftime_now,
            namespace=_PlainNamespace,
            dict=lambda *args, **kwargs: dict(*args, **kwargs),
        )
        del self.globals["lipsum"]  # writes random text of any length

    def is_safe_attribute(self, obj: Any, attr: str, value: Any) -> bool:
        methods = method_table(obj)
        allowed = methods is None or attr in methods
        return allowed and super().is_safe_attribute(obj, attr, value)

    def call(__self, __context: Any, __obj: Any, *args: Any, **kwargs: Any) -> Any:
        budget = __self.budget
        method = getattr(__obj, "__wrapped__", __obj)  # jinja wraps format()
        owner = getattr(method, "__self__", None)
        check = (method_table(owner) or {}).get(getattr(method, "__name__", ""))
        for value in (owner, *args, *kwargs.values()):
            if isinstance(owner, str) or not isinstance(value, Namespace):
                budget.read(value)
        if check is not None:
            check(budget, owner, *args, **kwargs)
        return budget.made(super().call(__context, __obj, *args, **kwargs))

    def call_binop(self, context: Any, operator: str, left: Any, right: Any) -> Any:
        self.budget.read(left)
        self.budget.read(right)
        if operator == "**" and isinstance(right, (int, float)) and abs(right) > MOST_POWER:
            raise SecurityError(f"a power of {_short(right)} is out of bounds")
        if operator == "%" and isinstance(left, str):
            check_percent(self.budget, left, right)
        for many, times in ((left, right), (right, left)):
            if operator == "*" and isinstance(many, (str, list, tuple)) and isinstance(times, int):
                self.budget.check(len(many) * times)
        return self.budget.made(super().call_binop(context, operator, left, right))

    def concat(self, parts: Iterable[str]) -> str:  # type: ignore[override]
        """Join what was written in a macro or a block."""
        pieces = list(parts)
        self.budget.check(sum(map(len, pieces)))
        return self.budget.made("".join(pieces))


def _short(value: Any) -> str:
    """Return what a template, or jinja about it, says, no longer than a message can be."""
    text = str(value)
    return text if len(text) <= _MOST_WORDS else f"{text[:_MOST_WORDS]}..."


def _plain_name(name: Any) -> None:
    if isinstance(name, str) and name.startswith("_"):
        raise SecurityError(f"namespace attribute {name!r} begins with an underscore")


def _raise_exception(message: Any) -> NoReturn:
    raise _Rejected(str(message))


def _strftime_now(format: str) -> str:  # noqa: A002 - templates may name the argument
    if len(format) > 100:
        raise SecurityError("a format of a date this long is out of bounds")
    return datetime.datetime.now().strftime(format)


def _tojson(
    x: Any,
    ensure_ascii: bool = False,
    indent: int | None = None,
    separators: tuple[str, str] | None = None,
    sort_keys: bool = False,
) -> str:
    # jinja's own filter escapes HTML.
    return json.dumps(
        x, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys
    )
