"""What rounding costs and saves on the demo model: every scheme, observer and plan, in one run.

    python -m visistage.bench.quantisation [--samples 2000] [--rounds 60]

Each bundle answers the same held-out questions; agreement counts answers equal to those of the
dense FP32 bundle. Times are taken afterwards, in turns (``turns.py``).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import click

from ..calib.calibrate import calibrate
from ..calib.plan_search.measure_plans import Origin
from ..calib.run.collect_ranges import collect
from ..calib.sample_prompts import prepare
from ..calib.samples import calibration_samples
from ..compile.build import make_bundle
from ..compile.checkpoint.checkpoint import open_checkpoint
from ..compile.export.texts import text_facts
from ..compile.quantize.calibration_file import Calibration
from ..graphs.bundle import Bundle
from ..graphs.progress import Progress
from ..graphs.quantization import OBSERVERS
from ..runtime.image.preprocessing import Preprocessing
from .record import dry_option, save, spread
from .turns import accuracy_facts, ask_all, take_turns

INT8 = tuple(
    f"int8:observer={observer}{smooth}" for observer in OBSERVERS for smooth in ("", ",smooth=no")
)
MIXED = ("int8:vision=float", "int8:keep=5%", "int8:stage{last}=w4")
PRECISIONS = ("fp32", *INT8, *MIXED, "w8", "w4")


@dataclass(frozen=True)
class Case:
    """One bundle: what its ranges rest on, its plan (for the table), its precision."""

    ranges: str
    plan: str
    precision: str
    folder: Path


class StepNames(Progress):
    """A progress callback that prints which step begins."""

    def start(self, step: str, total: int | None = None) -> None:
        """Print the step."""
        print(step, flush=True)


@click.command()
@click.option("--samples", default=2000, show_default=True)
@click.option("--rounds", default=60, show_default=True)
@click.option("--calibrate-on", "count", default=300, show_default=True)
@click.option("--work", default=".cache/bench/quantisation", type=click.Path(path_type=Path))
@dry_option
def main(samples: int, rounds: int, count: int, work: Path, dry: bool) -> None:
    """Calibrate, build, ask (one bundle a core), time in turns, record."""
    cases = list(_cases(work, count))
    bundles = [_built(case, work) for case in cases]
    paths = [bundle.path for bundle in bundles]
    asked = ask_all(paths, samples)
    rows = []
    for case, bundle, heard, timed in zip(
        cases, bundles, asked, take_turns(paths, rounds, 8), strict=True
    ):
        timings = [answer.timings for answer in timed]
        first = spread([times.first_token_ms for times in timings])
        later = spread([t.per_token_ms for t in timings if t.per_token_ms is not None])
        rows.append(
            {
                "plan": case.plan,
                "precision": case.precision,
                "ranges": case.ranges,
                **accuracy_facts(heard, asked[0]),
                "weight_bytes": bundle.manifest.weight_bytes,
                "first_token_p10_ms": first["p10"],
                "first_token_median_ms": first["median"],
                "per_token_p10_ms": later["p10"],
                "per_token_median_ms": later["median"],
            }
        )
    save("quantisation-demo", rows, dry=dry)


def _cases(work: Path, count: int) -> list[Case]:
    """Return all cases, the dense FP32 bundle first: everything is compared with it."""
    samples, files = calibration_samples("demo", None, count)
    cases = []
    for plan in ("dense", "visipruner"):
        folder, made = calibrate(
            Origin("demo"), samples, plan, files=files, out=work / plan, progress=StepNames()
        )
        last = len(made.plan.stages) - 1
        cases += [
            Case("its own rows", made.plan.name, precision.format(last=last), folder)
            for precision in PRECISIONS
            if last or "{last}" not in precision
        ]
    others = {
        "the dense model's rows": {"rows": "dense"},
        "its own rows and the prefix": {"include_prefix": True},
    }
    for name, options in others.items():
        again = _again(made, samples, options)
        folder = work / name.replace(" ", "-").replace("'", "")
        again.save(folder)
        cases += [
            Case(name, made.plan.name, f"int8:observer={o}", folder) for o in ("minmax", "mse")
        ]
    return cases


def _again(made: Calibration, samples: Sequence, options: dict[str, Any]) -> Calibration:
    """Return the same calibration on other rows."""
    checkpoint = open_checkpoint("demo")
    texts = text_facts(checkpoint)
    preprocessing = Preprocessing.from_dict(texts.preprocessing)
    prompts, _ = prepare(samples, texts.encoder, preprocessing, checkpoint.config)
    found = collect(checkpoint, prompts, made.plan, texts.prefix_ids, **options)
    return replace(made, groups=found.groups, cache=found.cache, **options)


def _built(case: Case, work: Path) -> Bundle:
    out = work / "engines" / case.folder.parent.name / case.folder.name
    return make_bundle("demo", precision=case.precision, calibration=case.folder, out=out)


if __name__ == "__main__":
    main()
