"""The group of all commands, and how they end.

A clear message for what the user can fix, a traceback for a bug:

    0     done
    1     a bug
    2     something the user can fix (``VisistageError``)
    130   Ctrl-C
    141   stdout has no reader any more (128 + SIGPIPE, as of other tools)

Wrong options are click's errors; what the machine refuses (a full disk, a folder in the way) is the
user's to fix, wherever it was met.
"""

from __future__ import annotations

import errno
import io
import sys
import traceback
from collections.abc import Callable
from functools import partial
from typing import Any

import click

from ..graphs.commands import install
from ..graphs.errors import CapacityError, MissingDependencyError, VisistageError
from ..graphs.foreign_text import shortened
from .show.output import Loudness, Output, abandon, prepare_streams, say

INTERRUPTED, UNREAD = 130, 141
REFUSALS = {
    getattr(errno, name)
    for name in (
        *("EACCES", "EPERM", "EROFS", "ENOSPC", "EDQUOT", "EFBIG", "ENAMETOOLONG", "ELOOP"),
        *("ENOTDIR", "EISDIR", "EEXIST", "EMFILE", "ENFILE", "EIO", "ENXIO", "ENODEV", "ETXTBSY"),
    )
    if hasattr(errno, name)
}
"""Errors of a file system for reasons that are not in our code."""

MODULES = {
    "compile": "huggingface_hub onnx onnx_ir onnxscript safetensors torch transformers yaml",
    "serve": "prometheus_client starlette uvicorn",
}
EXTRAS = {module: extra for extra, modules in MODULES.items() for module in modules.split()}
"""The extra that installs a module."""


class Commands(click.Group):
    """A group that lists its commands in the order in which it got them, and ends as above."""

    show_traceback = False

    def list_commands(self, ctx: click.Context) -> list[str]:
        """Return them in the order in which a newcomer needs them."""
        return list(self.commands)

    def invoke(self, ctx: click.Context) -> Any:
        """Run the command."""
        self.show_traceback = ctx.params.get("traceback", False)
        return super().invoke(ctx)

    def main(  # type: ignore[override]
        self, args: Any = None, prog_name: str | None = None, *more: Any, **extra: Any
    ) -> Any:
        """Run the command line and exit; see the module for how it ends."""
        standalone = extra.pop("standalone_mode", True)
        run: Callable[[], Any] = partial(
            super().main, args, prog_name, *more, standalone_mode=False, **extra
        )
        if not standalone:
            return run()
        prepare_streams()
        Loudness.quiet = False
        sys.excepthook = _show_bug
        try:
            Output().flush()  # a closed stdout is told before any work
            code = run()
            Output().flush()
        except (click.Abort, KeyboardInterrupt):
            say("interrupted; run the same command again to go on", err=True)
            code = INTERRUPTED
        except BrokenPipeError:
            code = UNREAD
        except SystemExit as ended:  # completion, or click's own end at a broken pipe: 1
            code = UNREAD if ended.code == 1 else ended.code
        except click.ClickException as error:
            text = io.StringIO()
            error.show(text)
            say(shortened(text.getvalue()), err=True, nl=False)
            code = VisistageError.exit_code
        except (VisistageError, ModuleNotFoundError, OSError) as error:
            code = self._tell(_as_failure(error))
        if code:
            abandon(sys.stdout)
        sys.exit(code if isinstance(code, int) else 0)

    def _tell(self, failure: VisistageError) -> int:
        if self.show_traceback:
            say("".join(traceback.format_exception(failure)), err=True, nl=False)
        else:
            say(f"error: {failure}", err=True)
        return failure.exit_code


def _show_bug(kind: Any, error: BaseException, trace: Any) -> None:
    """Print a traceback as Python does, without what would steer the terminal."""
    say("".join(traceback.format_exception(kind, error, trace)), err=True, nl=False)


def _as_failure(error: Exception) -> VisistageError:
    """Return what the user is told; what no user can fix is a bug, and stays one."""
    if isinstance(error, VisistageError):
        return error
    if isinstance(error, ModuleNotFoundError):
        return _missing(error)
    if not isinstance(error, OSError) or error.errno not in REFUSALS:
        raise error
    at = "" if error.filename is None else f"{error.filename}: "
    failure = CapacityError(
        f"{at}{error.strerror}. Name a place that can be read and written, with room in it"
    )
    failure.__cause__ = error
    return failure


def _missing(error: ModuleNotFoundError) -> VisistageError:
    """Say what to install; a module that no extra brings is a bug, and stays one."""
    name = (error.name or "").partition(".")[0]
    if name not in EXTRAS:
        raise error
    missing = MissingDependencyError(
        f"{name} is not installed, and this command needs it. Type: {install(EXTRAS[name])}"
    )
    missing.__cause__ = error
    return missing
