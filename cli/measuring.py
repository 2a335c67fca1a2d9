"""Commands that put numbers on a bundle: accuracy, times, and times elsewhere."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import click

from ..runtime.hardware import busy_machine
from .options import (
    BUNDLE,
    DEVICE,
    MODEL,
    PLAN,
    as_json,
    backend_option,
    bundle_argument,
    bundle_at,
    bundle_default,
    bundles_called,
    canvas_option,
    image_tokens_option,
    is_model,
    threads_option,
)
from .show.output import note, say, show, show_json
from .show.units import MILLISECONDS, RATE, ShareParam

OUT_HINT = "--out profile.html"


@click.command(epilog=bundle_default)
@bundle_argument
@click.option("--data", type=click.Path(path_type=Path), help="JSONL file of samples.")
@click.option("--samples", type=click.IntRange(1), help="Ask so many only (demo: 200).")
@click.option(
    "--max-tokens",
    "--max-new-tokens",
    "max_tokens",
    type=click.IntRange(1),
    default=32,
    show_default=True,
)
@backend_option
@click.option(
    "--out",
    type=click.Path(path_type=Path),
    help="Keep the answers there, a line each; those that it holds are not asked for again.",
)
@as_json
def evaluate(bundle, data, samples, max_tokens, backend, out, as_json) -> None:
    """Measure accuracy and speed on known answers.

    An answer is right when it equals the expected one but for case, punctuation and spacing. A
    line of --data, its image relative to the file, type left out at will:

    \b
    {"image": "1.jpg", "prompt": "How many dogs?", "answer": "2", "type": "count"}

    The demo model needs no --data: it is asked about scenes that it was not trained on. Samples
    that cannot be asked are named and count nowhere. Answers are kept as they come: the same
    command goes on where an earlier one was stopped.

    \b
    visistage evaluate demo --samples 100
    visistage evaluate llava-7b --data questions.jsonl --json
    """
    path = bundle_at(bundle)  # told before anything slow is imported
    from .. import runtime
    from ..calib.answer_file import AnswerFile
    from ..calib.evaluate import check_samples, evaluate
    from ..calib.samples import evaluation_samples
    from ..graphs.bundle import MANIFEST, Bundle, sha256
    from .show.evaluation_view import (
        counting,
        evaluation_table,
        tell_known,
        tell_refused,
        unfinished,
    )

    opened = Bundle.open(path)
    chosen = evaluation_samples(opened.manifest.model, data, samples)
    with runtime.load(path, backend=backend) as session:
        good, refused = check_samples(session, chosen)
        tell_refused(refused, len(chosen))
        key = [sha256(opened.path / MANIFEST), max_tokens, backend]
        kept = AnswerFile(out, key) if out else unfinished(key)
        tell_known(kept, good)
        with counting(len(good)) as advance:
            report = evaluate(
                session,
                good,
                max_tokens=max_tokens,
                advance=advance,
                kept=kept,
                unreadable=refused,
            )
    if out is None and kept is not None:
        kept.file.unlink(missing_ok=True)
    if as_json:
        show_json({"bundle": str(session.bundle.path), **report.to_dict()})
    else:
        show(evaluation_table(report))


@click.command(epilog=bundle_default)
@bundle_argument
@click.option(
    "--against",
    type=BUNDLE,
    help="Another bundle of the model, in turns; by default a dense one beside BUNDLE.",
)
@click.option("--repetitions", type=click.IntRange(1), default=20, show_default=True)
@click.option("--warm-up", type=click.IntRange(0), default=3, show_default=True)
@click.option("--tokens", type=click.IntRange(2), default=32, show_default=True, help="An answer.")
@click.option("--operators/--no-operators", default=True, help="Times of layers and operators.")
@backend_option
@threads_option
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

    Every repetition asks about a new image, then again about the same image.
    Shown are medians and percentiles of every stage, memory, energy where power can be read, times
    of layers and operators, and how near each graph comes to what this machine can do, which is
    measured in the same run. The page has a timeline and the roofline. Nothing else should run
    meanwhile.

    \b
    visistage profile demo/visipruner
    visistage profile llava-7b --against llava-7b/fastv --json
    visistage profile llava-7b --repetitions 5 --tokens 256       longer: energy, too
    """
    path, other = bundle_at(bundle), against and bundle_at(against)
    from ..pages.page import check_page_place, write_page
    from ..tools.profile.profile import profile
    from ..tools.profile.profile_page import render_profile
    from ..tools.profile.timing import Settings
    from .show.profile_view import profile_table, profiling_bar

    check_page_place(out, OUT_HINT)
    note(busy_machine())
    settings = Settings(repetitions, warm_up, tokens)
    with profiling_bar() as progress:
        facts = profile(
            path,
            against=other,
            settings=settings,
            progress=progress,
            **options,
        )
    if as_json:
        write_page(render_profile(facts), out, OUT_HINT)
        show_json({"page": str(out), **facts})
        return
    show(profile_table(facts))  # first: it took minutes, and the page's disk may be full
    write_page(render_profile(facts), out, OUT_HINT)
    commands = ", and the commands of Polygraphy for each graph" if facts["commands"] else ""
    say(f"\nthe page{commands}: {out}")


