"""Tables of the README and docs, generated from the records in ``results/``.

    python -m visistage.bench.tables            write them
    python -m visistage.bench.tables --check    fail when a page differs from its records

A table is between ``<!-- NAME -->`` and ``<!-- /NAME -->``. What a record lacks stays empty: peers
fail, and the reason follows the table.
"""

from __future__ import annotations

import json
import re
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import click

from ..compile.matched_bundles import STOCK
from ..tools.compare.compare_facts import at_target, targets
from .cells import Cell, Columns, Row, cell, code, mean_of, percent, table
from .peer_tables import failures, first, peers, rates
from .record import RESULTS

ROOT = Path(__file__).resolve().parent.parent
DOCS = (
    "benchmarks",
    "chat",
    "compare",
    "cpu",
    "demo",
    "methods",
    "size",
    "openvino",
    "quantisation",
)
PAGES = (
    ROOT / "README.md",
    ROOT / "demo" / "README.md",
    *(ROOT / "docs" / f"{name}.md" for name in DOCS),
    ROOT / "docs" / "serving.md",
)
CARD_PLANS = ("without the picture", "dense", "visipruner")
README_PLANS = (
    "without the picture",
    "dense",
    "scope:keep=16",
    "visipruner",
    "visipruner:entry=scope-32",
    "fastv",
    "random:keep=16",
)

# --- the demo model -------------------------------------------------------------------------------

ACCURACY: Columns = (
    ("plan", lambda row: f"`{row['plan']}`" if "trigger" in row else row["plan"]),
    ("t", mean_of("trigger")),
    ("K", mean_of("keep")),
    ("e", mean_of("exit")),
    ("accuracy", percent("accuracy")),
    ("= dense", percent("agreement")),
    ("TTFT", cell("first_token_ms", ".1f", " ms")),
    ("visual FLOPs", cell("visual_flops", ".0f", " M", 1e-6)),
    ("saved", cell("visual_macs_saved_percent", ".2f", " %")),
    ("visual KV", cell("visual_kv_bytes", ".0f", " KiB", 1 / 1024)),
    ("saved", cell("visual_kv_saved_percent", ".2f", " %")),
)
EXACTNESS: Columns = (
    ("plan", code("plan")),
    ("same answer", percent("exact.answer")),
    ("same t", percent("exact.trigger")),
    ("same tokens kept", percent("exact.kept")),
    ("same e", percent("exact.exit")),
    ("nothing late or padded", percent("exact.undeviating")),
)
QUANTISATION: Columns = (
    ("plan", code("plan")),
    ("precision", code("precision")),
    ("ranges of", lambda row: row["ranges"] if "int8" in row["precision"] else ""),
    ("accuracy", percent("accuracy")),
    ("= dense FP32", percent("agreement")),
    ("weights", cell("weight_bytes", ".1f", " MiB", 2**-20)),
    ("TTFT", cell("first_token_p10_ms", ".1f", " ms")),
    ("faster", cell("faster", ".2f", "x")),
    ("a token", cell("per_token_p10_ms", ".2f", " ms")),
)
STEPS: Columns = (
    ("step", cell("step")),
    ("seconds", cell("seconds", ".1f")),
    ("bytes", cell("bytes", ",")),
    ("peak MiB", cell("peak_mib", ",")),
)
BACK_ENDS: Columns = (
    ("plan", code("plan", "precision")),
    ("target", code("target")),
    ("cold, first token", cell("cold_ms", ".1f", " ms")),
    ("second question", cell("again_ms", ".1f", " ms")),
    ("per token", cell("per_token_ms", ".1f", " ms")),
)


def untimed(rows: list[Row]) -> str:
    """Return the table of accuracies and savings of a series whose first tokens are not timed."""
    return table([column for column in ACCURACY if column[0] != "TTFT"], rows)


def accuracy(rows: list[Row], plans: Sequence[str] | None = None) -> str:
    """Return the table of accuracies and savings, beside the times of the other record."""
    first_ms = {row["plan"]: row["p10_ms"] for row in _record("first-token-demo")["rows"]}
    shown = [row for row in rows if plans is None or row["plan"] in plans]
    return table(ACCURACY, [{**row, "first_token_ms": first_ms.get(row["plan"])} for row in shown])


