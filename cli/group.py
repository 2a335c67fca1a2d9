"""The group of all commands, and how they end.

A clear message for what the user can fix, a traceback for a bug:

    0     done
    1     a bug
    2     something the user can fix (``VisistageError``)
    130   Ctrl-C

Wrong options are click's business, which exits with 2 by itself.
"""

from __future__ import annotations

import traceback
from typing import Any

import click

from ..graphs.errors import MissingDependencyError, VisistageError

INTERRUPTED = 130
COMPILE_MODULES = (
    "huggingface_hub",
    "onnx",
    "onnx_ir",
    "onnxscript",
    "safetensors",
    "torch",
    "transformers",
    "yaml",
)
"""Modules that the extra ``compile`` installs."""


class Commands(click.Group):
    """A group that lists its commands in the order in which it got them, and ends as above."""

    def list_commands(self, ctx: click.Context) -> list[str]:
        """In the order in which a newcomer needs them."""
        return list(self.commands)

    def invoke(self, ctx: click.Context) -> Any:
        """Run the command; see the module for how it ends."""
        try:
            return super().invoke(ctx)
        except VisistageError as error:
            failure: VisistageError = error
        except ModuleNotFoundError as error:
            failure = _missing(error)
        except KeyboardInterrupt:
            click.echo("\ninterrupted; run the same command again to go on", err=True)
            ctx.exit(INTERRUPTED)
        if ctx.params.get("traceback"):
            click.echo("".join(traceback.format_exception(failure)), err=True, nl=False)
        else:
            click.echo(f"error: {failure}", err=True)
        ctx.exit(failure.exit_code)


def _missing(error: ModuleNotFoundError) -> VisistageError:
    """Say what to install; a module that no extra brings is a bug, and stays one."""
    name = (error.name or "").partition(".")[0]
    if name not in COMPILE_MODULES:
        raise error
    missing = MissingDependencyError(
        f"{name} is not installed, and this command needs it. "
        "Type: pip install 'visistage[compile]', or in a clone: make setup"
    )
    missing.__cause__ = error
    return missing
