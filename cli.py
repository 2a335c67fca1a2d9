"""The command line: each command is one call. What it shows is ``console``'s business.

Imports stand inside the commands: ``visistage --help`` must not load ONNX Runtime or torch.
"""

from __future__ import annotations

import logging
import os
import sys
from pathlib import Path
from typing import Any

import click

from . import __version__
from .console.commands import Commands
from .console.output import show, show_json
from .console.units import ByteSize, Share

as_json = click.option("--json", "as_json", is_flag=True, help="Print facts as JSON.")
bundle_argument = click.argument("bundle", required=False, type=click.Path(path_type=Path))
sm_option = click.option(
    "--sm",
    "capabilities",
    multiple=True,
    callback=lambda ctx, param, values: tuple(map(_capability, values)),
    help="Compute capability to compile for, such as 86; may be repeated.",
)
bundle_default = "Without BUNDLE: what VISISTAGE_BUNDLE names, or the only bundle in ./engines."


@click.group(cls=Commands, context_settings={"help_option_names": ["-h", "--help"]})
@click.version_option(__version__, prog_name="visistage")
@click.option("--traceback", is_flag=True, help="Show where an error comes from.")
def main(traceback: bool) -> None:
    """Compile a multimodal LLM into stages with fixed visual-token counts, and run it.

    \b
    visistage engines --model demo                  build the model that comes with the package
    visistage infer photo.jpg "What is this?"       ask it
    visistage plan visipruner --model llava-7b      what a plan would save
    visistage COMMAND --help                        more on one command
    """
    logging.basicConfig(level=logging.WARNING, format="%(message)s")