def by_type(rows: list[Row]) -> str:
    """Return the table of accuracies by type of question."""

    def share(name: str) -> Cell:
        def text(row: Row) -> str:
            tally = row["by_type"][name]
            value = tally["right"] / tally["total"] if isinstance(tally, dict) else tally
            return percent("share")({"share": value})

        return text

    types = [(name, share(name)) for name in sorted(rows[0]["by_type"])]
    return table((("plan", cell("plan")), ("all", percent("accuracy")), *types), rows)


def quantisation(rows: list[Row]) -> str:
    """Return the table of the demo's bundles, the dense FP32 one first."""
    dense = rows[0]["first_token_p10_ms"]
    return table(QUANTISATION, [r | {"faster": dense / r["first_token_p10_ms"]} for r in rows])


def size(rows: list[Row]) -> str:
    """Return the steps of one recorded build, and their sum."""
    (row,) = rows
    total = {**row, "step": "**all**", "bytes": row["bundle_bytes"] + row.get("engine_bytes", 0)}
    title = f"### {row['model']}, {row['plan']}, {row['target']}"
    return f"{title}\n\n{table(STEPS, [*row['steps'], total])}"


# --- peers ----------------------------------------------------------------------------------------

# --- methods at the same cost ---------------------------------------------------------------------

COMPARED: Columns = (
    ("plan", lambda row: f"`{row['plan']}`{' (control)' if row['control'] else ''}"),
    ("visual FLOPs", percent("visual_flops_share")),
    ("accuracy", percent("accuracy.share")),
    ("95 %", lambda row: "{low:.1f}–{high:.1f}".format(**_hundredfold(row["accuracy"]))),
    ("reading", percent("by_type.reading.share")),
    ("yes/no", percent("by_type.yes/no.share")),
    ("= dense", percent("agreement.share")),
    ("second question right", percent("second.accuracy.share")),
    ("first token", cell("first_token_ms.median", ".1f", " ms")),
    ("second question", cell("second_question_ms.median", ".1f", " ms")),
    ("later token", cell("per_token_ms.median", ".2f", " ms")),
    ("visual KV", cell("visual_kv_bytes", ".0f", " KiB", 1 / 1024)),
)


TRAINED: Columns = (
    ("method", cell("method")),
    ("plan", code("plan")),
    ("weights", lambda row: f"**{row['weights']}**" if row["weights"] != STOCK else STOCK),
    ("visual FLOPs", percent("visual_flops_share")),
    ("accuracy", percent("accuracy")),
    (
        "95 %",
        lambda row: "{low:.1f}–{high:.1f}".format(
            **_hundredfold({k: row[k] for k in ("low", "high")})
        ),
    ),
    ("= dense", percent("agreement")),
)


def trained(rows: list[Row]) -> str:
    """Return accuracies with the demo's own weights and with those trained for a method."""
    kinds = [(kind, percent(f"by_type.{kind}")) for kind in rows[0]["by_type"]]
    return table((*TRAINED, *kinds), rows)


def compared(rows: list[Row]) -> str:
    """Return what was found first, the plot, and the plans by cost, the most accurate first."""
    about, dense, *_ = rows
    shown = [row for target in targets(rows[1:]) for row in at_target(rows[1:], target)]
    asked = f"{about['samples']} images, {about['second_questions']} with a second question"
    rounds = (
        f"{about['settings']['repetitions']} repetitions, {about['machine']['threads']} threads"
    )
    left_out = [f"* left out: {reason}" for reason in about["left_out"]]
    picture = f"![Accuracy of every method at each cost](compare-{about['series']}.svg)"
    parts = [
        *about["findings"],
        picture,
        "Of each method the least share of the visual FLOPs is drawn on top; controls are open.",
        table(COMPARED, [dense, *shown]),
        *left_out,
        f"{asked}; {rounds}",
    ]
    return "\n\n".join(parts)


def compared_kinds(rows: list[Row]) -> str:
    """Return the accuracy of every plan by kind of question."""
    kinds = [(kind, percent(f"by_type.{kind}.share")) for kind in rows[1]["by_type"]]
    shown = [row for target in targets(rows[1:]) for row in at_target(rows[1:], target)]
    return table((("plan", code("plan")), *kinds), [rows[1], *shown])


