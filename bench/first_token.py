"""Time to the first token of the demo model under several plans, the plans taking turns.

    python -m visistage.bench.first_token [--rounds 150]

Every round asks each plan the same question about a picture that none has seen, so that whatever
else the machine does falls on all of them alike; one thread, tower and preprocessing included. The
first decile is what an undisturbed machine takes, the median what this one took.
"""

from __future__ import annotations

from contextlib import ExitStack
from pathlib import Path
from statistics import median, quantiles

import click

from ..calib.samples import evaluation_samples
from ..compile.build import make_bundle
from ..runtime import load
from .accuracy import PLANS
from .record import save


@click.command()
@click.option("--rounds", default=150, show_default=True)
@click.option("--out", default="engines", show_default=True, help="Folder of the bundles.")
def main(rounds: int, out: str) -> None:
    """Build, ask in turns, record."""
    samples = evaluation_samples("demo", None, rounds + 1)
    times: dict[str, list[float]] = {plan: [] for plan in PLANS}
    with ExitStack() as stack:
        sessions = {
            plan: stack.enter_context(
                load(make_bundle("demo", plan=plan, out=Path(out)).path, threads=1)
            )
            for plan in PLANS
        }
        for sample in samples:
            for plan, session in sessions.items():
                answer = session.infer(sample.image, sample.prompt, max_tokens=1)
                times[plan].append(answer.timings.first_token_ms)
    rows = [
        {
            "plan": plan,
            "rounds": rounds,
            "p10_ms": quantiles(measured[1:], n=10)[0],  # the first round allocates
            "median_ms": median(measured[1:]),
            "p90_ms": quantiles(measured[1:], n=10)[-1],
        }
        for plan, measured in times.items()
    ]
    save("first-token-demo", f"python -m visistage.bench.first_token --rounds {rounds}", rows)


if __name__ == "__main__":
    main()
