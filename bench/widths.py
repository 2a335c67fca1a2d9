"""What integers and a pruned plan are worth together, by the width of the model.

    python -m visistage.bench.widths [--rounds 10] [--threads 2]

Models of LLaVA's proportions with random weights, 576 visual tokens and ``visipruner`` as it comes;
the bundles of one model take turns on pictures and questions that none has seen, tower and
preprocessing included.
"""

from __future__ import annotations

from contextlib import ExitStack
from dataclasses import dataclass, replace
from math import prod
from statistics import median

import click

from ..calib.plan_search.measure_plans import Origin
from ..compile.checkpoint.checkpoint import open_checkpoint
from ..compile.checkpoint.dummy import make_dummy
from ..compile.checkpoint.known_models import KnownModel
from ..demo.heldout import held_out
from ..runtime import load
from .environments import ROOT
from .fit import with_decoder
from .peer_models import PeerCheckpoint, bundle
from .record import save

NAME = "widths-cpu"
SERIES = 3000
BUNDLES = (("dense", "fp32"), ("visipruner", "fp32"), ("dense", "int8"), ("visipruner", "int8"))


@dataclass(frozen=True)
class Width:
    """A decoder of ``layers`` layers of ``hidden``, a tower of ``tower_layers`` of ``tower``."""

    layers: int
    hidden: int
    intermediate: int
    tower_layers: int
    tower: int

    @property
    def name(self) -> str:
        """Of the checkpoint's folder."""
        return f"width-{self.hidden}"

    def geometry(self) -> KnownModel:
        """llava-45m with these sizes; heads of 64."""
        base = with_decoder(self.layers, self.hidden, self.intermediate)
        vision = {
            **base.config["vision_config"],
            "num_hidden_layers": self.tower_layers,
            "hidden_size": self.tower,
            "intermediate_size": 4 * self.tower,
            "num_attention_heads": self.tower // 64,
        }
        return replace(base, config={**base.config, "vision_config": vision})


WIDTHS = (
    Width(12, 256, 688, 6, 128),
    Width(12, 512, 1376, 6, 256),
    Width(16, 1024, 2752, 12, 512),
    Width(22, 2048, 5632, 24, 1024),
)


@click.command()
@click.option("--rounds", type=click.IntRange(2), default=10, show_default=True)
@click.option("--threads", type=click.IntRange(1), default=2, show_default=True)
@click.option("--widths", default=",".join(str(w.hidden) for w in WIDTHS), show_default=True)
@click.option("--dry", is_flag=True, help="Print the rows and leave the record alone.")
def main(rounds: int, threads: int, widths: str, dry: bool) -> None:
    """Build, ask in turns, record."""
    wanted = widths.split(",")
    rows = []
    for width in WIDTHS:
        if str(width.hidden) in wanted:
            rows += _measured(width, rounds, threads)
            click.echo(rows[-len(BUNDLES) :], err=True)
    if not dry:
        command = f"python -m visistage.bench.widths --rounds {rounds} --threads {threads}"
        save(NAME, command, rows)


def _measured(width: Width, rounds: int, threads: int) -> list[dict]:
    path = make_dummy(width.name, ROOT / "dummy" / width.name, known_model=width.geometry())
    checkpoint = open_checkpoint(str(path))
    subject = PeerCheckpoint(Origin(str(path)), checkpoint)
    taken: dict[tuple[str, str], list[tuple[float, float]]] = {one: [] for one in BUNDLES}
    with ExitStack() as stack:
        sessions = {
            (plan, precision): stack.enter_context(
                load(bundle(subject, plan, precision, "cpu"), threads=threads)
            )
            for plan, precision in BUNDLES
        }
        for session in sessions.values():
            session.eos = frozenset()
        for scene in held_out(1 + rounds, SERIES, subject.side):
            for one, session in sessions.items():
                timings = session.infer(scene.image, scene.question, max_tokens=8).timings
                assert timings.per_token_ms is not None
                taken[one].append((timings.first_token_ms, timings.per_token_ms))
    rows = []
    for (plan, precision), times in taken.items():
        first, later = (sorted(column) for column in zip(*times[1:], strict=True))
        rows.append(
            {
                "hidden": width.hidden,
                "layers": width.layers,
                "parameters": sum(prod(tensor.shape) for tensor in checkpoint.tensors.values()),
                "plan": plan,
                "precision": precision,
                "first_token_median_ms": median(first),
                "first_token_least_ms": first[0],
                "per_token_median_ms": median(later),
            }
        )
    return rows


if __name__ == "__main__":
    main()