def _hundredfold(share: Row) -> Row:
    return {name: 100 * value for name, value in share.items()}


# --- scaling --------------------------------------------------------------------------------------

SWEEPS = {
    "visual": ("side", "Visual tokens, by the size of the picture in pixels"),
    "images": ("images", "Visual tokens, by pictures of 576 in a prompt"),
    "text": ("words added", "Length of the question"),
    "batch": ("prompts", "Prompts at once, all of them together"),
    "questions": ("questions", "Questions about one picture, the mean of them"),
    "slots": ("slots", "Room in the caches"),
}
"""Sweep -> its axis and the table's title."""

POINTS: Columns = (
    ("plan", cell("plan")),
    ("prompt rows", cell("prompt_rows", ",")),
    ("TTFT, ms", cell("first_ms.median", ".1f")),
    ("p90", cell("first_ms.p90", ".1f")),
    ("per token, ms", cell("per_token_ms.median", ".2f")),
    ("peak MiB", cell("peak_mib", ",.0f")),
)
PRESETS: Columns = (
    ("preset", code("plan")),
    ("prefill, ms", cell("prefill_ms.median", ".1f")),
    ("speed-up", cell("speedup", ".2f", "x")),
    ("predicted", cell("predicted", ".2f", "x")),
    ("reached", cell("reached", ".0f", " %", 100)),
)


def scaling(rows: list[Row]) -> str:
    """Return every sweep, and the presets beside the roofline."""
    machine, *measured = rows
    kinds = {
        name: (f"### {title}", ((axis, cell("value", ",")), *POINTS))
        for name, (axis, title) in SWEEPS.items()
    }
    kinds["presets"] = ("### Presets beside the roofline", PRESETS)
    parts = []
    for name, (title, columns) in kinds.items():
        shown = [row for row in measured if row["sweep"] == name and "failed" not in row]
        if shown:
            parts += [title, table(columns, shown)]
    facts = f"{machine['repeats']} repetitions, {machine['threads']} threads"
    return "\n\n".join([*parts, *failures(measured), f"{facts}; roofline: {rates(machine)}"])


# --- pages ----------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Table:
    """A table of a page.

    Attributes:
        record: name of its record, or a pattern of several.
        make: text of a record's rows.
        note: what follows the record's origin.
        command: of ``visistage.bench`` that writes the record.
    """

    record: str
    make: Callable[[list[Row]], str]
    note: Callable[[list[Row]], str] = lambda rows: ""
    command: str = ""

    def text(self) -> str:
        """Return what belongs between the marks."""
        names = sorted(file.stem for file in RESULTS.glob(f"{self.record}.json"))
        records = [_record(name) for name in names]
        if not records:
            return f"Not recorded: `python -m visistage.bench.{self.command}`"
        return "\n\n".join(
            f"{self.make(record['rows'])}\n\n{_origin(record)}{self.note(record['rows'])}"
            for record in records
        )


def _record(name: str) -> Row:
    return json.loads((RESULTS / f"{name}.json").read_text())


def _origin(record: Row) -> str:
    device, versions = record["device"], record["versions"]
    return (
        f"`{record['command']}`, {record['date']}, {device['processor']}, {device['cores']} cores, "
        f"onnxruntime {versions['onnxruntime']}"
    )


def _timed(rows: list[Row]) -> str:
    return f"; TTFT: {_origin(_record('first-token-demo'))}"


def _openvino(rows: list[Row]) -> str:
    return f"; {rows[0]['rounds']} rounds, OpenVINO {rows[0]['openvino']}"


CHAT: Columns = (
    ("plan", code("plan")),
    ("visual tokens", cell("selection")),
    ("second answer", percent("second")),
    ("asked alone", percent("asked_alone")),
    ("its first token", cell("median_ms", ".1f", " ms")),
)

