"""The command that serves bundles over HTTP."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import click

from ..graphs.errors import TargetError
from .options import BUNDLE, backend_option, bundle_at, quiet, threads_option, verbose
from .show.output import Loudness, note, say
from .show.units import ByteSize


@click.command()
@click.argument("bundles", nargs=-1, type=BUNDLE, metavar="[NAME=]BUNDLE...")
@click.option("--host", default="127.0.0.1", show_default=True, help="Address to listen at.")
@click.option(
    "--port",
    type=click.IntRange(0, 65535),
    default=8000,
    show_default=True,
    help="0 takes any that is free.",
)
@click.option(
    "--api-key",
    envvar="VISISTAGE_API_KEY",
    help="That every request must carry; better in VISISTAGE_API_KEY, where no list of "
    "processes shows it.",
)
@click.option(
    "--lanes",
    type=click.IntRange(1),
    help="Answers written at once, of each bundle. Default: 8; 1 where engines are compiled.",
)
@click.option(
    "--queue", type=click.IntRange(1), default=64, show_default=True, help="That wait for a lane."
)
@click.option(
    "--memory-limit",
    type=ByteSize(),
    help="For the weights of all bundles, such as 4GiB; the one unused longest makes room.",
)
@click.option(
    "--allow-images-from",
    multiple=True,
    metavar="HOST",
    help="Fetch images from this host (HOST or HOST:PORT); may be repeated. Default: none.",
)
@click.option(
    "--allow-origin",
    "allow_origins",
    multiple=True,
    metavar="URL",
    help="Let pages of this site ask (CORS); may be repeated. Default: none.",
)
@click.option(
    "--max-body", type=ByteSize(), default="20MiB", show_default=True, help="Of a request."
)
@click.option(
    "--max-images", type=click.IntRange(0), default=8, show_default=True, help="Of a request."
)
@click.option(
    "--max-pixels",
    type=click.IntRange(1),
    default=64_000_000,
    show_default=True,
    help="Width x height of the largest image that is decoded.",
)
@click.option(
    "--max-tokens",
    type=click.IntRange(1),
    default=1024,
    show_default=True,
    help="Of the longest answer that may be asked for.",
)
@click.option(
    "--drain",
    "drain_seconds",
    type=click.FloatRange(0),
    default=30,
    show_default=True,
    help="Seconds that answers under way get when the server is told to stop.",
)
@backend_option
@threads_option
@quiet
@verbose
def serve(bundles: Sequence[str], **options: Any) -> None:
    """Answer over HTTP, as OpenAI's API does, until Ctrl-C.

    A model is asked for by the name that its bundle is given here. The first bundle is loaded at
    once, others when somebody asks for them. The address is printed; in a browser it is a page to
    try the model: drop an image, ask, and see which tokens were kept. Besides: /v1/models, /health,
    /ready, /metrics. Ctrl-C, or SIGTERM, lets answers under way end; a second one does not.
    What is refused, and how: docs/serving.md.

    \b
    visistage serve
    visistage serve demo demo/dense --memory-limit 4GiB
    visistage serve fast=llava-7b/visipruner full=llava-7b/dense --port 9000
    VISISTAGE_API_KEY=$(openssl rand -hex 16) visistage serve demo --host 0.0.0.0

    \b
    curl http://127.0.0.1:8000/v1/chat/completions -H 'content-type: application/json' -d '{
      "messages": [{"role": "user", "content": [
        {"type": "image_url", "image_url": {"url": "data:image/png;base64,..."}},
        {"type": "text", "text": "What is this?"}]}]}'
    """
    named = dict(_named(word) for word in bundles) if bundles else dict([_named("")])
    if len(named) < len(bundles):
        raise TargetError("two bundles have one name. Give them others: NAME=BUNDLE")
    from ..graphs.bundle import Bundle
    from ..serve.options import ServeOptions
    from ..serve.run import serve as run

    chosen = ServeOptions(**options)
    if not Loudness.quiet:
        logging.getLogger("visistage.serve").setLevel(logging.INFO)

    def started(address: str) -> None:
        note(f"serving {', '.join(named)}; Ctrl-C ends it")
        say(address)

    run({name: Bundle.open(path) for name, path in named.items()}, chosen, started)


@click.command("export-triton")
@click.argument("bundle", type=BUNDLE)
@click.argument("repository", type=click.Path(path_type=Path, file_okay=False), metavar="DIR")
@click.option("--name", help="Of the model. Default: the bundle's model and plan.")
@click.option("--lanes", type=click.IntRange(1), help="Answers written at once. Default: 8, or 1.")
@quiet
@verbose
def export_triton(bundle: str, repository: Path, name: str | None, lanes: int | None) -> None:
    """Write a bundle as a model repository of Triton.

    DIR/NAME gets config.pbtxt, 1/model.py and a copy of the bundle. The model is decoupled: it
    takes PROMPT, IMAGE (files) and MAX_TOKENS, and sends TEXT in pieces. Triton's Python needs
    visistage.

    \b
    visistage export-triton demo models
    tritonserver --model-repository models
    """
    path = bundle_at(bundle)
    from ..graphs.bundle import Bundle
    from ..serve.triton import export_triton as export

    say(export(Bundle.open(path), repository, name, lanes))


def _named(word: str) -> tuple[str, Any]:
    """Return the name and the folder of a bundle given as BUNDLE or NAME=BUNDLE.

    Without a name it is the word itself, or of a path its last two folders.
    """
    name, equals, place = word.partition("=")
    path = bundle_at((place if equals else word) or None)
    if not equals:
        short = "" if word.startswith((".", "/", "~")) or "\\" in word else word.strip("/")
        name = short or "/".join(path.resolve().parts[-2:])
    return name, path
