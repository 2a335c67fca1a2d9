"""Tables of other libraries beside ours, and of the goals that are about them."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from .cells import Columns, Row, cell, percent, table

PEERS: Columns = (
    ("peer", cell("label")),
    ("cold TTFT, ms", cell("cold.median", ".1f")),
    ("lower bound", cell("floor.cold", ".1f")),
    ("second question, ms", cell("second.median", ".1f")),
    ("lower bound", cell("floor.second", ".1f")),
    ("per token, ms", cell("per_token.median", ".2f")),
    ("lower bound", cell("floor.per_token", ".2f")),
    ("= transformers", percent("agreement.leading")),
    ("peak MiB", cell("peak_mib", ",.0f")),
    ("load, s", lambda row: f"{(row['import_ms'] + row['load_ms']) / 1e3:.1f}"),
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
    """A figure of ours over the best of theirs: at most ``limit``; both name beginnings of keys."""

    measure: str
    figure: str
    ours: str
    theirs: tuple[str, ...]
    limit: float


F32, ANY = ("openvino-fp32-f32",), ("openvino-",)
CHOSEN = "visistage-scope-few-"
"""The plan that goals are about: at its share of the tokens `demo-576` loses half a point."""

GOALS = (
    Goal("cold TTFT, FP32, pruned", "cold", f"{CHOSEN}fp32", F32, 0.4),
    Goal("cold TTFT, W8A8, pruned", "cold", f"{CHOSEN}int8", ANY, 0.4),
    Goal("second question, FP32", "second", f"{CHOSEN}fp32", F32, 0.28),
    Goal("second question, W8A8", "second", f"{CHOSEN}int8", ANY, 0.22),
    Goal("ms per token, FP32", "per_token", f"{CHOSEN}fp32", F32, 1.0),
    Goal("ms per token, INT8", "per_token", f"{CHOSEN}int8", ("openvino-int8",), 1.0),
)
"""Against OpenVINO GenAI in the same run; theirs is its fastest setting among those named."""


def goals(rows: Sequence[Row]) -> list[Row]:
    """Return each goal beside the ratio that was reached, without it where a side has no answer."""
    found = []
    for goal in GOALS:
        row: Row = {"measure": goal.measure, "limit": goal.limit}
        medians = []
        for side, keys in (("ours", (goal.ours,)), ("theirs", goal.theirs)):
            fit = [r for r in rows if goal.figure in r and r["key"].startswith(keys)]
            if fit:
                best = min(fit, key=lambda r: r[goal.figure]["median"])
                medians.append(best[goal.figure]["median"])
                row[side] = f"{medians[-1]:.1f} ms, {best['label']}"
        if len(medians) == 2:
            row["ratio"] = medians[0] / medians[1]
            row["reached"] = "yes" if row["ratio"] <= goal.limit else "no"
        found.append(row)
    return found


def peers(rows: list[Row]) -> str:
    """Return the peers that answered, the goals, and which peers failed."""
    machine, *measured = rows
    facts = (
        f"{machine['rounds']} rounds, {machine['threads']} threads, answers of "
        f"{machine['tokens']} tokens to {machine['prompt_tokens']:.0f} (mean); "
        f"lower bounds: {rates(machine)}"
    )
    tables = [table(PEERS, [row for row in measured if "cold" in row])]
    if any(row["key"].startswith(CHOSEN) for row in measured):
        tables.append(table(GOAL, goals(measured)))
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