@main.command()
@click.option("--model", required=True, help="demo, llava-7b, llava-13b, a hub id or a folder.")
@click.option("--plan", help="A preset or a YAML file; by default the calibration's or visipruner.")
@click.option("--target", default="cpu", show_default=True, help="Machine that shall run it.")
@click.option("--precision", help="fp32, fp16, int8, w8 or w4; by default what suits the target.")
@click.option("--calib", "calibration", type=click.Path(), help="What visistage calibrate wrote.")
@click.option("--keep-float", multiple=True, help="auto:5%, or a layer's name; may be repeated.")
@click.option("--out", default="engines", show_default=True, help="Folder of all bundles.")
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
    visistage engines --model llava-7b --target rtx --context 1024 --context 4096
    visistage engines --model llava-7b --target orin-jp72     stops at a portable bundle

    int8 rounds inputs and weights, for which it takes a calibration (by default the one in
    calibrations/MODEL); w8 and w4 round weights alone. Single stages, the vision tower and the head
    may differ: docs/quantisation.md.

    For a target with engines they are compiled here if this machine can; for a board the bundle
    stays portable: copy it there, and type visistage build.
    """
    from .console.engines import compile_here, with_kept
    from .console.progress import BuildProgress

    options["precision"] = with_kept(options["precision"], keep_float)
    with BuildProgress() as progress:
        compiling = compile_here(options["target"], portable, capabilities)
        from .compile.build import build  # seconds of a build: they belong to its time

        bundle, compiled = build(**options, reporter=progress), None
        if compiling:
            from .trt.engines import compile_engines

            compiled = compile_engines(bundle, capabilities=capabilities, reporter=progress)
        progress.close()
    _show_build(progress, bundle, compiled, as_json)


@main.command(epilog=bundle_default)
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
    from .console.progress import BuildProgress
    from .graphs.bundle import Bundle
    from .trt.engines import compile_engines

    opened = Bundle.open(_bundle(bundle))
    with BuildProgress() as progress:
        engines = compile_engines(opened, capabilities=capabilities, reporter=progress)
        progress.close()
    _show_build(progress, opened, engines, as_json)


@main.command()
@click.argument("images", nargs=-1, metavar="[IMAGE]...")
@click.argument("prompt")
@click.option("--bundle", type=click.Path(path_type=Path), help="The bundle that shall answer.")
@click.option("--max-tokens", type=click.IntRange(1), default=128, show_default=True)
@click.option("--stop", multiple=True, help="Text that ends the answer; may be repeated.")
@click.option("--temperature", type=float, help="0 takes the likeliest token every time.")
@click.option("--top-p", type=float, help="Draw from the likeliest tokens of this probability.")
@click.option("--top-k", type=int, help="Draw from this many of the likeliest tokens.")
@click.option("--seed", type=int, help="Repeats a draw.")
@click.option("--backend", help="onnxruntime: run the graphs of any bundle on this CPU.")
@click.option("--threads", type=click.IntRange(1), help="Default: every core.")
@click.option("--memory-limit", type=ByteSize(), help="For the weights, such as 4GiB.")
@click.option("--stream/--no-stream", default=True, help="Print the answer as it comes.")
@as_json
def infer(images, prompt, bundle, as_json, stream, max_tokens, stop, **options) -> None:
    """Ask a question about pictures.

    One IMAGE, several, or none; '-' reads a picture from stdin. The answer goes to stdout,
    timings and what the plan saved go to stderr. Without --bundle: what VISISTAGE_BUNDLE names,
    or the only bundle in ./engines. Sampling options that are not given are the model's own.

    \b
    visistage infer photo.jpg "What is this?"
    visistage infer before.png after.png "What changed?" --max-tokens 200
    visistage infer "Write a haiku." --temperature 0.7 --seed 1
    visistage infer photo.jpg "How many people?" --bundle engines/llava-7b --json
    """
    from .console.answer import answer_facts, answer_table, printable

    if not images and os.path.isfile(prompt):  # a long prompt is no path: Path would raise
        raise click.UsageError(f"{prompt} is a file, and no question follows it. Add one.")
    load = {name: options.pop(name) for name in ("backend", "threads", "memory_limit")}
    pictures = _pictures(images)
    with _session(bundle, **load) as session:
        sampling = _sampling(session.sampling, options)
        limits = {"max_tokens": max_tokens, "stop": stop}
        pieces = session.stream(pictures, prompt, sampling=sampling, **limits)
        for number, piece in enumerate(pieces):
            if stream and not as_json:
                click.echo(printable(piece if number else piece.lstrip()), nl=False)
        answer, manifest = pieces.answer, session.bundle.manifest
    if as_json:
        show_json(answer_facts(answer, manifest))
        return
    click.echo("" if stream else printable(answer.text))
    show(answer_table(answer, manifest), err=True)


@main.command()
@click.argument("plan", required=False)
@click.option("--model", default="llava-7b", show_default=True, help="A known name or a folder.")
@click.option("--layers", type=click.IntRange(1), help="Depth, instead of the model's.")
@click.option("--visual-tokens", type=click.IntRange(1), help="Per image, instead of the model's.")
@click.option("--text", type=click.IntRange(1), default=40, show_default=True, help="Text rows.")
@click.option("--prefix", type=click.IntRange(0), default=35, show_default=True, help="Its rows.")
@click.option(
    "--accounting",
    type=click.Choice(["modes", "paper", "graphs"]),
    default="modes",
    show_default=True,
    help="What counts: the method, the paper's table, or the graphs as they run.",
)
@click.option("--trigger", type=int, help="Where each prompt decides: t of the prompts counted.")
@click.option("--kept", type=float, help="Their K; a mean will do.")
@click.option("--exit", "exit_", type=int, help="Their e.")
@click.option("--yaml", "as_yaml", is_flag=True, help="Print the plan as a file to edit.")
@as_json
def plan(
    plan, model, layers, visual_tokens, trigger, kept, exit_, as_yaml, as_json, **options
) -> None:
    """Show a plan's stages and savings, or list the presets.

    PLAN is a preset, preset:key=value,..., or a .yaml or .json file. No weights are read.

    \b
    visistage plan visipruner
    visistage plan visipruner:t=14,keep=32 --model llava-13b
    visistage plan fastv --accounting paper --json
    visistage plan visipruner-paper --trigger 14 --kept 10.3 --exit 23
    visistage plan visipruner --yaml > mine.yaml
    """
    from .console.plan import outcome_of, plan_facts, preset_facts, preset_table

    if plan is None:
        if as_json:
            show_json(preset_facts())
        else:
            show(preset_table())
        return
    from .compile.plan_report import plan_json, plan_table
    from .compile.planfile import plan_to_yaml

    staged, geometry = plan_facts(plan, model, layers, visual_tokens)
    options["outcome"] = outcome_of(staged, trigger, kept, exit_)
    if as_yaml:
        click.echo(plan_to_yaml(staged), nl=False)
    elif as_json:
        show_json(plan_json(staged, geometry, **options))
    else:
        show(plan_table(staged, geometry, **options))


@main.command(epilog=bundle_default)
@bundle_argument
@as_json
def inspect(bundle, as_json) -> None:
    """Show what a bundle holds.

    Model, plan, graphs with their tensors, sizes, cache per row and per prompt, versions. Where
    engines were compiled: for which GPU, their sizes, shapes, layers, attention, caches, memory.

    \b
    visistage inspect engines/demo
    visistage inspect engines/llava-7b --json
    """
    from .console.inspect import bundle_facts, bundle_table
    from .console.inspect_engines import engine_facts, engine_table
    from .graphs.bundle import Bundle

    opened = Bundle.open(_bundle(bundle))
    if as_json:
        show_json({**bundle_facts(opened), "engines": engine_facts(opened)})
    else:
        show(bundle_table(opened))
        show(engine_table(opened))


@main.command()
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
    help="Bundle of the unpruned model; by default one that lies beside BUNDLE.",
)
@click.option("--max-tokens", type=click.IntRange(1), default=128, show_default=True)
@click.option("--backend", help="onnxruntime: run the graphs of any bundle on this CPU.")
@click.option("--threads", type=click.IntRange(1), help="Default: every core.")
@as_json
def explain(bundle, images, question, out, as_json, **options) -> None:
    """Show on a page which parts of a picture an answer came from.

    One HTML file that needs nothing else: the picture with the kept tokens, their contributions in
    every layer, where vision left, the answer with and without pruning, and what was saved. With a
    dense bundle of the same model beside BUNDLE it compares the two. '-' reads a picture from
    stdin.

    \b
    visistage explain engines/demo photo.jpg "Which shape is red?"
    visistage explain engines/llava-7b/mine before.png after.png "What changed?" --out changes.html
    """
    from .explain.explanation import explain
    from .explain.page import write

    explained = explain(bundle, _pictures(images), question, **options)
    write(explained.html, out)
    if as_json:
        show_json({"page": str(out), **explained.facts})
    else:
        click.echo(out)


@main.command(epilog=bundle_default)
@bundle_argument
@click.option("--data", type=click.Path(path_type=Path), help="JSONL file of samples.")
@click.option("--samples", type=click.IntRange(1), help="Ask so many only (demo: 200).")
@click.option("--max-tokens", type=click.IntRange(1), default=32, show_default=True)
@click.option("--backend", help="onnxruntime: run the graphs of any bundle on this CPU.")
@as_json
def evaluate(bundle, data, samples, max_tokens, backend, as_json) -> None:
    """Measure accuracy and speed on known answers.

    An answer is right when it equals the expected one but for case, punctuation and spacing. A
    line of --data, its image relative to the file, type left out at will:

    \b
    {"image": "1.jpg", "prompt": "How many dogs?", "answer": "2", "type": "count"}

    The demo model needs no --data: it is asked about scenes that it was not trained on.

    \b
    visistage evaluate engines/demo --samples 100
    visistage evaluate engines/llava-7b --data questions.jsonl --json
    """
    from .calib.evaluate import evaluate
    from .console.evaluation import chosen_samples, counting, report_table

    with _session(bundle, backend=backend) as session:
        chosen = chosen_samples(session.bundle.manifest.model, data, samples)
        with counting(len(chosen)) as tick:
            report = evaluate(session, chosen, max_tokens=max_tokens, progress=tick)
    if as_json:
        show_json({"bundle": str(session.bundle.path), **report.to_dict()})
    else:
        show(report_table(report))


@main.command()
@click.argument("model")
@click.option("--data", type=click.Path(path_type=Path), help="JSONL file, or a folder with one.")
@click.option("--samples", type=click.IntRange(1), help="Read so many only (demo: 120).")
@click.option("--plan", help="Calibrate for this static plan; nothing is chosen or run.")
@click.option("--lose", type=Share(), help="Choose the cheapest plan that loses so much (1%).")
@click.option("--cost", type=Share(), help="Choose the best plan within so much of dense.")
@click.option("--holdout", type=Share(), help="Samples that confirm what others chose (33%).")
@click.option("--candidates", "most", type=click.IntRange(1), help="Plans to measure (12).")
@click.option("--precision", help="Choose for fp32 (default), int8, w8, w4, or a recipe.")
@click.option("--out", default="calibrations", show_default=True, help="Folder of them all.")
@click.option("--revision", help="Branch, tag or commit of a model on the hub.")
@click.option("--offline", is_flag=True, help="Use only what was downloaded before.")
@click.option("--dummy-weights", is_flag=True, help="Random weights in the model's shape.")
@as_json
def calibrate(
    model, data, samples, plan, lose, cost, holdout, most, precision, out, as_json, **options
) -> None:
    """Choose a plan from data, and measure the ranges that INT8 needs.

    Writes OUT/MODEL: the plan with its reasons, the ranges, and calibration.html, which is to be
    read before either is trusted. A line of --data, its image relative to the file, answer left
    out at will:

    \b
    {"image": "1.jpg", "prompt": "How many dogs?", "answer": "2"}

    A plan is chosen by what it may lose (--lose 1% of the tokens that the dense model says) or by
    what it may cost (--cost 50% of its visual FLOPs), from bundles that are built and asked here;
    samples held out confirm it. With --precision those bundles are quantised, and what is lost is
    lost to rounding and pruning together. With --plan no bundle runs, and large models go through
    small machines. The demo model needs no --data.

    \b
    visistage calibrate demo --lose 1%
    visistage calibrate demo --lose 2% --precision int8
    visistage calibrate llava-7b --data questions.jsonl --cost 50%
    visistage calibrate llava-7b --data photos/ --samples 64 --plan visipruner:t=14,keep=32
    """
    from .console.calibration import (
        CalibrationProgress,
        calibration_facts,
        calibration_samples,
        calibration_table,
        wish_or_plan,
    )

    chosen, files = calibration_samples(model, data, samples)
    with CalibrationProgress() as progress:
        wish = wish_or_plan(
            plan, lose=lose, cost=cost, holdout=holdout, most=most, precision=precision
        )
        from .calib.calibrate import calibrate
        from .calib.measuring import Origin

        folder, calibration = calibrate(
            Origin(model, **options), chosen, wish, files=files, out=out, watcher=progress
        )
    if as_json:
        show_json(calibration_facts(folder, calibration))
    else:
        show(calibration_table(folder, calibration))


@main.command(epilog=bundle_default)
@bundle_argument
@click.option("--model", help="The checkpoint that it was built from, on this machine.")
@click.option(
    "--calib",
    "calibration",
    type=click.Path(path_type=Path),
    help="The calibration that it was built with; by default calibrations/MODEL where it fits.",
)
@click.option("--data", type=click.Path(path_type=Path), help="JSONL file of samples.")
@click.option("--samples", type=click.IntRange(1), help="Ask so many only (default 6).")
@click.option("--max-tokens", type=click.IntRange(1), default=16, show_default=True)
@click.option("--memory-limit", type=ByteSize(), help="For each rung; by default what is free.")
@as_json
def verify(bundle, model, calibration, data, samples, max_tokens, memory_limit, as_json) -> None:
    """Check a bundle's files, and that they compute what the checkpoint computes.

    Hashes every file, then climbs from Hugging Face over torch and ONNX Runtime to the engines:
    each graph alone and whole answers, with and without a teacher. Rungs that this machine cannot
    run are named with the reason. The report is left in the bundle: verify.md and verify.json.

    With --data or without, pictures are asked as in evaluate; models other than demo are asked
    about the package's own pictures. Without --model, rungs that need the checkpoint are left out;
    demo's is in the package.

    \b
    visistage verify engines/demo
    visistage verify engines/llava-7b --model llava-7b --data questions.jsonl --samples 20
    """
    from .console.verify import LadderProgress, report_table, require_passed
    from .graphs.bundle import Bundle
    from .parity.ladder import verify
    from .parity.prompts import checkpoint_at_hand, chosen
    from .parity.report import PAGE_FILE

    opened = Bundle.open(_bundle(bundle))
    asked = chosen(opened.manifest.model, data, samples)
    model = model or checkpoint_at_hand(opened.manifest.model)
    with LadderProgress() as progress:
        report = verify(
            opened,
            asked,
            model=model,
            calibration=calibration,
            max_tokens=max_tokens,
            memory=memory_limit,
            watcher=progress,
        )
    report.write(opened.path)
    where = str(opened.path / PAGE_FILE)
    if as_json:
        show_json({"path": where, **report.to_dict()})
    else:
        show(report_table(report, where))
    require_passed(report, where)


@main.command(epilog=bundle_default)
@bundle_argument
@click.option(
    "--against",
    type=click.Path(path_type=Path),
    help="Another bundle of the model, in turns; by default a dense one that lies beside BUNDLE.",
)
@click.option("--repetitions", type=click.IntRange(1), default=20, show_default=True)
@click.option("--warm-up", type=click.IntRange(0), default=3, show_default=True)
@click.option("--tokens", type=click.IntRange(2), default=32, show_default=True, help="An answer.")
@click.option("--operators/--no-operators", default=True, help="Times of layers and operators.")
@click.option("--backend", help="onnxruntime: run the graphs of any bundle on this CPU.")
@click.option("--threads", type=click.IntRange(1), help="Default: every core.")
@click.option(
    "--out",
    default="profile.html",
    show_default=True,
    type=click.Path(path_type=Path),
    help="The page.",
)
@as_json
def profile(bundle, against, out, as_json, repetitions, warm_up, tokens, **options) -> None:
    """Measure where the time of an answer goes.

    Every repetition asks about a picture that nobody has seen, then again about the same picture.
    Shown are medians and percentiles of every stage, memory, energy where power can be read, times
    of layers and operators, and how near each graph comes to what this machine can do, which is
    measured in the same run. The page has a timeline and the roofline. Nothing else should run
    meanwhile.

    \b
    visistage profile engines/demo/visipruner-fp32-cpu
    visistage profile engines/llava-7b --against engines/llava-7b/fastv-fp16-cuda --json
    visistage profile engines/llava-7b --repetitions 5 --tokens 256       longer: energy, too
    """
    from .console.profile import command_lines, profile_table, profiling_bar
    from .pages.page import write
    from .profiling.measure import Settings
    from .profiling.page import render
    from .profiling.profile import profile

    settings = Settings(repetitions, warm_up, tokens)
    with profiling_bar() as tick:
        facts = profile(
            _bundle(bundle), against=against, settings=settings, progress=tick, **options
        )
    write(render(facts), out, "--out profile.html")
    if as_json:
        show_json({"page": str(out), **facts})
        return
    show(profile_table(facts))
    for line in command_lines(facts):
        click.echo(line)
    click.echo(f"\nthe page: {out}")


@main.command()
@click.argument("subject", metavar="BUNDLE_OR_MODEL")
@click.option(
    "--device",
    required=True,
    help="orin-agx-64, orin-nx-16, orin-nano-8, thor, h100, h200, rtx-4090, or cpu: this one.",
)
@click.option("--plan", help="Of a model: a preset or a file (default visipruner).")
@click.option("--precision", help="Of a model: fp32, fp16 (default), int8, w8 or w4.")
@click.option("--prefix", type=click.IntRange(0), help="Of a model: rows before it (default 35).")
@click.option(
    "--text", type=click.IntRange(1), default=40, show_default=True, help="Question rows."
)
@click.option("--tokens", type=click.IntRange(1), default=32, show_default=True, help="An answer.")
@click.option("--context", type=click.IntRange(64), default=1024, show_default=True)
@click.option("--threads", type=click.IntRange(1), help="Of this CPU; default: every core.")
@as_json
def estimate(subject, device, as_json, plan, precision, prefix, threads, **prompt) -> None:
    """Estimate times and memory on a machine that is not at hand.

    From the operations and bytes of every call and the device's published peaks; nothing is run,
    but that the peaks of `cpu` are measured. Where a device was measured its efficiency is fitted,
    and the error of that on models it had not seen is shown; elsewhere the answer is a range.
    CONTEXT is the room that engines have.

    \b
    visistage estimate llava-7b --device orin-agx-64
    visistage estimate llava-7b --device orin-nano-8 --precision w4 --plan visipruner:t=14
    visistage estimate engines/demo/visipruner-fp32-cpu --device cpu --json
    """
    from .console.estimate import estimate_table, subject_of
    from .estimate.predict import Prompt, estimate

    of = subject_of(subject, plan, precision, prefix)
    facts = estimate(of, device, Prompt(**prompt), threads=threads)
    if as_json:
        show_json(facts)
    else:
        show(estimate_table(facts))


@main.command()
@as_json
def doctor(as_json) -> None:
    """Show what this machine can build and run, and what it lacks."""
    from .console.doctor import doctor_facts, doctor_table

    if as_json:
        show_json(doctor_facts())
    else:
        show(doctor_table())


def _show_build(progress: Any, bundle: Any, engines: Any, as_json: bool) -> None:
    """What a build ends with on stdout: its facts, or the bundle's folder for the next command."""
    if as_json:
        show_json(progress.to_dict(bundle, engines))
    else:
        click.echo(bundle.path)


def _capability(text: str) -> tuple[int, int]:
    from .graphs.targets import parse_capability

    return parse_capability(text)


def _bundle(given: Path | None) -> Path:
    from .runtime.shared import default_bundle

    return given or default_bundle()


def _pictures(images: tuple[str, ...]) -> list[str | bytes]:
    return [sys.stdin.buffer.read() if image == "-" else image for image in images]


def _session(bundle: Path | None, **options) -> Any:
    from . import runtime

    return runtime.load(_bundle(bundle), **options)


def _sampling(own: Any, options: dict[str, Any]) -> Any:
    """The model's settings with those that were given on the command line."""
    from dataclasses import replace

    return replace(own, **{name: value for name, value in options.items() if value is not None})
