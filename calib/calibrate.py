"""``calibrate``: samples become a plan with reasons, ranges, and a page about both.

    samples ─▶ dense answers ─▶ dynamics ─▶ text-blind ─▶ candidates ─▶ plan ─▶ ranges ─▶ page
    read once  a bundle         a walk      bundles, one at a time      held out  its stages' rows

A plan may be chosen for a quantised precision (``choosing``); what came of it is then asked once
more, as it ships.

With a plan given nothing is chosen and no bundle runs: what remains is one walk of the checkpoint,
one layer's weights in memory at a time. That is how a 7B goes through a small machine.
"""

from __future__ import annotations

import shutil
import uuid
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

from ..compile.build import versions
from ..compile.checkpoint.checkpoint import Checkpoint, open_checkpoint
from ..compile.export.texts import fits, text_facts
from ..compile.planfile import resolve_plan, save_plan
from ..compile.quantize.calibration_file import Calibration, SampleFacts
from ..compile.steps import NOTES, Staging
from ..graphs.errors import PlanError
from ..graphs.plan.plan import StagePlan
from ..graphs.progress import Progress
from ..runtime.image.preprocessing import Preprocessing
from .page.calibration_page import write_report
from .plan_search.chooser import Chooser, SelectionGoal, agrees
from .plan_search.measure_plans import Measuring, Origin
from .progress import CalibrationProgress, progress_steps
from .run import layerwise as walk
from .run.collect_ranges import collect
from .sample_prompts import order_hash, prepare
from .samples import Sample

PLAN_FILE = "plan.yaml"


def calibrate(
    origin: Origin,
    samples: Sequence[Sample],
    plan: str | SelectionGoal,
    *,
    files: Sequence[str] = (),
    out: str | Path = "calibrations",
    progress: CalibrationProgress,
) -> tuple[Path, Calibration]:
    """Calibrate a model in ``OUT/<model>/``; what is there is replaced once all is done.

    Args:
        origin: the checkpoint.
        samples: read once, in their order.
        plan: a static plan, as ``resolve_plan`` takes it, or how to choose one.
        files: names of the files that the samples are from, without folders.
        out: folder of all calibrations.
        progress: told of every step.

    Raises:
        VisistageError: whatever the user can mend; nothing is left behind then.
    """
    step = progress_steps(progress)
    with step("open checkpoint"):
        checkpoint = open_checkpoint(**vars(origin), progress=progress.advance)
        given = _given(plan, checkpoint) if isinstance(plan, str) else None
        texts = text_facts(checkpoint)
    with step("read samples", len(samples)) as report:
        prompts, unreadable = prepare(
            samples,
            texts.encoder,
            Preprocessing.from_dict(texts.preprocessing),
            lambda: progress.advance(1),
        )
        report(f"{len(prompts)} read, {len(unreadable)} unreadable")
    with step("hash weights"):
        facts = fits(checkpoint, texts)

    # No key of an earlier run: what a calibration that was cut short had measured is not kept.
    staging = Staging(Path(out) / checkpoint.name, uuid.uuid4().hex, Progress())
    with staging, _removed_unless_finished(staging.folder):
        dynamics: dict[str, Any] = {}
        choice: dict[str, Any] = {}
        if isinstance(plan, SelectionGoal):
            named = {name for name, _ in unreadable}
            readable = [one for one in samples if Path(one.name).name not in named]
            measuring = Measuring(origin, staging.folder / "bundles", plan.precision)
            chooser = Chooser(checkpoint, texts, facts, measuring, plan, progress)
            taken, prompts, dynamics = chooser.choose(readable, prompts)
            choice = {**taken.to_dict(), **chooser.measured()}
            given = taken.plan
        assert given is not None
        with step("ranges", walk.layerwise_pieces(checkpoint.config, texts.prefix_ids)) as report:
            found = collect(checkpoint, prompts, given, texts.prefix_ids, progress=progress.advance)
            report(
                f"{len(found.groups)} groups of linear layers, {found.cache[0].size} cached heads"
            )
        names = tuple(one.name for one in prompts)
        calibration = Calibration(
            model=checkpoint.name,
            fits=facts,
            plan=given,
            rows="stage",
            include_prefix=False,
            samples=SampleFacts(tuple(files), names, order_hash(prompts), tuple(unreadable)),
            groups=found.groups,
            versions=versions(),
            dynamics=dynamics,
            choice=choice,
            cache=found.cache,
        )
        if isinstance(plan, SelectionGoal) and plan.quant_config is not None:
            with step(f"as it ships, {plan.precision}", measuring.ship_asks) as report:
                agreed = measuring.ship(calibration, lambda: progress.advance(1))
                report(agrees(agreed))
            shipped = {"samples": measuring.shipped_on, **agreed.to_dict()}
            calibration = replace(calibration, choice={**choice, "shipped": shipped})
        with step("write"):
            calibration.save(staging.folder)
            save_plan(given, staging.folder / PLAN_FILE)
            write_report(calibration, staging.folder)
            (staging.folder / NOTES).unlink(missing_ok=True)
            staging.finish()
    return staging.final, calibration


def _given(plan: str, checkpoint: Checkpoint) -> StagePlan:
    config = checkpoint.config
    staged = resolve_plan(plan, config.text.layers, config.visual_tokens)
    if staged.kind != "static":
        raise PlanError(
            f"plan '{staged.name}' decides per prompt, so no stage has rows of its own to "
            "calibrate on. Name a static plan, such as visipruner, or leave out --plan"
        )
    return staged


@contextmanager
def _removed_unless_finished(folder: Path) -> Iterator[None]:
    """Ctrl-C counts as well."""
    try:
        yield
    except BaseException:
        shutil.rmtree(folder, ignore_errors=True)
        raise
