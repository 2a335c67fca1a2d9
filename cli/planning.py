"""Commands about stage plans: what one costs, and which one data would choose."""

from __future__ import annotations

from pathlib import Path

import click

from .options import MODEL, PLAN, as_json, canvas_option, image_tokens_option, model_option
from .show.output import note, say, show, show_json
from .show.units import ShareParam


@click.command()
@click.argument("plan", required=False, type=PLAN)
@click.argument("model", required=False, type=MODEL)
@model_option
@click.option("--layers", type=click.IntRange(1), help="Depth, instead of the model's.")
@click.option("--visual-tokens", type=click.IntRange(1), help="Per image, instead of the model's.")
@image_tokens_option
@canvas_option
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
    plan,
    model,
    model_option,
    layers,
    visual_tokens,
    image_tokens,
    canvas,
    trigger,
    kept,
    exit_,
    as_yaml,
    as_json,
    **options,
) -> None:
    """Show a plan's stages and savings, or list the presets.

    PLAN is a preset, preset:key=value,..., or a .yaml or .json file; MODEL, by default llava-7b, a
    known name or a folder. No weights are read.

    \b
    visistage plan visipruner
    visistage plan visipruner:t=14,keep=32 llava-13b
    visistage plan fastv --accounting paper --json
    visistage plan visipruner-paper --trigger 14 --kept 10.3 --exit 23
    visistage plan visipruner --yaml > mine.yaml
    """
    from .show.image_view import image_facts, image_table
    from .show.plan_view import (
        outcome_of,
        plan_cost_facts,
        plan_json,
        plan_table,
        preset_facts,
        preset_table,
    )

    if plan is None:
        if as_json:
            show_json(preset_facts())
        else:
            show(preset_table())
        return
    from ..compile.planfile import plan_to_yaml

    model = model or model_option or "llava-7b"
    staged, geometry = plan_cost_facts(plan, model, layers, visual_tokens, image_tokens, canvas)
    outcome = outcome_of(staged, trigger, kept, exit_)
    if as_yaml:
        say(plan_to_yaml(staged), nl=False)
        return
    facts = plan_json(staged, geometry, outcome=outcome, **options)
    facts["images"] = image_facts(model, staged, image_tokens, canvas)
    if as_json:
        show_json(facts)
    else:
        show(plan_table(facts, staged, outcome))
        if facts["images"]:
            show(image_table(facts["images"]))


