"""Tables of the README and docs, generated from the records in ``results/``.

    python -m visistage.bench.tables            write them
    python -m visistage.bench.tables --check    fail when a page differs from its records

A table stands between ``<!-- NAME -->`` and ``<!-- /NAME -->``.
"""

from __future__ import annotations

import json
import re
import sys
from pathlib import Path

import click

from . import speed_tables
from .record import RESULTS

ROOT = Path(__file__).resolve().parent.parent
PAGES = (
    ROOT / "README.md",
    *(
        ROOT / "docs" / name
        for name in (
            "benchmarks.md",
            "cpu.md",
            "demo.md",
            "size.md",
            "openvino.md",
            "quantisation.md",
        )
    ),
)
README_PLANS = (
    "without the picture",
    "dense",
    "visipruner",
    "visipruner:keep=1",
    "visipruner:t=2,keep=16",
    "visipruner:t=2,keep=1",
    "visipruner:t=1,keep=1",
    "visipruner-code",
    "visipruner-paper",
    "visipruner-adaptive",
    "visipruner-adaptive:cosine=0.95,exit_cosine=0.95",
    "fastv",
    "pyramiddrop",
)


def _record(name: str) -> dict:
    return json.loads((RESULTS / f"{name}.json").read_text())


def _table(header: list[str], rows: list[list[str]]) -> str:
    rule = ["---", *("---:" for _ in header[1:])]
    return "\n".join("| " + " | ".join(row) + " |" for row in [header, rule, *rows])


def _percent(value: float | None) -> str:
    return "" if value is None else f"{100 * value:.1f} %"


def _saved(row: dict, name: str) -> str:
    return f"{row[name]:.2f} %" if name in row else ""


def _mean(row: dict, name: str) -> str:
    """A mean over the questions; a whole number where the plan fixes it."""
    value = row.get(name)
    return (
        ""
        if value is None
        else f"{value:.0f}"
        if row.get("kind", "static") == "static"
        else f"{value:.2f}"
    )


def accuracy(plans: tuple[str, ...] | None = None) -> str:
    """One row a plan: what it keeps, what it saves, how often it is right."""
    record, timing = _record("accuracy-demo"), _record("first-token-demo")
    first_ms = {row["plan"]: f"{row['p10_ms']:.1f} ms" for row in timing["rows"]}
    rows = [
        [
            f"`{row['plan']}`" if "trigger" in row else row["plan"],
            *(_mean(row, name) for name in ("trigger", "keep", "exit")),
            _percent(row["accuracy"]),
            _percent(row.get("agreement")),
            first_ms.get(row["plan"], ""),
            f"{row['visual_flops'] / 1e6:.0f} M" if "visual_flops" in row else "",
            _saved(row, "visual_macs_saved_percent"),
            f"{row['visual_kv_bytes'] / 1024:.0f} KiB" if "visual_kv_bytes" in row else "",
            _saved(row, "visual_kv_saved_percent"),
        ]
        for row in record["rows"]
        if plans is None or row["plan"] in plans
    ]
    header = ["plan", "t", "K", "e", "accuracy", "= dense", "TTFT", "visual FLOPs", "saved"]
    header += ["visual KV", "saved"]
    return f"{_table(header, rows)}\n\n{_origin(record)}; TTFT: {_origin(timing)}"


def exactness() -> str:
    """How often adaptive plans did what the exact one does."""
    record = _record("accuracy-demo")
    columns = {
        "answer": "same answer",
        "trigger": "same t",
        "kept": "same tokens kept",
        "exit": "same e",
        "undeviating": "nothing late or padded",
    }
    rows = [
        [f"`{row['plan']}`", *(_percent(row["exact"][name]) for name in columns)]
        for row in record["rows"]
        if "exact" in row
    ]
    return f"{_table(['plan', *columns.values()], rows)}\n\n{_origin(record)}"


def by_type() -> str:
    """Accuracy by type of question."""
    record = _record("accuracy-demo")
    types = sorted(record["rows"][0]["by_type"])

    def share(value) -> float:
        return value["right"] / value["total"] if isinstance(value, dict) else value

    rows = [
        [row["plan"], *(_percent(share(row["by_type"][name])) for name in types)]
        for row in record["rows"]
    ]
    return f"{_table(['plan', *types], rows)}\n\n{_origin(record)}"


def size() -> str:
    """Every recorded build, step by step."""
    parts = []
    for file in sorted(RESULTS.glob("size-*.json")):
        record = json.loads(file.read_text())
        for row in record["rows"]:
            steps = [
                [s["step"], f"{s['seconds']:.1f}", f"{s['bytes']:,}", f"{s['peak_mib']:,}"]
                for s in row["steps"]
            ]
            nbytes = row["bundle_bytes"] + row.get("engine_bytes", 0)
            total = ["**all**", f"{row['seconds']:.1f}", f"{nbytes:,}"]
            steps.append([*total, f"{row['peak_mib']:,}"])
            title = f"### {row['model']}, {row['plan']}, {row['target']}"
            table = _table(["step", "seconds", "bytes", "peak MiB"], steps)
            parts.append(f"{title}\n\n{table}\n\n{_origin(record)}")
    return "\n\n".join(parts)


