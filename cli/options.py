"""Options and arguments that several commands take, and what they stand for."""

from __future__ import annotations

import logging
import os
import sys
from collections.abc import Callable, Collection, Iterable, Sequence
from pathlib import Path
from typing import Any

import click
from click.shell_completion import CompletionItem

from ..graphs.errors import BundleError, nearest
from .show.output import Loudness, note
from .show.units import CanvasParam


class Known(click.ParamType):
    """A word among those that ``words`` returns, when it is asked; completion offers them.

    ``exactly``: others are refused; else they stand for something else, such as a file.
    """

    name = "name"

    def __init__(self, words: Callable[[], Iterable[str]], *, exactly: bool = True):
        self.words, self.exactly = words, exactly

    def convert(self, value: Any, param: Any, ctx: Any) -> Any:
        """Return the word, or click's error with all of them."""
        known = list(self.words()) if self.exactly else [value]
        if value not in known:
            shown = value if len(value) < 80 else f"{value[:77]}..."
            self.fail(f"{shown!r} is none of {', '.join(known)}.{nearest(value, known)}")
        return value

    def shell_complete(self, ctx: Any, param: Any, incomplete: str) -> list[CompletionItem]:
        """Offer the words, and files where others are allowed."""
        words = [word for word in self.words() if word.startswith(incomplete)]
        items = [CompletionItem(word) for word in words]
        return items if self.exactly else [*items, CompletionItem(incomplete, type="file")]


def _targets() -> Iterable[str]:
    from ..graphs.targets import TARGETS

    return TARGETS


def _devices() -> Iterable[str]:
    from ..tools.estimate.devices import NAMES

    return NAMES


def _backends() -> Iterable[str]:
    from ..runtime.backends.registry import ASKABLE

    return ASKABLE


def _plans() -> Iterable[str]:
    """Return presets, and each with the beginning of each of its options."""
    from ..graphs.presets.presets import PRESETS

    options = [f"{name}:{key}=" for name, preset in PRESETS.items() for key in preset.options()]
    return [*PRESETS, *options]


def _models() -> Collection[str]:
    from ..compile.checkpoint.known_models import ALIASES, KNOWN_MODELS, OWN_MODELS

    return dict.fromkeys([*OWN_MODELS, *ALIASES, *KNOWN_MODELS])


def _bundles() -> Iterable[str]:
    from ..graphs.bundle import BUNDLES_FOLDER, bundles_in

    folder = Path(BUNDLES_FOLDER)
    return [path.relative_to(folder).as_posix() for path in bundles_in(folder)]


TARGET, DEVICE, BACKEND = Known(_targets), Known(_devices), Known(_backends)
PLAN, MODEL = Known(_plans, exactly=False), Known(_models, exactly=False)
BUNDLE = Known(_bundles, exactly=False)


def _within_cores(threads: int | None) -> int | None:
    """Return no more threads than cores: they would wait for one another."""
    from ..runtime.hardware import cores

    if threads is not None and threads > cores():
        note(f"--threads {threads} is more than this machine's {cores()} cores: {cores()} are used")
        return cores()
    return threads


def _set_loudness(ctx: click.Context, param: click.Parameter, value: bool) -> None:
    if value and param.name == "quiet":
        Loudness.quiet = True
    elif value:
        logging.getLogger("visistage").setLevel(logging.DEBUG)
        logging.getLogger().setLevel(logging.INFO)


_loudness: dict[str, Any] = {"is_flag": True, "expose_value": False, "callback": _set_loudness}
quiet = click.option("-q", "--quiet", help="Only results and errors.", **_loudness)
verbose = click.option("-v", "--verbose", help="What libraries log, too.", **_loudness)


def _set_level(ctx: click.Context, param: click.Parameter, value: str | None) -> None:
    if value is not None:
        logging.getLogger().setLevel(value.upper())


log_level = click.option(
    "--log-level",
    type=click.Choice(["debug", "info", "warning", "error"], case_sensitive=False),
    expose_value=False,
    callback=_set_level,
    help="Of what libraries and visistage log; by default warning.",
)


def as_json(command: Any) -> Any:
    """Give a command the options that all have: --json, -q and -v."""
    option = click.option("--json", "as_json", is_flag=True, help="Print facts as JSON.")
    return option(quiet(verbose(command)))


NAMED = "visistage.bundle"
"""Key under which a command's context holds the bundle that --bundle names."""


def _set_bundle(ctx: click.Context, param: click.Parameter, value: str | None) -> None:
    if value is not None:
        ctx.meta[NAMED] = value


def bundle_argument(command: Any) -> Any:
    """Give a command the argument BUNDLE, which may be an option instead, or left out."""
    option = click.option(
        "--bundle",
        "bundle_option",
        type=BUNDLE,
        expose_value=False,
        callback=_set_bundle,
        help="The same as BUNDLE.",
    )
    return click.argument("bundle", required=False, type=BUNDLE)(option(command))


