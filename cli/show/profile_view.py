"""A profile on the terminal: where the time went, beside another bundle and beside the roofline."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from rich.console import Group, RenderableType
from rich.progress import BarColumn, Progress, TextColumn
from rich.table import Table
from rich.text import Text

from ...graphs.progress import Progress as StepProgress
from ...pages.units import flops, show_bytes
from ...tools.profile.machine import machine_line
from ...tools.profile.profile_facts import label, row_names
from .output import console, silent

COLUMNS = ("median", "p90", "p99")
TOP_LAYERS = 5


@contextmanager
def profiling_bar() -> Iterator[StepProgress]:
    """Show a bar on stderr that names what is measured; nothing where there is no terminal."""
    shown = console(err=True)
    columns = (TextColumn("{task.description}"), BarColumn())
    with Progress(*columns, console=shown, transient=True, disable=silent(shown)) as bar:
        task = bar.add_task("load", total=None)

        class Shown(StepProgress):
            def start(self, step: str, total: int | None = None) -> None:
                bar.update(task, description=step, completed=0, total=total)

            def advance(self, units: int = 1) -> None:
                bar.advance(task, units)

        yield Shown()


def profile_table(facts: dict[str, Any]) -> RenderableType:
    """Everything but the commands."""
    return Group(
        *(Text(finding, style="bold red") for finding in facts["findings"]),
        _head(facts),
        _times(facts),
        *([_roofline(facts)] if facts["peaks"] else []),
        *_operators(facts),
        *_polygraphy(facts["polygraphy"]),
        *(Text(line) for line in closing_lines(facts)),
    )


def closing_lines(facts: dict[str, Any]) -> list[str]:
    """Summarise the numbers, and name what is missing with its reason."""
    plan, top = facts["runs"]["plan"], facts["dominant"]
    lines = [
        f"most of the first token is {top['part']}: {_ms(top['ms'])}, {_percent(top['share'])}"
    ]
    host, token = plan["cold"]["step.host"]["median"], plan["cold"]["per_token"]["median"]
    lines.append(f"host overhead of a later token: {_ms(host)}, {_percent(host / token)} of it")
    up = facts["speed_up"]
    if up:
        against = facts["runs"]["against"]["name"]
        lines.append(
            f"{plan['name']} against {against}: first token {up['first_token']:.2f}x, second "
            f"question {up['second_question']:.2f}x, later token {up['per_token']:.2f}x as fast"
        )
        if "prefill" in up:
            lines.append(
                f"decoder prefill {up['prefill']:.2f}x, the roofline promises "
                f"{up['prefill_promised']:.2f}x: {_percent(up['prefill_share'])} of that"
            )
    elif facts["how_to_compare"]:
        lines.append(f"nothing to compare with; build it: {facts['how_to_compare']}")
    lines += _answer_lines(facts)
    if facts["beaten"]:
        lines.append(
            f"{', '.join(facts['beaten'])} beat the roofline: it was measured too low. Something "
            "else was running; measure again on an idle machine"
        )
    if facts["no_peaks"]:
        lines.append(f"no roofline: {facts['no_peaks']}")
    if facts["polygraphy"]["reason"]:
        lines.append(f"nothing by Polygraphy: {facts['polygraphy']['reason']}")
    lines.append(_power_line(facts))
    return lines


def _answer_lines(facts: dict[str, Any]) -> list[str]:
    """Say that pruning changed no answer, or that it is not known; a finding says that it did."""
    compared, hint = facts["answers"], facts["dense_hint"]
    if compared and not compared["changed"]:
        return [f"{compared['dense']} gives the same {compared['asked']} answers about images"]
    if hint and not facts["how_to_compare"]:
        return [f"not known whether pruning changes answers; build the unpruned model: {hint}"]
    return []


def _power_line(facts: dict[str, Any]) -> str:
    power, energy = facts["power"], facts["runs"]["plan"]["energy"]
    if power["source"] is None:
        return f"no energy: {power['reason']}"
    rails = ", ".join(f"{name} {mw / 1e3:.2f} W" for name, mw in power["rails_mw"].items())
    if energy is None:
        why = power["reason"] or (
            f"an answer is over within {power['interval_ms']:.0f} ms samples; ask for more "
            "tokens: --tokens 256"
        )
        return f"no energy per answer: {why}. Rails by {power['source']}: {rails}"
    return (
        f"{energy['answer_joules']['median']:.2f} J an answer, {energy['token_joules']:.3f} J a "
        f"token ({power['source']}: {rails})"
    )


def _head(facts: dict[str, Any]) -> Table:
    machine, settings, plan = facts["machine"], facts["settings"], facts["runs"]["plan"]
    table = Table(show_header=False, box=None, padding=(0, 2, 0, 0))
    table.add_column(style="dim")
    table.add_column()
    table.add_row("bundle", facts["bundle"])
    table.add_row("machine", machine_line(machine))
    runs = f"{settings['repetitions']} repetitions after {settings['warm_up']}, new pixels and "
    table.add_row("measured", f"{runs}words in each, {settings['tokens']} tokens an answer")
    memory, device = plan["memory"], facts["power"].get("device_memory_bytes")
    table.add_row(
        "memory",
        f"{show_bytes(memory['peak_bytes'])} at most, {show_bytes(memory['loaded_bytes'])} once "
        f"loaded in {memory['load_ms'] / 1e3:.2f} s"
        + (f"; of the device {show_bytes(device)} in use by everybody" if device else ""),
    )
    return table


def _times(facts: dict[str, Any]) -> Table:
    """Milliseconds of both bundles, cold and again."""
    runs = facts["runs"]
    table = Table("ms", *(f"{column}" for column in COLUMNS), "same image again")
    if "against" in runs:
        table.add_column(f"{runs['against']['name']}")
        table.add_column("again")
    for column in table.columns[1:]:
        column.justify = "right"
    for name in row_names(runs):
        own = runs["plan"]["cold"].get(name)
        cells = [_number(own and own[column]) for column in COLUMNS]
        for run in runs.values():
            kinds = ("cold", "again") if run is not runs["plan"] else ("again",)
            cells += [_number(run[kind].get(name, {}).get("median")) for kind in kinds]
        bold = name in ("first_token", "per_token", "total")
        table.add_row(label(name), *cells, style="bold" if bold else None)
    return table


def _roofline(facts: dict[str, Any]) -> Table:
    peaks = facts["peaks"]
    table = Table(
        "graph", "FLOPs", "bytes", "lower bound", "measured", "of the roofline", "limited by"
    )
    table.caption = (
        f"lower bound: {peaks['flops'] / 1e9:.0f} GFLOP/s and {peaks['bandwidth'] / 1e9:.1f} GB/s "
        f"(over {show_bytes(peaks['nbytes'])}), measured in this run"
    )
    for column in table.columns[1:]:
        column.justify = "right"
    for phase, title in (("prefill", "first token"), ("token", "later token")):
        table.add_section()
        for part in facts["runs"]["plan"]["roofline"][phase]:
            table.add_row(
                f"{part['graph']}, {title}",
                flops(part["flops"]),
                show_bytes(part["nbytes"]),
                _ms(part["floor_ms"]),
                _ms(part["measured_ms"]),
                _percent(part["share"]),
                part["bound"],
            )
    return table


def _operators(facts: dict[str, Any]) -> list[RenderableType]:
    """Kinds of operators and decoder layers that take most, per graph."""
    noted = facts["runs"]["plan"]["operators"]
    if noted is None:
        return []
    table = Table("graph", "phase", "operators", "layers, ms each")
    for phase, title in (("prefill", "first token"), ("decode", "later token")):
        for graph, kinds in noted[phase]["kinds"].items():
            whole = sum(kinds.values())
            most = list(kinds.items())[:TOP_LAYERS]
            shares = ", ".join(f"{kind} {_percent(ms / whole)}" for kind, ms in most if whole)
            layers = noted[phase]["layers"][graph]
            each = " ".join(f"{key}:{ms:.2f}" for key, ms in layers.items())
            table.add_row(graph, title, shares, each)
    return [table]


def _polygraphy(facts: dict[str, Any]) -> list[RenderableType]:
    """Show the times of Polygraphy's runner beside those of the runtime."""
    if not facts["runs"]:
        return []
    table = Table("graph", "rows", "slots", "median", "least", "in the runtime")
    table.title = f"by {facts['runner']} of Polygraphy {facts['version']}, ms"
    for column in table.columns[1:]:
        column.justify = "right"
    for run in facts["runs"]:
        sizes = (str(run[name] or "") for name in ("rows", "slots"))
        times = (_number(run[name]) for name in ("median", "least", "own_ms"))
        table.add_row(run["graph"], *sizes, *times)
    return [table]


def _number(value: float | None) -> str:
    return "" if value is None else f"{value:.2f}"


def _ms(value: float) -> str:
    return f"{value:.2f} ms"


def _percent(share: float) -> str:
    return f"{100 * share:.0f} %" if share >= 0.0995 else f"{100 * share:.1f} %"
