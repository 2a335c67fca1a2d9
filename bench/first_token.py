"""Time to the first token of the demo model under several plans, the plans taking turns.

python -m visistage.bench.first_token [--rounds 150]
"""

from __future__ import annotations

from pathlib import Path

import click

from ..compile.build import make_bundle
from .accuracy import PLANS
from .record import save, spread
from .turns import take_turns


@click.command()
@click.option("--rounds", default=150, show_default=True)
@click.option("--out", default="engines", show_default=True, help="Folder of the bundles.")
def main(rounds: int, out: str) -> None:
    """Build, ask in turns, record."""
    paths = [make_bundle("demo", plan=plan, out=Path(out)).path for plan in PLANS]
    rows = []
    for plan, answers in zip(PLANS, take_turns(paths, rounds, 1), strict=True):
        times = spread([answer.timings.first_token_ms for answer in answers])
        rows.append({"plan": plan, "rounds": rounds})
        rows[-1] |= {f"{name}_ms": value for name, value in times.items()}
    save("first-token-demo", rows)


if __name__ == "__main__":
    main()