bundle_option = click.option("--bundle", type=BUNDLE, help="A folder, or a name in ./engines.")
model_option = click.option("--model", "model_option", type=MODEL, help="The same as MODEL.")
max_tokens_option = click.option(
    "--max-tokens",
    "--max-new-tokens",
    "max_tokens",
    type=click.IntRange(1),
    default=128,
    show_default=True,
    help="The answer's longest length.",
)
backend_option = click.option(
    "--backend",
    type=BACKEND,
    help="onnxruntime: run the graphs of any bundle on this CPU. openvino: those of cpu-portable.",
)
threads_option = click.option(
    "--threads",
    type=click.IntRange(1),
    callback=lambda ctx, param, value: _within_cores(value),
    help="Default: as many as were found fastest here.",
)
image_tokens_option = click.option(
    "--image-tokens",
    type=click.IntRange(1),
    help="Of an image at most, where a processor cuts images by their size; by default its own.",
)
canvas_option = click.option(
    "--canvas",
    type=CanvasParam(),
    help="Height x width that every image is brought to first: for cameras of one format.",
)
sm_option = click.option(
    "--sm",
    "capabilities",
    multiple=True,
    callback=lambda ctx, param, values: tuple(map(_capability, values)),
    help="Compute capability to compile for, such as 86; may be repeated.",
)
bundle_default = (
    "BUNDLE is a folder, or a name below ./engines: demo, demo/dense. Without it: what "
    "VISISTAGE_BUNDLE names, or the newest in ./engines (visistage list)."
)


def bundle_at(given: str | None) -> Path:
    """Return the folder of the bundle that a command is about, and say so where it was chosen.

    A name that is no bundle here is looked up below ./engines, where it may be short; of several
    the newest is taken.

    Raises:
        BundleError: there is none.
    """
    from ..graphs.bundle import BUNDLES_FOLDER, bundles_in, default_bundle, find_bundle

    context = click.get_current_context(silent=True)
    given = given if given is not None or context is None else context.meta.get(NAMED)
    named = Path(given) if given is not None else default_bundle()
    found = bundles_called(str(named))
    if not found:
        near = bundles_in(Path(BUNDLES_FOLDER))
        names = ", ".join(path.relative_to(BUNDLES_FOLDER).as_posix() for path in near[:5])
        try:
            return find_bundle(named)
        except BundleError as error:
            raise BundleError(f"{error}. ./engines has {names}" if near else str(error)) from None
    others = " ".join(path.name for path in found[1:4]) + (" ..." if len(found) > 4 else "")
    why = f", the newest of {len(found)} bundles; others: {others}" if len(found) > 1 else ""
    note(f"bundle {found[0]}{why}")
    return found[0]


def bundles_called(name: str) -> list[Path]:
    """Return the bundles that a folder or a short name stands for, the newest first."""
    from ..graphs.bundle import BUNDLES_FOLDER, bundles_in

    here = bundles_in(Path(name))
    if here or os.path.isabs(name) or ".." in Path(name).parts:
        return here
    below = bundles_in(Path(BUNDLES_FOLDER) / name)
    if below:
        return below
    model, _, plan = name.rpartition("/")
    near = bundles_in(Path(BUNDLES_FOLDER) / model) if model else []
    return [path for path in near if path.name.startswith(f"{plan}-")]


def is_model(name: str) -> bool:
    """Return whether a word is the name of a model, or the folder of a checkpoint."""
    return name in _models() or os.path.isfile(Path(name) / "config.json")


def split_words(words: Sequence[str], bundle: str | None) -> tuple[str | None, list[str], str]:
    """Return the bundle, the images and the question of a command's words, in any order.

    A first word that is a bundle is one, where none was named; words that are files are images;
    the one other word is the question. '-' is the question where no other word is, else an image:
    either is read from stdin.
    """
    words = list(words)
    if bundle is None and len(words) > 1 and not os.path.isfile(words[0]) and _is_bundle(words[0]):
        bundle = words.pop(0)
    other = [word for word in words if word != "-" and not os.path.isfile(word)]
    if not other and "-" in words:
        other = ["-"]
    if not other and words:
        raise click.UsageError(f"{words[-1]} is a file, and no question follows it. Add one.")
    if len(other) != 1:
        shown = " and ".join(repr(word[:60]) for word in other[:3]) or "none"
        raise click.UsageError(
            f"expected one question, and images that are there. Words that are no file: {shown}. "
            "Quote the question, and check the names of the images."
        )
    words.remove(other[0])
    question = other[0]
    if question == "-":
        question = sys.stdin.read().strip()
    return bundle, words, question


def _is_bundle(word: str) -> bool:
    return bool(bundles_called(word)) or os.path.isdir(word)


def _capability(text: str) -> tuple[int, int]:
    from ..graphs.targets import parse_capability

    return parse_capability(text)
