"""Commands that inspect and check: bundles and this machine."""

from __future__ import annotations

from pathlib import Path

import click

from .options import MODEL, as_json, bundle_argument, bundle_at, bundle_default
from .show.output import show, show_json
from .show.units import ByteSize


@click.command(epilog=bundle_default)
@bundle_argument
@as_json
def inspect(bundle, as_json) -> None:
    """Show what a bundle holds.

    Model, plan, graphs with their tensors, sizes, cache per row and per prompt, versions. Where
    engines were compiled: for which GPU, their sizes, shapes, layers, attention, caches, memory.

    \b
    visistage inspect demo
    visistage inspect llava-7b/dense --json
    """
    from ..graphs.bundle import Bundle
    from .show.bundle_view import bundle_facts, bundle_table
    from .show.engines_view import engine_facts, engine_table

    opened = Bundle.open(bundle_at(bundle))
    if as_json:
        show_json({**bundle_facts(opened), "engines": engine_facts(opened)})
    else:
        show(bundle_table(opened))
        show(engine_table(opened))


@click.command("list")
@click.argument("folder", default="engines", type=click.Path(path_type=Path))
@as_json
def list_bundles(folder, as_json) -> None:
    """List the bundles in a folder, the newest first.

    Their names are what other commands take as BUNDLE; the newest is what they take by default.

    \b
    visistage list
    visistage list /srv/bundles --json
    """
    from .show.list_view import list_facts, list_table

    facts = list_facts(folder)
    if as_json:
        show_json(facts)
    else:
        show(list_table(facts, folder))


@click.command(epilog=bundle_default)
@bundle_argument
@click.argument("model", required=False, type=MODEL)
@click.option(
    "--model",
    "model_option",
    type=MODEL,
    help="The checkpoint that it was built from, on this machine; the same as MODEL.",
)
@click.option(
    "--calib",
    "calibration",
    type=click.Path(path_type=Path),
    help="The calibration that it was built with; by default calibrations/MODEL where it fits.",
)
@click.option("--data", type=click.Path(path_type=Path), help="JSONL file of samples.")
@click.option("--samples", type=click.IntRange(1), help="Ask so many only (default 6).")
@click.option(
    "--max-tokens",
    "--max-new-tokens",
    "max_tokens",
    type=click.IntRange(1),
    default=16,
    show_default=True,
)
@click.option("--memory-limit", type=ByteSize(), help="For each check; by default what is free.")
@as_json
def verify(
    bundle, model, model_option, calibration, data, samples, max_tokens, memory_limit, as_json
) -> None:
    """Check a bundle's files, and that they compute what the checkpoint computes.

    Hashes every file, then compares neighbours from Hugging Face over torch and ONNX Runtime to the
    engines: each graph alone and whole answers, teacher-forced and free-running. Checks that this
    machine cannot run are named with the reason. The report is written into the bundle: verify.md
    and verify.json.

    Questions are those of evaluate; other models than demo are asked about the package's own images
    where --data is not given. Without MODEL, checks that need the checkpoint are left out; demo's
    is in the package.

    \b
    visistage verify demo
    visistage verify llava-7b llava-7b --data questions.jsonl --samples 20
    """
    path = bundle_at(bundle)  # told before anything slow is imported
    from ..graphs.bundle import Bundle
    from ..graphs.commands import rebuild_command
    from ..tools.verify.verify import checkpoint_at_hand, chosen, verify
    from ..tools.verify.verify_report import PAGE_FILE
    from .show.bar import StepBar, verify_line
    from .show.verify_view import require_passed, verify_table

    opened = Bundle.open(path)
    asked = chosen(opened.manifest.model, data, samples)
    model = model or model_option or checkpoint_at_hand(opened.manifest.model)
    with StepBar(verify_line, measured=False) as progress:
        report = verify(
            opened,
            asked,
            model=model,
            calibration=calibration,
            max_tokens=max_tokens,
            memory=memory_limit,
            progress=progress,
        )
    where = str(opened.path / PAGE_FILE)
    if as_json:
        show_json({"path": where, **report.to_dict()})
    else:
        show(verify_table(report, where))
    report.write(opened.path)
    require_passed(report, where, rebuild_command(opened.manifest))


@click.command()
@click.option("--jetson", is_flag=True, help="Check a Jetson's settings, and say what to type.")
@as_json
def doctor(jetson, as_json) -> None:
    """Show what this machine can build and run, and what it lacks.

    On a Jetson also whether power mode, clocks, swap, TensorRT's Python and disk are as compiling
    and running a bundle want them: --jetson.

    \b
    visistage doctor
    visistage doctor --jetson
    """
    if jetson:
        from .show.board_view import board_facts, board_table

        if as_json:
            show_json(board_facts())
        else:
            show(board_table())
        return
    from .show.doctor_view import doctor_facts, doctor_table

    if as_json:
        show_json(doctor_facts())
    else:
        show(doctor_table())