@click.command()
@click.argument("model", type=MODEL)
@click.option("--data", type=click.Path(path_type=Path), help="JSONL file of samples.")
@click.option("--samples", type=click.IntRange(1), help="Ask so many only (demo: 200).")
@click.option(
    "--plan",
    "--plans",
    "plans",
    multiple=True,
    type=PLAN,
    help="Compare this one, not all; may be repeated. With options, as it is.",
)
@click.option(
    "--share",
    "shares",
    multiple=True,
    type=ShareParam(),
    help="Of the visual FLOPs; may be repeated (25%, 50%, 75%).",
)
@click.option(
    "--trained",
    type=(PLAN, MODEL),
    multiple=True,
    metavar="PLAN MODEL",
    help="A plan, and a checkpoint of MODEL's shape that was trained for it; may be repeated.",
)
@click.option("--repetitions", type=click.IntRange(1), default=20, show_default=True)
@click.option("--out", default="comparisons", show_default=True, help="Folder of them all.")
@click.option("--page", type=click.Path(path_type=Path), help="By default OUT/MODEL/compare.html.")
@click.option("--revision", help="Branch, tag or commit of a model on the hub.")
@click.option("--offline", is_flag=True, help="Use only what was downloaded before.")
@click.option("--dummy-weights", is_flag=True, help="Random weights in the model's shape.")
@as_json
def compare(
    model, data, samples, plans, shares, trained, repetitions, out, page, as_json, **options
) -> None:
    """Put every way to prune side by side, at the same visual FLOPs.

    Options of each preset are searched for the plans nearest to 25, 50 and 75 % of the visual
    FLOPs of the unpruned model. Their bundles are built in OUT, timed in turns, and asked the same
    questions, two about each image: the second one on what is cached. The table and the page hold
    accuracy with intervals, times and bytes; controls, which look at nothing, stand among them.
    Samples as for visistage evaluate. Answers are kept as they come: the same command goes on
    where an earlier one was stopped. Nothing else should run meanwhile.

    \b
    visistage compare demo
    visistage compare demo --share 15% --plan scope --plan random --plan visipruner:entry=scope
    visistage compare demo --plan visipruner-adaptive --plan visipruner:t=2,keep=8 --samples 50
    visistage compare llava-7b --data questions.jsonl --plan scope --plan visipruner --json
    visistage compare demo --plan dense --trained hidrop:entry=3 demo-hidrop
    """
    note(f"comparing plans of {model}")
    note(busy_machine())
    from ..calib.two_turns import evaluation_turns
    from ..compile.matched_bundles import SHARES, matched_bundles
    from ..pages.page import check_page_place, write_page
    from ..tools.compare.compare import QUICK, compare
    from ..tools.compare.compare_page import render_comparison
    from .show.bar import StepBar, calibration_line
    from .show.compare_view import comparison_table

    hint = "--page compare.html"
    if page is not None:
        check_page_place(page, hint)
    turns = evaluation_turns(model, data, samples)
    try:
        with StepBar(calibration_line) as progress:
            compared, left_out = matched_bundles(
                model,
                plans,
                shares or SHARES,
                out=out,
                progress=progress,
                trained=trained,
                **options,
            )
            folder = compared[0].bundle.path.parent
            facts = compare(
                compared,
                turns,
                folder=folder / "answers",
                settings=replace(QUICK, repetitions=repetitions),
                progress=progress,
            )
    except KeyboardInterrupt:
        note(f"what was built and answered is in {out}: the same command goes on from there")
        raise
    facts |= {"left_out": left_out, "data": data and data.name}
    page = page or folder / "compare.html"
    if as_json:
        write_page(render_comparison(facts), page, hint)
        show_json({"page": str(page), **facts})
        return
    show(comparison_table(facts))  # first: it took minutes, and the page's disk may be full
    write_page(render_comparison(facts), page, hint)
    say(f"\nthe page: {page}")


