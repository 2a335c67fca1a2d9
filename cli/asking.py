"""Commands that ask a bundle about images: for an answer, and for where it came from."""

from __future__ import annotations

import os
import sys
from pathlib import Path
from typing import Any

import click

from .options import as_json, backend_option, session_of
from .show.output import say, show, show_json
from .show.units import ByteSize

OUT_HINT = "--out explain.html"


LOADING = ("backend", "threads", "memory_limit", "max_pixels")
"""Options of ``infer`` that go to ``runtime.load``."""


@click.command()
@click.argument("images", nargs=-1, metavar="[IMAGE]...")
@click.argument("prompt")
@click.option("--bundle", type=click.Path(path_type=Path), help="The bundle that answers.")
@click.option("--max-tokens", type=click.IntRange(1), default=128, show_default=True)
@click.option("--stop", multiple=True, help="Text that ends the answer; may be repeated.")
@click.option("--temperature", type=float, help="0 takes the most probable token every time.")
@click.option("--top-p", type=float, help="Draw from the most probable tokens of this total.")
@click.option("--top-k", type=int, help="Draw from this many of the most probable tokens.")
@click.option("--seed", type=int, help="Repeats a draw.")
@backend_option
@click.option(
    "--threads", type=click.IntRange(1), help="Default: as many as were found fastest here."
)
@click.option("--memory-limit", type=ByteSize(), help="For the weights, such as 4GiB.")
@click.option(
    "--max-pixels",
    type=click.IntRange(1),
    default=64_000_000,
    show_default=True,
    help="Width x height of the largest image that is decoded.",
)
@click.option("--stream/--no-stream", default=True, help="Print the answer as it comes.")
@as_json
def infer(images, prompt, bundle, as_json, stream, max_tokens, stop, **options) -> None:
    """Ask a question about images.

    One IMAGE, several, or none; '-' reads an image from stdin. The answer goes to stdout,
    timings and what the plan saved go to stderr. Without --bundle: what VISISTAGE_BUNDLE names,
    or the only bundle in ./engines. Sampling options that are not given are the model's own.

    \b
    visistage infer photo.jpg "What is this?"
    visistage infer before.png after.png "What changed?" --max-tokens 200
    visistage infer "Write a haiku." --temperature 0.7 --seed 1
    visistage infer photo.jpg "How many people?" --bundle engines/llava-7b --json
    """
    from .show.answer_view import answer_facts, answer_table

    if not images and os.path.isfile(prompt):  # a long prompt is no path: Path would raise
        raise click.UsageError(f"{prompt} is a file, and no question follows it. Add one.")
    load = {name: options.pop(name) for name in LOADING}
    sources = _read_images(images)
    with session_of(bundle, **load) as session:
        sampling = _sampling(session.sampling, options)
        limits = {"max_tokens": max_tokens, "stop": stop}
        pieces = session.stream(sources, prompt, sampling=sampling, **limits)
        for number, piece in enumerate(pieces):
            if stream and not as_json:
                say(piece if number else piece.lstrip(), nl=False)
        answer, manifest = pieces.answer, session.bundle.manifest
    if as_json:
        show_json(answer_facts(answer, manifest))
        return
    say("" if stream else answer.text)
    show(answer_table(answer, manifest), err=True)


@click.command()
@click.argument("bundle", type=click.Path(path_type=Path))
@click.argument("images", nargs=-1, required=True, metavar="IMAGE...")
@click.argument("question")
@click.option(
    "--out",
    default="explain.html",
    show_default=True,
    type=click.Path(path_type=Path),
    help="The page.",
)
@click.option(
    "--dense",
    type=click.Path(path_type=Path),
    help="Bundle of the unpruned model; by default one beside BUNDLE.",
)
@click.option("--max-tokens", type=click.IntRange(1), default=128, show_default=True)
@backend_option
@click.option(
    "--threads", type=click.IntRange(1), help="Default: as many as were found fastest here."
)
@as_json
def explain(bundle, images, question, out, as_json, **options) -> None:
    """Show on a page which parts of an image an answer came from.

    One HTML file that needs nothing else: the image with the kept tokens, their contributions in
    every layer, where vision left, the answer with and without pruning, and what was saved. With a
    dense bundle of the same model beside BUNDLE it compares the two. '-' reads an image from
    stdin.

    \b
    visistage explain engines/demo photo.jpg "Which shape is red?"
    visistage explain engines/llava-7b/mine before.png after.png "What changed?" --out changes.html
    """
    from ..pages.page import check_page_place, write_page
    from ..tools.explain.explanation import explain

    check_page_place(out, OUT_HINT)
    explained = explain(bundle, _read_images(images), question, **options)
    write_page(explained.html, out, OUT_HINT)
    if as_json:
        show_json({"page": str(out), **explained.facts})
    else:
        say(out)


def _read_images(images: tuple[str, ...]) -> list[str | bytes]:
    return [sys.stdin.buffer.read() if image == "-" else image for image in images]


def _sampling(own: Any, options: dict[str, Any]) -> Any:
    """Return the model's settings with those that were given on the command line."""
    from dataclasses import replace

    return replace(own, **{name: value for name, value in options.items() if value is not None})
