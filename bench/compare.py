"""The demo's plans of all methods at the same cost, as ``visistage compare`` has them, recorded.

    python -m visistage.bench.compare [--samples 280] [--series demo-576]
    python -m visistage.bench.compare --series easy-vqa

Writes the plot, too: ``docs/compare-SERIES.svg``.
"""

from __future__ import annotations

from dataclasses import replace

import click

from ..calib.two_turns import Turns, evaluation_turns, paired
from ..cli.show.bar import StepBar, calibration_line
from ..compile.matched_bundles import SHARES, matched_bundles
from ..pages.chart import svg_file
from ..tools.compare.compare import QUICK, compare
from ..tools.compare.compare_page import plot
from .record import dry_option, save
from .tables import ROOT
from .turns import EASY_VQA, SERIES, series_samples

RECORDED = (0.15, *SHARES)
"""The least share is the one at which a plan is to lose no more than a point."""


@click.command()
@click.option("--samples", default=280, show_default=True)
@click.option("--series", type=click.Choice([*SERIES]), default="demo", show_default=True)
@click.option("--plan", "plans", multiple=True, help="Besides dense, instead of all.")
@click.option("--share", "shares", multiple=True, type=float, default=RECORDED, show_default=True)
@click.option("--repetitions", default=QUICK.repetitions, show_default=True)
@click.option("--out", default="comparisons", show_default=True, help="Folder of the bundles.")
@dry_option
def main(
    samples: int,
    series: str,
    plans: tuple[str, ...],
    shares: tuple[float, ...],
    repetitions: int,
    out: str,
    dry: bool,
) -> None:
    """Build, time in turns, ask, record."""
    with StepBar(calibration_line) as progress:
        compared, left_out = matched_bundles(
            SERIES[series], plans, shares, out=out, progress=progress
        )
        facts = compare(
            compared,
            series_turns(series, samples),
            folder=compared[0].bundle.path.parent / f"answers-{series}",
            settings=replace(QUICK, repetitions=repetitions),
            progress=progress,
        )
    rows = facts.pop("rows")
    save(f"compare-{series}", [{"series": series, **facts, "left_out": left_out}, *rows], dry=dry)
    if not dry:
        picture = svg_file(plot(rows))
        (ROOT / "docs" / f"compare-{series}.svg").write_text(picture, encoding="utf-8")


def series_turns(series: str, samples: int) -> list[Turns]:
    """Return at most ``samples`` pairs of questions of one of ``SERIES``."""
    if series == EASY_VQA:
        return paired(series_samples(series, samples))
    return evaluation_turns(series, None, samples)


if __name__ == "__main__":
    main()