SERVING: Columns = (
    ("engine", cell("label")),
    ("answers a second, alone", cell("callers_1.answers_a_second", ".2f")),
    ("8 callers", cell("callers_8.answers_a_second", ".2f")),
    ("first token, alone, median", cell("callers_1.first_ms.p50", ".0f", " ms")),
    ("8 callers, median", cell("callers_8.first_ms.p50", ".0f", " ms")),
    ("95 %", cell("callers_8.first_ms.p95", ".0f", " ms")),
    ("as alone", percent("callers_8.as_alone")),
)

LANES: Columns = (
    ("precision", cell("precision")),
    ("answers at once", cell("answers")),
    ("a step", cell("step_ms", ".2f", " ms")),
    ("tokens a second", cell("tokens_a_second", ".0f")),
    ("times one answer", cell("speedup", ".2f", "x")),
    ("lower bound", cell("bound_ms", ".2f", " ms")),
    ("reached", cell("bound_share", ".0f", " %", 100)),
)

TABLES = {
    "lanes": Table("lanes-llava-45m", lambda rows: table(LANES, rows[1:]), command="lanes"),
    "serving": Table("serving-llava-45m", lambda rows: table(SERVING, rows[1:]), command="serving"),
    "chat": Table("chat-demo", lambda rows: table(CHAT, rows), command="chat"),
    "accuracy": Table("accuracy-demo", lambda rows: accuracy(rows, README_PLANS), _timed),
    "accuracy-all": Table("accuracy-demo", accuracy, _timed),
    "accuracy-by-type": Table("accuracy-demo", by_type),
    "accuracy-exactness": Table(
        "accuracy-demo", lambda rows: table(EXACTNESS, [row for row in rows if "exact" in row])
    ),
    "size": Table("size-*", size),
    "quantisation": Table("quantisation-demo", quantisation),
    "trained": Table("trained-demo", trained, command="trained"),
    "scaling": Table("scaling-llava-45m", scaling, command="scaling"),
}
for _series in ("demo", "demo-576", "easy-vqa"):
    TABLES[f"card-{_series}"] = Table(
        f"accuracy-{_series}", lambda rows: by_type([r for r in rows if r["plan"] in CARD_PLANS])
    )
for _series in ("demo-576", "easy-vqa"):
    _command = f"accuracy --series {_series}"
    TABLES[f"accuracy-{_series}"] = Table(f"accuracy-{_series}", untimed, command=_command)
    TABLES[f"accuracy-{_series}-kinds"] = Table(f"accuracy-{_series}", by_type, command=_command)
for _series in ("demo", "demo-576", "easy-vqa"):
    TABLES[f"compare-{_series}"] = Table(
        f"compare-{_series}", compared, command=f"compare --series {_series}"
    )
    TABLES[f"compare-{_series}-kinds"] = Table(
        f"compare-{_series}", compared_kinds, command=f"compare --series {_series}"
    )
TABLES["peers-first"] = Table("peers-llava-7b", first, command="peers --model llava-7b")
for _model in ("llava-45m", "demo", "qwen2.5-vl-50m", "llava-7b"):
    TABLES[f"peers-{_model}"] = Table(f"peers-{_model}", peers, command=f"peers --model {_model}")
for _model in ("llava-45m", "demo"):
    TABLES[f"back-ends-{_model}"] = Table(
        f"back-ends-{_model}",
        lambda rows: table(BACK_ENDS, rows),
        _openvino,
        f"back_ends --model {_model}",
    )


def filled(page: str) -> str:
    """Return ``page`` with every table between its marks made anew."""
    for name, described in TABLES.items():
        pattern = re.compile(rf"(<!-- {name} -->\n).*?(<!-- /{name} -->)", re.DOTALL)
        if pattern.search(page):
            text = described.text()
            page = pattern.sub(lambda found, text=text: f"{found[1]}{text}\n{found[2]}", page)
    return page


@click.command()
@click.option("--check", is_flag=True, help="Change nothing, fail on a difference.")
def main(check: bool) -> None:
    """Write the tables."""
    stale = []
    for page in PAGES:
        text = page.read_text()
        if filled(text) != text:
            stale.append(page.name)
            if not check:
                page.write_text(filled(text))
    if check and stale:
        sys.exit(f"{', '.join(stale)} differ from bench/results: python -m visistage.bench.tables")


if __name__ == "__main__":
    main()
