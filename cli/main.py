"""The command line: the group of all commands."""

from __future__ import annotations

import logging

import click

from .. import __version__
from .asking import explain, infer
from .building import build
from .chatting import chat
from .checking import doctor, inspect, list_bundles, verify
from .group import Commands
from .measuring import compare, estimate, evaluate, profile
from .options import log_level, quiet, verbose
from .planning import calibrate, plan, words
from .serving import export_triton, serve
from .show.output import Spoken


@click.group(cls=Commands, context_settings={"help_option_names": ["-h", "--help"]})
@click.version_option(__version__, prog_name="visistage")
@quiet
@verbose
@log_level
@click.option("--traceback", is_flag=True, help="Show where an error comes from.")
def main(traceback: bool) -> None:
    """Compile a multimodal LLM into stages with fixed visual-token counts, and run it.

    \b
    visistage build demo                            build the model that comes with the package
    visistage infer photo.jpg "What is this?"       ask it
    visistage plan visipruner llava-7b              what a plan would save
    visistage COMMAND --help                        more on one command

    \b
    Completion in bash (zsh, fish: the same with their names):
    eval "$(_VISISTAGE_COMPLETE=bash_source visistage)"
    """
    logging.basicConfig(format="%(message)s", handlers=[Spoken()])


# In the order in which a newcomer needs them.
for command in (
    build,
    infer,
    chat,
    serve,
    list_bundles,
    plan,
    inspect,
    explain,
    evaluate,
    compare,
    calibrate,
    words,
    verify,
    profile,
    estimate,
    export_triton,
    doctor,
):
    main.add_command(command)
main.add_command(build, "engines")
