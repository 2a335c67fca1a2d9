"""Time to the first token of a model under several plans, the plans taking turns.

    python -m visistage.bench.first_token [--rounds 150]
    python -m visistage.bench.first_token --model llava-45m --plan skipgpt --plan skipgpt:share=0.5

Models that are not in the package have random weights.
"""

from __future__ import annotations

from pathlib import Path

import click

from ..compile.build import make_bundle
from ..compile.checkpoint.known_models import OWN_MODELS
from .accuracy import PLANS
from .record import save, spread
from .scaling import prefill_ms
from .turns import take_turns


@click.command()
@click.option("--model", default="demo", show_default=True)
@click.option("--plan", "plans", multiple=True, default=PLANS, show_default=True)
@click.option("--rounds", default=150, show_default=True)
@click.option("--out", default="engines", show_default=True, help="Folder of the bundles.")
def main(model: str, plans: tuple[str, ...], rounds: int, out: str) -> None:
    """Build, ask in turns, record."""
    given = {"out": Path(out), "dummy_weights": model not in OWN_MODELS}
    paths = [make_bundle(model, plan=plan, **given).path for plan in plans]
    rows = []
    for plan, answers in zip(plans, take_turns(paths, rounds, 1), strict=True):
        times = spread([answer.timings.first_token_ms for answer in answers])
        decoder = spread([prefill_ms(answer) for answer in answers])
        rows.append({"plan": plan, "rounds": rounds})
        rows[-1] |= {f"{name}_ms": value for name, value in times.items()}
        rows[-1] |= {f"decoder_{name}_ms": value for name, value in decoder.items()}
    save(f"first-token-{model}", rows)


if __name__ == "__main__":
    main()