@click.command()
@click.argument("model", type=MODEL)
@click.option("--data", type=click.Path(path_type=Path), help="JSONL file, or a folder with one.")
@click.option("--samples", type=click.IntRange(1), help="Read so many only (demo: 120).")
@click.option("--plan", type=PLAN, help="Calibrate for this static plan; nothing is chosen or run.")
@click.option("--lose", type=ShareParam(), help="Choose the cheapest plan that loses so much (1%).")
@click.option("--cost", type=ShareParam(), help="Choose the best plan within so much of dense.")
@click.option("--holdout", type=ShareParam(), help="Samples that confirm what others chose (33%).")
@click.option("--candidates", "most", type=click.IntRange(1), help="Plans to measure (16).")
@click.option("--selectors", help="What may choose visual tokens to enter (scope,divprune,cls).")
@click.option("--no-entry", is_flag=True, default=None, help="All visual tokens enter.")
@click.option("--depth", is_flag=True, default=None, help="Try leaving layers out, too.")
@click.option("--precision", help="Choose for fp32 (default), int8, w8, w4, or a recipe.")
@click.option("--out", default="calibrations", show_default=True, help="Folder of them all.")
@click.option("--revision", help="Branch, tag or commit of a model on the hub.")
@click.option("--offline", is_flag=True, help="Use only what was downloaded before.")
@click.option("--dummy-weights", is_flag=True, help="Random weights in the model's shape.")
@image_tokens_option
@canvas_option
@as_json
def calibrate(
    model,
    data,
    samples,
    plan,
    lose,
    cost,
    holdout,
    most,
    selectors,
    no_entry,
    depth,
    precision,
    out,
    as_json,
    **options,
) -> None:
    """Choose a plan from data, and measure the ranges that a quantised precision needs.

    Writes OUT/MODEL: the plan with its reasons, the ranges, and calibration.html, which is to be
    read before either is trusted. A line of --data, its image relative to the file, answer left
    out at will:

    \b
    {"image": "1.jpg", "prompt": "How many dogs?", "answer": "2"}

    A plan is chosen by what it may lose (--lose 1% of the tokens that the dense model says) or by
    what it may cost (--cost 50% of its visual FLOPs), from bundles that are built and asked here;
    samples held out confirm it. It may be an entry alone, or dense. With --depth the layers that
    change rows least are left out, up to a quarter of them, and measured like every other plan.
    With --precision those bundles are quantised, and what is lost is lost to rounding and pruning
    together. With --plan no bundle runs, and large models go through small machines. The demo model
    needs no --data.

    \b
    visistage calibrate demo --lose 1%
    visistage calibrate demo --lose 2% --precision int8
    visistage calibrate llava-7b --data questions.jsonl --cost 50%
    visistage calibrate llava-7b --data photos/ --samples 64 --plan visipruner:t=14,keep=32
    """
    note(f"calibrating {model}")
    from ..calib.samples import calibration_samples
    from .show.bar import StepBar, calibration_line
    from .show.calibration_view import calibration_facts, calibration_table, next_command

    chosen, files = calibration_samples(model, data, samples)
    with StepBar(calibration_line) as progress:
        from ..calib.calibrate import calibrate
        from ..calib.plan_search.goal import goal_or_plan
        from ..calib.plan_search.measure_plans import Origin

        goal = goal_or_plan(
            plan,
            lose=lose,
            cost=cost,
            holdout=holdout,
            most=most,
            selectors=selectors,
            no_entry=no_entry,
            depth=depth,
            precision=precision,
        )
        folder, calibration = calibrate(
            Origin(model, **options), chosen, goal, files=files, out=out, progress=progress
        )
    then = next_command(model, folder, calibration, **options)
    if as_json:
        show_json(calibration_facts(folder, calibration, then))
    else:
        show(calibration_table(folder, calibration, then))


@click.command()
@click.argument("model", type=MODEL)
@click.option("--data", type=click.Path(path_type=Path), help="JSONL file, or a folder with one.")
@click.option("--samples", type=click.IntRange(1), help="Read so many only (demo: 120).")
@click.option("--top", type=click.IntRange(1), default=20, show_default=True, help="Words to show.")
@click.option("--revision", help="Branch, tag or commit of a model on the hub.")
@click.option("--offline", is_flag=True, help="Use only what was downloaded before.")
@click.option("--dummy-weights", is_flag=True, help="Random weights in the model's shape.")
@as_json
def words(model, data, samples, top, as_json, **options) -> None:
    """Find the words of the vocabulary that many rows of many images resemble.

    The preset embedlens tells rows apart by their ids. A row's words are the three whose input
    embeddings have the largest cosine to it behind the projector. What it is worth to remove or
    freeze such rows, evaluate and calibrate say.

    \b
    visistage words demo --samples 40
    visistage words llava-7b --data photos/ --top 5 --json
    """
    note(f"reading images for {model}")
    from ..calib.samples import calibration_samples
    from .show.evaluation_view import counting

    chosen, _ = calibration_samples(model, data, samples)
    with counting(len(chosen), "reading") as advance:
        from ..calib.words import frequent_words
        from ..compile.checkpoint.checkpoint import open_checkpoint
        from .show.words_view import words_facts, words_table

        found = frequent_words(open_checkpoint(model, **options), chosen, top, advance)
    facts = words_facts(model, len(chosen), found)
    if as_json:
        show_json(facts)
    else:
        show(words_table(facts))
