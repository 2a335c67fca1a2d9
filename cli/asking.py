"""Commands that ask a bundle about images: for an answer, and for where it came from."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import click
from click.core import ParameterSource

from .options import (
    BUNDLE,
    as_json,
    backend_option,
    bundle_at,
    bundle_option,
    max_tokens_option,
    split_words,
    threads_option,
)
from .show.output import note, say, show, show_json
from .show.units import ByteSize

OUT_HINT = "--out explain.html"


IN_A_FILE = ("jsonl", "out", "lanes", "as_json")
"""Options of ``infer`` for many questions."""

LOADING = ("backend", "threads", "memory_limit", "max_pixels", "capture")
"""Options of ``infer`` that go to ``runtime.load``."""


@click.command()
@click.argument("words", nargs=-1, metavar="[IMAGE]... QUESTION")
@bundle_option
@max_tokens_option
@click.option("--stop", multiple=True, help="Text that ends the answer; may be repeated.")
@click.option("--temperature", type=float, help="0 takes the most probable token every time.")
@click.option("--top-p", type=float, help="Draw from the most probable tokens of this total.")
@click.option("--top-k", type=int, help="Draw from this many of the most probable tokens.")
@click.option("--seed", type=int, help="Repeats a draw.")
@backend_option
@threads_option
@click.option("--memory-limit", type=ByteSize(), help="For the weights, such as 4GiB.")
@click.option(
    "--capture",
    is_flag=True,
    help="Target cuda: replay steps as CUDA graphs, which no GPU has shown yet.",
)
@click.option(
    "--max-pixels",
    type=click.IntRange(1),
    default=64_000_000,
    show_default=True,
    help="Width x height of the largest image that is decoded.",
)
@click.option(
    "--save-image",
    type=click.Path(path_type=Path),
    help="Write what was computed of the image to NAME.safetensors, to be asked about again.",
)
@click.option(
    "--schema", metavar="JSON|FILE", help="A JSON schema that the answer follows, or its file."
)
@click.option(
    "--logprobs",
    type=click.IntRange(0, 20),
    help="Name so many likely tokens for each of the answer's, in --json.",
)
@click.option("--stream/--no-stream", default=True, help="Print the answer as it comes.")
@click.option("--jsonl", type=click.Path(path_type=Path), help="Ask every line of a file.")
@click.option(
    "--out", type=click.Path(path_type=Path), help="Where results of --jsonl go, a line each."
)
@click.option("--lanes", type=click.IntRange(1), help="Answers of --jsonl written at once.")
@as_json
def infer(
    words, bundle, save_image, as_json, stream, max_tokens, stop, jsonl, out, lanes, **options
) -> None:
    """Ask a question about images, or many from a file.

    Words that are files are images, the one other word is the question, in any order. '-' is read
    from stdin: the question where no other word is one, else an image. The answer goes to stdout,
    timings and what the plan saved go to stderr. Without --bundle: what VISISTAGE_BUNDLE names, or
    the newest in ./engines. Sampling options that are not given are the model's own.

    \b
    visistage infer photo.jpg "What is this?"
    visistage infer "What changed?" before.png after.png --max-tokens 200
    visistage infer "Write a haiku." --temperature 0.7 --seed 1
    visistage infer photo.jpg - --bundle demo < question.txt
    visistage infer photo.jpg "What is this?" --save-image photo.safetensors
    visistage infer photo.safetensors "And where?"
    visistage infer photo.jpg "How many people?" --bundle llava-7b/dense --json
    visistage infer photo.jpg "Describe it." --schema '{"type": "object", ...}'

    \b
    Many: {"image": "photo.jpg", "prompt": "...", "max_tokens": 20, "id": ...} a line, images
    relative to the file. A run that was interrupted goes on where it ended.
    visistage infer --jsonl questions.jsonl --out answers.jsonl
    """
    if jsonl is not None or out is not None or lanes is not None:
        _ask_file(words, bundle, jsonl, out, lanes, as_json, options)
        return
    bundle, images, prompt = split_words(words, bundle)
    path = bundle_at(bundle)  # told before anything slow is imported
    from .. import runtime
    from .show.answer_view import answer_facts, answer_table

    load = {name: options.pop(name) for name in LOADING}
    sources = _read_images(images)
    if save_image is not None and len(sources) != 1:
        raise click.UsageError(
            f"--save-image is for one image, found {len(sources)}. Leave it out."
        )
    with runtime.load(path, **load) as session:
        limits = {"max_tokens": max_tokens, "stop": stop}
        limits |= {"schema": _schema(options.pop("schema")), "logprobs": options.pop("logprobs")}
        sampling = _sampling(session.sampling, options)
        pieces = session.stream(sources, prompt, sampling=sampling, **limits)
        for number, piece in enumerate(pieces):
            if stream and not as_json:
                say(piece if number else piece.lstrip(), nl=False)
        answer, manifest = pieces.answer, session.bundle.manifest
        if save_image is not None:
            session.save_image(sources[0], save_image)
    assert answer is not None, "a stream that ran to its end holds its answer"
    if as_json:
        show_json(answer_facts(answer, manifest))
        return
    say("" if stream else answer.text)
    if not answer.text:
        note("the answer is empty: the model ended it at once")
    show(answer_table(answer, manifest), err=True)


@click.command()
@click.argument("words", nargs=-1, required=True, metavar="[BUNDLE] IMAGE... QUESTION")
@bundle_option
@click.option(
    "--out",
    default="explain.html",
    show_default=True,
    type=click.Path(path_type=Path),
    help="The page.",
)
@click.option(
    "--dense", type=BUNDLE, help="Bundle of the unpruned model; by default one beside BUNDLE."
)
@max_tokens_option
@backend_option
@threads_option
@as_json
def explain(words, bundle, out, dense, as_json, **options) -> None:
    """Show on a page which parts of an image an answer came from.

    One HTML file that needs nothing else: the image with the kept tokens, their contributions in
    every layer, where vision left, the answer with and without pruning, and what was saved. With a
    dense bundle of the same model beside BUNDLE it compares the two. Words are those of infer;
    BUNDLE may also be the first of them, or left out.

    \b
    visistage explain photo.jpg "Which shape is red?"
    visistage explain llava-7b/visipruner before.png after.png "What changed?" --out changes.html
    """
    bundle, images, question = split_words(words, bundle)
    path = bundle_at(bundle)
    from ..pages.page import check_page_place, write_page
    from ..tools.explain.explanation import explain

    check_page_place(out, OUT_HINT)
    explained = explain(
        path,
        _read_images(images),
        question,
        dense=dense and bundle_at(dense),
        **options,
    )
    write_page(explained.html, out, OUT_HINT)
    for finding in explained.facts["findings"] or ():
        say(finding, err=True)
    if as_json:
        show_json({"page": str(out), **explained.facts})
    else:
        say(out)


def _ask_file(words, bundle, jsonl, out, lanes, as_json, options) -> None:
    """Ask every line of a file; results go to another one."""
    if jsonl is None or out is None or words:
        raise click.UsageError(
            "--jsonl and --out belong together, and without other words: visistage infer --jsonl "
            "questions.jsonl --out answers.jsonl"
        )
    context = click.get_current_context()
    for name in context.params.keys() - {"words", "bundle", *IN_A_FILE, *LOADING}:
        if context.get_parameter_source(name) is ParameterSource.COMMANDLINE:
            raise click.UsageError(
                f"--{name.replace('_', '-')} is for one question; in a file such things are keys "
                "of each line. Leave it out."
            )
    own = {name: options[name] for name in LOADING}
    path = bundle_at(bundle)
    from ..graphs.bundle import Bundle
    from ..runtime.batch import BatchFile
    from ..runtime.engine import DEFAULT_LANES, Engine
    from .show.bar import StepBar, calibration_line

    file = BatchFile(jsonl, out)
    failed = 0
    with (
        Engine(Bundle.open(path), lanes=lanes or DEFAULT_LANES, **own) as engine,
        StepBar(calibration_line) as bar,
        bar.step("answer questions", file.total),
    ):
        bar.advance(file.done)
        for result in file.run(engine):
            failed += "error" in result
            bar.advance()
    facts = {"out": str(out), "questions": file.total, "known": file.done, "failed": failed}
    if as_json:
        show_json(facts)
        return
    asked = file.total - file.done
    say(f"{out}: {asked} asked, {file.done} known before, {failed} failed")


def _schema(given: str | None) -> str | None:
    """Return the text of a schema that is given as itself, or as a file."""
    if given is None or given.lstrip().startswith("{"):
        return given
    try:
        return Path(given).read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise click.UsageError(
            f"--schema {given}: cannot be read ({error}). Give a file, or the schema itself: "
            '\'{"type": "object"}\''
        ) from None


def _read_images(images: Sequence[str]) -> list[str | bytes]:
    return [sys.stdin.buffer.read() if image == "-" else image for image in images]


def _sampling(own: Any, options: dict[str, Any]) -> Any:
    """Return the model's settings with those that were given on the command line."""
    from dataclasses import replace

    return replace(own, **{name: value for name, value in options.items() if value is not None})