def quantisation() -> str:
    """Every bundle of the demo: how it is rounded, how often it is right, how fast it is."""
    record = _record("quantisation-demo")
    dense = record["rows"][0]
    rows = [
        [
            f"`{row['plan']}`",
            f"`{row['precision']}`",
            row["ranges"] if "int8" in row["precision"] else "",
            _percent(row["accuracy"]),
            _percent(row["agreement"]),
            f"{row['weight_bytes'] / 2**20:.1f} MiB",
            f"{row['first_token_p10_ms']:.1f} ms",
            f"{dense['first_token_p10_ms'] / row['first_token_p10_ms']:.2f}x",
            f"{row['per_token_p10_ms']:.2f} ms",
        ]
        for row in record["rows"]
    ]
    header = ["plan", "precision", "ranges of", "accuracy", "= dense FP32", "weights", "TTFT"]
    return f"{_table([*header, 'faster', 'a token'], rows)}\n\n{_origin(record)}"


def peers(model: str) -> str:
    """One checkpoint, everyone; the goals, and who was not measured to the end."""
    name = f"peers-{model}"
    if not (RESULTS / f"{name}.json").exists():
        return f"Not recorded: `python -m visistage.bench.peers --model {model}`"
    record = _record(name)
    first, *rows = record["rows"]
    parts = [_table(*speed_tables.peers(rows)), _table(*speed_tables.goals(rows))]
    parts += _failures(rows)
    parts.append(
        f"{first['rounds']} rounds, {first['threads']} threads, answers of {first['tokens']} tokens"
        f" to {first['prompt_tokens']:.0f} (mean); floors: {speed_tables.rates([first])}"
    )
    return "\n\n".join([*parts, _origin(record)])


def scaling(geometry: str = "llava-45m") -> str:
    """Every sweep, and how far presets come towards the roofline."""
    name = f"scaling-{geometry}"
    if not (RESULTS / f"{name}.json").exists():
        return f"Not recorded: `python -m visistage.bench.scaling --geometry {geometry}`"
    record = _record(name)
    first, *rows = record["rows"]
    parts = []
    for sweep, (axis, title) in speed_tables.SWEEPS.items():
        header, cells = speed_tables.sweep(rows, sweep, axis)
        if cells:
            parts.append(f"### {title}\n\n{_table(header, cells)}")
    header, cells = speed_tables.presets(rows)
    if cells:
        parts.append(f"### Presets beside the roofline\n\n{_table(header, cells)}")
    parts += _failures(rows)
    parts.append(f"{first['repeats']} repetitions, {first['threads']} threads; roofline: ")
    parts[-1] += speed_tables.rates([first])
    return "\n\n".join([*parts, _origin(record)])


def back_ends(model: str) -> str:
    """OpenVINO beside ONNX Runtime."""
    name = f"back-ends-{model}"
    if not (RESULTS / f"{name}.json").exists():
        return f"Not recorded: `python -m visistage.bench.back_ends --model {model}`"
    record = _record(name)
    rows = [
        [
            f"`{row['plan']}`, {row['precision']}",
            f"`{row['target']}`",
            *(f"{row[f'{time}_ms']:.1f} ms" for time in ("cold", "again", "per_token")),
        ]
        for row in record["rows"]
    ]
    header = ["plan", "target", "cold, first token", "second question", "per token"]
    first = record["rows"][0]
    rounds = f"{first['rounds']} rounds, OpenVINO {first['openvino']}"
    return f"{_table(header, rows)}\n\n{_origin(record)}; {rounds}"


def _failures(rows: list[dict]) -> list[str]:
    """A paragraph on what was not measured to the end, if anything."""
    failed = speed_tables.failures(rows)
    if not failed:
        return []
    return ["\n".join(["Not measured to the end:", "", *(f"* {one}" for one in failed)])]


def _origin(record: dict, library: str = "onnxruntime") -> str:
    device, versions = record["device"], record["versions"]
    return (
        f"`{record['command']}`, {record['date']}, {device['processor']}, {device['cores']} cores, "
        f"{library} {versions[library]}"
    )


TABLES = {
    "accuracy": lambda: accuracy(README_PLANS),
    "accuracy-all": accuracy,
    "accuracy-by-type": by_type,
    "accuracy-exactness": exactness,
    "size": size,
    "quantisation": quantisation,
    "peers-llava-45m": lambda: peers("llava-45m"),
    "peers-demo": lambda: peers("demo"),
    "scaling": scaling,
    "back-ends-llava-45m": lambda: back_ends("llava-45m"),
    "back-ends-demo": lambda: back_ends("demo"),
}


def filled(page: str) -> str:
    """``page`` with every table between its marks made anew."""
    for name, make in TABLES.items():
        pattern = re.compile(rf"(<!-- {name} -->\n).*?(<!-- /{name} -->)", re.DOTALL)
        if pattern.search(page):
            text = make()
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
