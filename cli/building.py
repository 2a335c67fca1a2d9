"""Commands that make bundles: from a model, and finished on the machine that shall run them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import click

from .options import (
    MODEL,
    PLAN,
    TARGET,
    as_json,
    bundle_at,
    bundles_called,
    canvas_option,
    image_tokens_option,
    is_model,
    model_option,
    sm_option,
)
from .show.output import note, say, show_json
from .show.units import ByteSize

READY_OPTIONS = {"subject", "model_option", "target", "out", "offline", "portable", "as_json"}
"""Options of ``build`` that go with graphs of the package."""


@click.command()
@click.argument("subject", required=False, metavar="MODEL|BUNDLE", type=MODEL)
@model_option
@click.option(
    "--plan",
    type=PLAN,
    help="A preset or a YAML file; by default the calibration's or the family's.",
)
@click.option(
    "--target", type=TARGET, default="cpu", show_default=True, help="The machine that runs it."
)
@click.option("--precision", help="fp32, fp16, int8, w8 or w4; by default what suits the target.")
@click.option("--calib", "calibration", type=click.Path(), help="What visistage calibrate wrote.")
@click.option("--keep-float", multiple=True, help="auto:5%, or a layer's name; may be repeated.")
@click.option("--out", default="engines", show_default=True, help="Folder of all bundles.")
@click.option("--name", help="Of the model in OUT; by default its folder's.")
@click.option(
    "--weights",
    type=click.Choice(["auto", "copy", "link"]),
    default="auto",
    show_default=True,
    help="Files of the checkpoint: auto clones, else copies if half of the free disk stays free, "
    "else hard links, which onnx and polygraphy refuse.",
)
@click.option("--revision", help="Branch, tag or commit of a model on the hub.")
@click.option("--offline", is_flag=True, help="Use only what was downloaded before.")
@click.option("--dummy-weights", is_flag=True, help="Random weights in the model's shape.")
@image_tokens_option
@canvas_option
@click.option(
    "--context",
    "contexts",
    multiple=True,
    type=click.IntRange(1),
    help="Rows that engines have room for (default 1024); may be repeated.",
)
@click.option("--build-memory", type=ByteSize(), help="That compiling one engine may take.")
@sm_option
@click.option("--portable", is_flag=True, help="Leave compiling engines to visistage build.")
@as_json
@click.pass_context
def build(
    ctx: click.Context,
    subject: str | None,
    model_option: str | None,
    as_json: bool,
    portable: bool,
    capabilities: tuple,
    keep_float: tuple,
    **options,
) -> None:
    """Build what is missing to run here: a bundle from a model, the engines of a portable bundle.

    MODEL is demo, llava-7b, llava-13b, a hub id or a folder. A bundle holds graphs, weights and
    tokenizer, the decoder split as the plan says. What is there already is left alone, an
    interrupted build goes on where it stopped. The last line on stdout is the bundle's folder:
    OUT/MODEL/PLAN-PRECISION-TARGET. visistage engines is the same command.

    \b
    visistage build demo
    visistage build llava-7b --target cuda
    visistage build ./my-llava --plan visipruner:t=14,keep=32
    visistage build llava-45m --dummy-weights
    visistage build demo --precision int8 --calib calibrations/demo
    visistage build demo --precision int8:vision=float,stage2=w4 --keep-float auto:5%
    visistage build demo --precision int8:cache=int8
    visistage build llava-7b --target rtx --context 1024 --context 4096
    visistage build llava-7b --target orin-jp72     stops at a portable bundle
    visistage build llava-7b-orin/                  and, on the board, goes on from there

    int8 rounds inputs and weights, for which it takes a calibration (by default the one in
    calibrations/MODEL); w8 and w4 round weights alone. Single stages, the vision encoder and the
    head may differ. With cache=int8, behind any precision, keys and values are cached in a quarter
    of FP32's bytes, which takes a calibration; int8:decode=w4 adds weights of four bits for one
    row: docs/quantisation.md.

    Without torch, demo is built for a CPU from graphs that come with the package.

    For a target with engines they are compiled here if this machine can; for a board the bundle
    stays portable: copy it there, and type visistage build BUNDLE, which needs neither torch nor
    transformers. Engines are compiled one at a time, each in a process of its own.
    """
    model, unfinished = _subject(subject, model_option)
    if unfinished is not None:
        for option in sorted(_given(ctx) - {"subject", "as_json", "capabilities"}):
            raise click.UsageError(
                f"{unfinished} is a bundle, whose {option} was decided when it was built. Leave "
                f"--{option.replace('_', '-')} out, or name a model."
            )
        _finish(unfinished, capabilities, as_json)
        return
    note(f"building a bundle of {model}")
    from ..compile.engines.engines import compile_engines, why_portable
    from ..compile.known_builds import known_build, note_build, request_key
    from ..compile.ready_made import ready_made, unpack
    from ..graphs.targets import find_target
    from .show.bar import StepBar, build_line

    target = find_target(options["target"])
    with StepBar(build_line) as progress:
        why = why_portable(target, portable, capabilities)
        if target.engines and why is not None:
            note(
                f"the bundle will be portable: {why}. Finish it on its machine: visistage build "
                "BUNDLE"
            )
        out = Path(options["out"])
        key = request_key({"model": model, **options, "keep_float": keep_float})
        bundle, compiled = known_build(out, key), None
        if bundle is None and ready_made(model, target.name, _given(ctx) - READY_OPTIONS):
            note("torch is not installed: the graphs that come with the package are taken")
            bundle = unpack(out, progress)
            note_build(out, key, bundle)
        elif bundle is None:
            from ..compile.build import make_bundle  # takes seconds, which belong to the build
            from ..compile.build_spec import with_kept

            options["precision"] = with_kept(options["precision"], keep_float)
            bundle = make_bundle(model, **options, progress=progress)
            note_build(out, key, bundle)
        if target.engines and why is None:
            compiled = compile_engines(bundle, capabilities=capabilities, progress=progress)
        progress.close()
    _show_build(progress, bundle, compiled, as_json)


def _subject(subject: str | None, option: str | None) -> tuple[str, Path | None]:
    """Return the model to build from, and the bundle to finish instead, if it is one.

    Raises:
        UsageError: none or two are named.
        BundleError: none is, and there is no bundle here.
    """
    if subject is not None and option is not None:
        raise click.UsageError(f"found {subject!r} and --model {option}. Name one of them.")
    model = subject or option
    if model is None:
        from ..graphs.bundle import default_bundle

        if not bundles_called(str(default_bundle())):
            raise click.UsageError("name a model, such as: visistage build demo (or --model demo)")
        return "", bundle_at(None)
    found = [] if option is not None or is_model(model) else bundles_called(model)
    return model, bundle_at(model) if found else None


def _given(ctx: click.Context) -> set[str]:
    """Return the names of options and arguments that were typed."""
    typed = click.core.ParameterSource.COMMANDLINE
    return {name for name in ctx.params if ctx.get_parameter_source(name) == typed}


def _finish(path: Path, capabilities: tuple, as_json: bool) -> None:
    """Compile the engines of a bundle, where it is for a target that has any."""
    from ..compile.engines.engines import compile_engines, why_portable
    from ..graphs.bundle import Bundle
    from ..graphs.targets import find_target
    from .show.bar import StepBar, build_line

    note(f"finishing {path}")
    opened, engines = Bundle.open(path), None
    with StepBar(build_line) as progress:
        if find_target(opened.manifest.target).engines:
            engines = compile_engines(opened, capabilities=capabilities, progress=progress)
        elif capabilities:
            why_portable(find_target(opened.manifest.target), False, capabilities)
        else:
            opened.check()
        progress.close()
    _show_build(progress, opened, engines, as_json)


def _show_build(progress: Any, bundle: Any, engines: Any, as_json: bool) -> None:
    """Print a build's facts, or the bundle's folder for the next command."""
    if as_json:
        from .show.bar import build_facts

        show_json(build_facts(progress, bundle, engines))
    else:
        say(bundle.path)
