"""Second questions of a conversation: selected anew, or on the first question's visual tokens.

    python -m visistage.bench.chat [--samples 1000]

Every image is asked twice in one conversation of the demo model, about different things in it; the
ways take turns. Beside the accuracy of the second answers: theirs where the image is asked again
without the first question before it, and the time to their first token.
"""

from __future__ import annotations

from contextlib import ExitStack
from pathlib import Path

import click

from ..calib.samples import normalise_answer
from ..calib.two_turns import evaluation_turns
from ..compile.build import make_bundle
from ..runtime import load
from .record import dry_option, save, spread
from .turns import mean

PLANS = ("dense", "scope:keep=32", "visipruner")
SELECTIONS = ("reselect", "sticky")


@click.command()
@click.option("--samples", default=1000, show_default=True)
@click.option("--out", default="engines", show_default=True, help="Folder of the bundles.")
@dry_option
def main(samples: int, out: str, dry: bool) -> None:
    """Build, ask in turns, record."""
    ways = [(plan, way) for plan in PLANS for way in SELECTIONS]
    turns = [turn for turn in evaluation_turns("demo", None, samples) if turn.second is not None]
    right: dict[tuple[str, str], list[bool]] = {way: [] for way in ways}
    times: dict[tuple[str, str], list[float]] = {way: [] for way in ways}
    alone: dict[str, list[bool]] = {plan: [] for plan in PLANS}
    with ExitStack() as stack:
        sessions = {
            plan: stack.enter_context(load(make_bundle("demo", plan=plan, out=Path(out)).path))
            for plan in PLANS
        }
        for turn in turns:
            first, second = turn.samples
            for plan, session in sessions.items():
                answer = session.infer(second.image, second.prompt, max_tokens=8)
                alone[plan].append(_right(answer.text, second.answer))
                for selection in SELECTIONS:
                    chat = session.chat(first.image, selection=selection)
                    chat.ask(first.prompt, max_tokens=8)
                    answer = chat.ask(second.prompt, max_tokens=8)
                    right[plan, selection].append(_right(answer.text, second.answer))
                    times[plan, selection].append(answer.timings.first_token_ms)
    rows = [
        {
            "plan": plan,
            "selection": selection,
            "pairs": len(turns),
            "second": mean(right[plan, selection]),
            "asked_alone": mean(alone[plan]),
            **{f"{name}_ms": ms for name, ms in spread(times[plan, selection]).items()},
        }
        for plan, selection in ways
    ]
    save("chat-demo", rows, dry=dry)


def _right(answer: str, wanted: str) -> bool:
    return normalise_answer(answer) == normalise_answer(wanted)


if __name__ == "__main__":
    main()
