"""``calibrate``: from samples to a plan with reasons, ranges, and a page about both.

    samples ─▶ dense answers ─▶ dynamics ─▶ text-blind ─▶ candidates ─▶ plan ─▶ ranges ─▶ page
    read once  a bundle         layer-wise  bundles, one at a time      held out  its stages' rows

A plan may be chosen for a quantised precision; the bundle that ships is then measured once more.

With a plan given nothing is chosen and no bundle runs: all that remains is one layer-wise run of
the checkpoint, one layer's weights in memory at a time, so a 7B fits a small machine.
"""

from __future__ import annotations

import shutil
import uuid
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

from ..compile.checkpoint.checkpoint import Checkpoint, open_checkpoint
from ..compile.disk import OUT, check_folder
from ..compile.export.texts import fits, text_facts
from ..compile.planfile import resolve_plan, save_plan
from ..compile.quantize.calibration_file import FACTS, Calibration
from ..compile.steps import Staging
from ..graphs.errors import PlanError
from ..graphs.plan.plan import StagePlan
from ..graphs.progress import Progress
from ..runtime.image.preprocessing import Preprocessing
from .page.calibration_page import write_report
from .plan_search.chooser import Chooser
from .plan_search.goal import SelectionGoal
from .plan_search.measure_plans import Origin, PlanBundles
from .plan_search.measured_file import MeasuredFile
from .run.collect_ranges import calibrated_ranges, plan_alone
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
    progress: Progress,
) -> tuple[Path, Calibration]:
    """Calibrate a model in ``OUT/<model>/``; what is there is replaced once all is done.

    Args:
        origin: the checkpoint.
        samples: read once, in their order.
        plan: a static plan, as ``resolve_plan`` takes it, or the goal of a choice.
        files: names of the files that the samples are from, without folders.
        out: folder of all calibrations.
        progress: sees every step.

    Raises:
        VisistageError: everything that the user can correct; nothing is left behind then.
    """
    check_folder(Path(out), OUT)
    with progress.step("open checkpoint"):
        checkpoint = open_checkpoint(**vars(origin), progress=progress.advance)
        given = _static_plan(plan, checkpoint) if isinstance(plan, str) else None
        if isinstance(plan, SelectionGoal):
            plan = plan.within(checkpoint.config)
        texts = text_facts(checkpoint)
    with progress.step("read samples", len(samples)) as outcome:
        preprocessing = Preprocessing.from_dict(texts.preprocessing)
        prompts, unreadable = prepare(
            samples,
            texts.encoder,
            preprocessing,
            checkpoint.config,
            progress.advance,
            _text_room(checkpoint, plan),
        )
        outcome.append(f"{len(prompts)} read, {len(unreadable)} unreadable")
    with progress.step("hash weights"):
        facts = fits(checkpoint, texts)

    # No key of an earlier run: of an interrupted calibration only measurements are kept.
    staging = Staging(Path(out) / checkpoint.name, uuid.uuid4().hex, Progress(), mark=FACTS)
    measured = MeasuredFile(
        staging.final.with_name(f".{checkpoint.name}.measured.json"),
        [sorted(facts.items()), order_hash(prompts)],
    )
    with staging, _removed_unless_finished(staging.folder):
        dynamics: dict[str, Any] = {}
        choice: dict[str, Any] = {}
        if isinstance(plan, SelectionGoal):
            bundles = PlanBundles(
                origin, staging.folder / "bundles", plan.precision, progress, measured
            )
            chooser = Chooser(checkpoint, texts, facts, bundles, plan, progress)
            named = {name for name, _ in unreadable}
            readable = [sample for sample in samples if Path(sample.name).name not in named]
            chosen = chooser.choose(readable, prompts)
            given, prompts = chosen.plan, chosen.prompts
            dynamics, choice = chosen.dynamics, chosen.choice
        assert given is not None
        if isinstance(plan, SelectionGoal) and plan.quant_config is None:
            calibration = plan_alone(checkpoint, facts, prompts, given)
        else:
            calibration = calibrated_ranges(
                checkpoint, facts, prompts, given, texts.prefix_ids, progress=progress
            )
        read = replace(calibration.samples, files=tuple(files), unreadable=tuple(unreadable))
        calibration = replace(calibration, samples=read, dynamics=dynamics, choice=choice)
        if isinstance(plan, SelectionGoal) and plan.quant_config is not None:
            shipped = bundles.ship(calibration)
            calibration = replace(calibration, choice={**choice, "shipped": shipped})
        with progress.step("write"):
            calibration.save(staging.folder)
            save_plan(given, staging.folder / PLAN_FILE)
            write_report(calibration, staging.folder)
            staging.finish()
    measured.remove()
    return staging.final, calibration


def _text_room(checkpoint: Checkpoint, plan: str | SelectionGoal) -> int:
    """Return the text rows of a sample that leave room for an image, and for an answer."""
    config = checkpoint.config
    answer = plan.max_tokens if isinstance(plan, SelectionGoal) else 0
    return config.text.max_positions - config.visual_tokens - answer


def _static_plan(plan: str, checkpoint: Checkpoint) -> StagePlan:
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
    """Remove ``folder`` if the block fails, or is interrupted."""
    try:
        yield
    except BaseException:
        shutil.rmtree(folder, ignore_errors=True)
        raise
