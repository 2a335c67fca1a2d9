"""Tables of other libraries beside ours, and of the goals that are about them."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from .cells import Columns, Row, cell, percent, table

AGREEMENT = "= transformers"
PEERS: Columns = (
    ("peer", cell("label")),
    ("cold TTFT, ms", cell("cold.median", ".1f")),
    ("lower bound", cell("floor.cold", ".1f")),
    ("second question, ms", cell("second.median", ".1f")),
    ("lower bound", cell("floor.second", ".1f")),
    ("per token, ms", cell("per_token.median", ".2f")),
    ("lower bound", cell("floor.per_token", ".2f")),
    (AGREEMENT, percent("agreement.leading")),
    ("peak MiB", cell("peak_mib", ",.0f")),
    ("load, s", lambda row: f"{(row['import_ms'] + row['load_ms']) / 1e3:.1f}"),
)
FIRST: Columns = (
    ("llava-7b, weights of 8 bits", cell("label")),
    ("first token", cell("cold.median", ".1f", " s", 1e-3)),
    ("second question", cell("second.median", ".1f", " s", 1e-3)),
    ("a token", cell("per_token.median", ".0f", " ms")),
    ("peak memory", cell("peak_mib", ".1f", " GiB", 1 / 1024)),
    ("to load", lambda row: f"{(row['import_ms'] + row['load_ms']) / 1e3:.0f} s"),
)
GOAL: Columns = (
    ("measure", cell("measure")),
    ("goal", lambda row: f"at most {row['limit']:g}x"),
    ("ratio", cell("ratio", ".2f", "x")),
    ("reached", cell("reached")),
    ("ours", cell("ours")),
    ("theirs", cell("theirs")),
)


@dataclass(frozen=True)
class Goal:
    """A figure of ours over the best of theirs: at most ``limit``.

    ours: a key. theirs: beginnings of keys.
    """

    measure: str
    figure: str
    ours: str
    theirs: tuple[str, ...]
    limit: float


F32, ANY = ("openvino-fp32-f32",), ("openvino-",)
CHOSEN = "visistage-scope-few-"
"""The plan that goals are about: at its share of the tokens `demo-576` loses half a point."""

ENTERING = "visistage-scope-visipruner-"
"""The plan of a model of seven billion weights: it prunes at the encoder and inside the decoder."""

GOALS = (
    Goal("cold TTFT, FP32, pruned", "cold", f"{CHOSEN}fp32", F32, 0.4),
    Goal("cold TTFT, W8A8, pruned", "cold", f"{CHOSEN}int8", ANY, 0.4),
    Goal("second question, FP32", "second", f"{CHOSEN}fp32", F32, 0.28),
    Goal("second question, W8A8", "second", f"{CHOSEN}int8", ANY, 0.22),
    Goal("ms per token, FP32", "per_token", f"{CHOSEN}fp32", F32, 0.8),
    Goal("ms per token, INT8", "per_token", f"{CHOSEN}int8", ("openvino-int8",), 0.75),
    Goal("ms per token, INT4", "per_token", f"{CHOSEN}int8-w4", ("openvino-int4",), 0.75),
)
"""Against OpenVINO GenAI in the same run; theirs is its fastest setting among those named."""

EIGHT_BITS = ("openvino-int8", "llama.cpp-q8_0")
GOALS_OF_SEVEN_BILLION = (
    Goal("cold TTFT, 8 bits, pruned", "cold", f"{ENTERING}int8", EIGHT_BITS, 0.45),
    Goal("peak memory, 8 bits, pruned", "peak_mib", f"{ENTERING}int8", EIGHT_BITS, 1.0),
)
"""Against the best peer at eight bits, in time and in memory each."""


def goals(rows: Sequence[Row], wanted: Sequence[Goal] = GOALS) -> list[Row]:
    """Return each goal beside the ratio that was reached, without it where a side has no answer."""
    found = []
    for goal in wanted:
        row: Row = {"measure": goal.measure, "limit": goal.limit}
        best = []
        answered = [r for r in rows if goal.figure in r]
        ours = [r for r in answered if r["key"] == goal.ours]
        theirs = [r for r in answered if r["key"].startswith(goal.theirs)]
        for side, fit in (("ours", ours), ("theirs", theirs)):
            if fit:
                value, label = min((figure(r, goal.figure), r["label"]) for r in fit)
                best.append(value)
                unit = "MiB" if goal.figure == "peak_mib" else "ms"
                row[side] = f"{value:,.1f} {unit}, {label}"
        if len(best) == 2:
            row["ratio"] = best[0] / best[1]
            row["reached"] = "yes" if row["ratio"] <= goal.limit else "no"
        found.append(row)
    return found


def figure(row: Row, name: str) -> float:
    """Return a figure of a peer, the median where it has a spread."""
    value = row[name]
    return value["median"] if isinstance(value, dict) else value


def first(rows: list[Row]) -> str:
    """Return the README's table: peers at eight bits beside the same model here."""
    keys = (*EIGHT_BITS, "visistage-dense-int8", f"{ENTERING}int8")
    return table(FIRST, [r for r in rows[1:] if "cold" in r and r["key"].startswith(keys)])


def peers(rows: list[Row]) -> str:
    """Return the peers that answered, the goals, and which peers failed."""
    machine, *measured = rows
    facts = (
        f"{machine['rounds']} rounds, {machine['threads']} threads, answers of "
        f"{machine['tokens']} tokens to {machine['prompt_tokens']:.0f} (mean); "
        f"lower bounds: {rates(machine)}"
    )
    answered = [row for row in measured if "cold" in row]
    compared = any("agreement" in row for row in answered)
    columns = [column for column in PEERS if compared or column[0] != AGREEMENT]
    tables = [table(columns, answered)]
    wanted = GOALS_OF_SEVEN_BILLION if machine.get("model") == "llava-7b" else GOALS
    reached = [row for row in goals(measured, wanted) if "ours" in row]
    if reached:
        tables.append(table(GOAL, reached))
    return "\n\n".join([*tables, *failures(measured), facts])


def failures(rows: Iterable[Row]) -> list[str]:
    """Return a paragraph on what was not measured to the end, if anything."""
    failed = [f"* {row['label']}: {row['failed']}" for row in rows if "failed" in row]
    return ["\n".join(["Not measured to the end:", "", *failed])] if failed else []


def rates(machine: Row) -> str:
    """Return what the lower bounds are computed from."""
    measured = machine["rates"]
    each = [f"{value / 1e9:.0f} G{kind}" for kind, value in measured["operations"].items()]
    return f"{', '.join(each)} operations and {measured['bandwidth'] / 1e9:.1f} GB a second"
