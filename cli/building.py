"""Commands that make bundles: from a model, and finished on the machine that shall run them."""

from __future__ import annotations

from typing import Any

import click

from .options import as_json, bundle_argument, bundle_at, bundle_default, sm_option
from .show.output import say, show_json
from .show.units import ByteSize


@click.command()
@click.option("--model", required=True, help="demo, llava-7b, llava-13b, a hub id or a folder.")
@click.option("--plan", help="A preset or a YAML file; by default the calibration's or visipruner.")
@click.option("--target", default="cpu", show_default=True, help="The machine that runs it.")
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
def engines(
    as_json: bool, portable: bool, capabilities: tuple, keep_float: tuple, **options
) -> None:
    """Build a bundle from a model.

    A bundle holds graphs, weights and tokenizer, the decoder split as the plan says. One that is
    there already is left alone, an interrupted build goes on where it stopped. The last line on
    stdout is the bundle's folder: OUT/MODEL/PLAN-PRECISION-TARGET.

    \b
    visistage engines --model demo
    visistage engines --model llava-7b --target cuda
    visistage engines --model ./my-llava --plan visipruner:t=14,keep=32
    visistage engines --model llava-45m --dummy-weights
    visistage engines --model demo --precision int8 --calib calibrations/demo
    visistage engines --model demo --precision int8:vision=float,stage2=w4 --keep-float auto:5%
    visistage engines --model demo --precision int8:cache=int8
    visistage engines --model llava-7b --target rtx --context 1024 --context 4096
    visistage engines --model llava-7b --target orin-jp72     stops at a portable bundle

    int8 rounds inputs and weights, for which it takes a calibration (by default the one in
    calibrations/MODEL); w8 and w4 round weights alone. Single stages, the vision encoder and the
    head may differ. With cache=int8, behind any precision, keys and values are cached in a quarter
    of FP32's bytes, which takes a calibration: docs/quantisation.md.

    For a target with engines they are compiled here if this machine can; for a board the bundle
    stays portable: copy it there, and type visistage build.
    """
    from ..compile.engines.engines import compile_engines, why_portable
    from ..graphs.targets import find_target
    from .show.bar import StepBar, build_line

    target = find_target(options["target"])
    with StepBar(build_line) as progress:
        why = why_portable(target, portable, capabilities)
        if target.engines and why is not None:
            say(
                f"the bundle will be portable: {why}. Finish it on its machine: visistage build "
                "BUNDLE",
                err=True,
            )
        from ..compile.build import make_bundle  # imports take seconds, which belong to the build
        from ..compile.build_spec import with_kept

        options["precision"] = with_kept(options["precision"], keep_float)
        bundle, compiled = make_bundle(**options, progress=progress), None
        if target.engines and why is None:
            compiled = compile_engines(bundle, capabilities=capabilities, progress=progress)
        progress.close()
    _show_build(progress, bundle, compiled, as_json)


@click.command(epilog=bundle_default)
@bundle_argument
@sm_option
@as_json
def build(bundle, capabilities, as_json) -> None:
    """Finish a portable bundle on the machine that shall run it.

    Compiles every graph with this machine's own TensorRT; needs neither torch nor transformers. One
    engine at a time, in a process of its own; what was compiled before is kept.

    \b
    visistage build llava-7b-orin/
    visistage build engines/demo --sm 86 --sm 120       TensorRT-RTX: for GPUs that are not here
    """
    from ..compile.engines.engines import compile_engines
    from ..graphs.bundle import Bundle
    from .show.bar import StepBar, build_line

    opened = Bundle.open(bundle_at(bundle))
    with StepBar(build_line) as progress:
        engines = compile_engines(opened, capabilities=capabilities, progress=progress)
        progress.close()
    _show_build(progress, opened, engines, as_json)


def _show_build(progress: Any, bundle: Any, engines: Any, as_json: bool) -> None:
    """Print a build's facts, or the bundle's folder for the next command."""
    if as_json:
        from .show.bar import build_facts

        show_json(build_facts(progress, bundle, engines))
    else:
        say(bundle.path)