@click.command()
@click.argument("subject", metavar="MODEL|BUNDLE", type=MODEL)
@click.option(
    "--device",
    type=DEVICE,
    required=True,
    help="orin-agx-64, orin-nx-16, orin-nano-8, thor, h100, h200, rtx-4090, or cpu: this one.",
)
@click.option("--plan", type=PLAN, help="Of a model: a preset or a file (default visipruner).")
@click.option("--precision", help="Of a model: fp32, fp16 (default), int8, w8 or w4.")
@click.option("--prefix", type=click.IntRange(0), help="Of a model: rows before it (default 35).")
@image_tokens_option
@canvas_option
@click.option(
    "--text", type=click.IntRange(1), default=40, show_default=True, help="Question rows."
)
@click.option("--tokens", type=click.IntRange(1), default=32, show_default=True, help="An answer.")
@click.option("--context", type=click.IntRange(64), default=1024, show_default=True)
@click.option(
    "--rate", type=RATE, help="Questions of all callers, such as 20/s: how many replicas?"
)
@click.option(
    "--p95",
    type=MILLISECONDS,
    default="1s",
    show_default=True,
    help="With --rate: the first token of 95 % of the questions comes within this.",
)
@click.option(
    "--questions-per-image",
    type=click.FloatRange(1),
    default=1,
    show_default=True,
    help="With --rate.",
)
@click.option(
    "--lanes", type=click.IntRange(1, 256), default=8, show_default=True, help="With --rate."
)
@threads_option
@as_json
def estimate(
    subject,
    device,
    as_json,
    plan,
    precision,
    prefix,
    image_tokens,
    canvas,
    threads,
    rate,
    p95,
    questions_per_image,
    lanes,
    **prompt,
) -> None:
    """Estimate times and memory on a machine that is not at hand, or how many serve a rate.

    From the operations and bytes of every call and the device's published peaks; nothing is run,
    but that the peaks of `cpu` are measured. Where a device was measured its efficiency is fitted,
    and the error of that on models it had not seen is shown; elsewhere the answer is a range.
    The image is one of the most tokens that MODEL takes. CONTEXT is the room that engines have.

    \b
    visistage estimate llava-7b --device orin-agx-64
    visistage estimate llava-7b --device orin-nano-8 --precision w4 --plan visipruner:t=14
    visistage estimate demo/visipruner --device cpu --json

    With --rate, callers, queue and lanes are simulated over the costs of every call: measured for a
    bundle on `cpu`, estimated elsewhere.

    \b
    visistage estimate llava-7b --device h100 --rate 20/s --p95 800ms --questions-per-image 3
    visistage estimate demo/visipruner --device cpu --rate 30/s --p95 100ms
    """
    if device == "cpu":
        note("measuring this machine")
        note(busy_machine())
    if not is_model(subject) and bundles_called(subject):
        subject = str(bundle_at(subject))
    from ..graphs.families.registry import smaller_images
    from ..tools.estimate.estimate_target import estimate_target
    from ..tools.estimate.predict import PromptLengths, estimate
    from .show.estimate_view import estimate_table

    target = estimate_target(subject, plan, precision, prefix, image_tokens, canvas)
    smaller, hint = smaller_images(target.config), None
    if image_tokens is None and smaller:
        hint = f"the image has the most tokens there are, {target.config.visual_tokens}: {smaller}"
        hint += " builds for fewer"
    if rate is not None:
        from ..graphs.bundle import Bundle, bundles_in
        from ..tools.estimate.capacity import capacity
        from ..tools.estimate.queueing import Traffic
        from .show.estimate_view import capacity_table

        lengths, bundle = PromptLengths(**prompt), None
        if bundles_in(Path(subject)):
            bundle = Bundle.open(subject)
        traffic = Traffic(rate, questions_per_image, lengths.tokens)
        found = capacity(
            target, device, lengths, traffic, p95, lanes=lanes, bundle=bundle, threads=threads
        )
        note(hint)
        if as_json:
            show_json(found)
        else:
            show(capacity_table(found))
        return
    facts = estimate(target, device, PromptLengths(**prompt), threads=threads)
    note(hint)
    if as_json:
        show_json(facts)
    else:
        show(estimate_table(facts))
