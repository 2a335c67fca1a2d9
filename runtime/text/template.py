"""A chat template of a checkpoint, rendered in a sandbox with what Hugging Face offers templates.

Templates come with downloaded checkpoints, so they are not trusted: jinja's immutable sandbox,
plain JSON data only, no underscore names in namespaces, bounded repetition and bounded output.
Any error inside is a PromptError. This module knows neither tokens nor images.
"""

import datetime
import json
from collections.abc import Callable, Mapping, Sequence
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

MAX_TEMPLATE_CHARS = 1_000_000
_MAX_POWER = 64


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
        try:
            self._tree = self._environment.parse(source)
            self._template = self._environment.from_string(source)
        except jinja2.TemplateSyntaxError as error:
            raise PromptError(
                f"the chat template is not valid jinja, line {error.lineno}: {error.message}. "
                "Correct chat_template.jinja."
            ) from error
        except Exception as error:  # constants are computed at once and can raise anything
            raise PromptError(f"the chat template cannot be compiled: {error}.") from error

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
            PromptError: the template refuses the messages, fails, or writes too much.
        """
        pieces, length = [], 0
        try:
            for piece in self._template.generate(
                messages=messages,
                tools=None,
                documents=None,
                add_generation_prompt=add_generation_prompt,
                **self._variables,
            ):
                pieces.append(piece)
                length += len(piece)
                if length > self._max_chars:
                    raise _too_long(self._max_chars)
        except _Rejected as refusal:
            raise PromptError(f"the chat template refuses these messages: {refusal}") from None
        except PromptError:
            raise
        except Exception as error:  # a template can raise anything its expressions can
            raise PromptError(
                f"the chat template failed on these messages: {type(error).__name__}: {error}. "
                "Check the roles and contents, or correct chat_template.jinja."
            ) from error
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
    intercepted_binops = frozenset(("*", "**"))

    def __init__(self, max_chars: int) -> None:
        super().__init__(
            trim_blocks=True,
            lstrip_blocks=True,
            extensions=[_Generation, "jinja2.ext.loopcontrols"],
        )
        self._max_chars = max_chars
        self.filters["tojson"] = _tojson
        self.globals.update(
            raise_exception=_raise_exception,
            strftime_now=_strftime_now,
            namespace=_PlainNamespace,
            dict=lambda *args, **kwargs: dict(*args, **kwargs),
        )
        del self.globals["lipsum"]  # writes random text of any length

    def call_binop(self, context: Any, operator: str, left: Any, right: Any) -> Any:
        if operator == "**" and isinstance(right, (int, float)) and abs(right) > _MAX_POWER:
            raise SecurityError(f"a power of {right} is out of bounds")
        for many, times in ((left, right), (right, left)):
            repeats = isinstance(many, (str, list, tuple)) and isinstance(times, int)
            if operator == "*" and repeats and len(many) * times > self._max_chars:
                raise _too_long(self._max_chars)
        return super().call_binop(context, operator, left, right)


def _too_long(limit: int) -> PromptError:
    return PromptError(
        f"the chat template writes more than {limit} characters. Shorten the messages; if they are "
        "short, chat_template.jinja is broken."
    )


def _plain_name(name: Any) -> None:
    if isinstance(name, str) and name.startswith("_"):
        raise SecurityError(f"namespace attribute {name!r} begins with an underscore")


def _raise_exception(message: Any) -> NoReturn:
    raise _Rejected(str(message))


def _strftime_now(format: str) -> str:  # noqa: A002 - templates may name the argument
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
