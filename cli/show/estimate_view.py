"""An estimate on the terminal: a range or a fitted figure, and on what grounds."""

from __future__ import annotations

from typing import Any

from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text

from ...pages.units import show_bytes

PHASES = {
    "tower_ms": "vision encoder and projector",
    "prefill_ms": "decoder prefill",
    "first_token_ms": "first token, new image",
    "second_question_ms": "first token, same image",
    "per_token_ms": "each later token",
}

LONG_MS = 10_000
"""From here on times are told in seconds."""


def estimate_table(facts: dict[str, Any]) -> RenderableType:
    """Tabulate times, memory and what they are based on."""
    head = Table(show_header=False, box=None, padding=(0, 2, 0, 0))
    head.add_column(style="dim")
    head.add_column()
    prompt, device, memory = facts["prompt"], facts["device"], facts["memory"]
    head.add_row("model", f"{facts['model']}, plan {facts['plan']}, {facts['precision']}")
    head.add_row(
        "prompt",
        f"{prompt['rows']} rows: {prompt['prefix']} before the image, {prompt['text']} of the "
        f"question, {prompt['tokens']} of the answer",
    )
    rate = f"{device['flops'] / 1e12:.3g} TFLOP/s" if device["flops"] else "computing unknown"
    head.add_row("device", f"{device['about']}: {rate}, {device['bandwidth'] / 1e9:.4g} GB/s")
    needed = memory["weight_bytes"] + memory["cache_bytes"]
    verdict = "fits" if memory["fits"] else "does not fit"
    with_system = " and the system" if memory["shared"] else ""
    head.add_row(
        "memory",
        f"{verdict}: {show_bytes(memory['weight_bytes'])} of weights and "
        f"{show_bytes(memory['cache_bytes'])} of cache are {show_bytes(needed)}, and "
        f"{show_bytes(memory['reserve_bytes'])} kept for activations{with_system}, of "
        f"{show_bytes(memory['device_bytes'])}",
    )
    runs = facts["estimates"]
    table = Table("estimated", *(run["plan"] for run in runs.values()))
    for column in table.columns[1:]:
        column.justify = "right"
    error = facts["efficiency"]["error"]
    for key, words in PHASES.items():
        table.add_row(words, *(show_times(run[key], error) for run in runs.values()))
    rates = (run["per_token_ms"] for run in runs.values())
    table.add_row("tokens a second", *(_per_second(rate) for rate in rates))
    return Group(head, table, *_peers(facts), *(Text(line) for line in estimate_basis(facts)))


def estimate_basis(facts: dict[str, Any]) -> list[str]:
    """On what grounds, in words; the last lines of the output."""
    known, lines = facts["efficiency"], []
    if known["fitted"]:
        one = known["ends"][0]
        lines.append(
            f"efficiency fitted on measurements ({known['origin']['date']}, "
            f"{known['origin']['device']['processor']}): {100 * one['compute']:.0f} % of the "
            f"computing peak, {100 * one['bandwidth']:.0f} % of the bandwidth, "
            f"{1e3 * one['layer_ms']:.0f} us to call a layer"
        )
        for check in known["validations"]:
            lines.append(
                f"predicting each {check['by']} from the others was wrong by "
                f"{100 * check['median_error']:.0f} % (median), {100 * check['largest_error']:.0f} "
                "% at worst"
            )
    else:
        fast, slow = known["ends"]
        lines.append(
            "this device was not measured: the range is what published figures of other stacks "
            f"reached on an Orin, {100 * slow['compute']:.0f} to {100 * fast['compute']:.0f} % of "
            f"the computing peak and {100 * slow['bandwidth']:.0f} to "
            f"{100 * fast['bandwidth']:.0f} % of the bandwidth"
        )
    if facts["device"]["flops"] is None:
        lines.append(
            f"no source says how fast it computes in {facts['precision']}, so only later tokens, "
            "which memory decides, are estimated"
        )
    if facts["decides_per_prompt"]:
        lines.append("this plan decides per prompt: as if no prompt ever pruned")
    derived = facts["device"]["derived"]
    lines.append(f"peaks: {'; '.join(facts['device']['sources'])}")
    return [*lines, f"derived: {derived}"] if derived else lines


def show_times(ends: list[float] | None, error: float | None) -> str:
    """Write a range, or a figure with the error that such figures had."""
    if ends is None:
        return "unknown"
    slow = max(ends) >= LONG_MS
    low, high = (f"{_number(end / 1e3 if slow else end)}" for end in (min(ends), max(ends)))
    unit = "s" if slow else "ms"
    if len(ends) > 1:
        return f"{low} to {high} {unit}"
    return f"{low} {unit}" + (f" +- {100 * error:.0f} %" if error else "")


def _per_second(ends: list[float]) -> str:
    rates = sorted(1e3 / end for end in ends)
    return f"{rates[0]:.3g} to {rates[-1]:.3g}" if len(rates) > 1 else f"{rates[0]:.3g}"


def _peers(facts: dict[str, Any]) -> list[RenderableType]:
    """List what others published for this device: other models, other precisions."""
    if not facts["peers"]:
        return []
    table = Table("published by others", "model", "precision", "figure")
    for figure in facts["peers"]:
        what = (
            f"{figure['ms']:.0f} ms for {figure['tokens']} tokens of prefill"
            if figure["tokens"]
            else f"{figure['ms']:.1f} ms a token"
        )
        table.add_row(figure["stack"], figure["model"], figure["precision"], what)
    return [table]


def _number(value: float) -> str:
    return f"{value:.0f}" if value >= 100 else f"{value:.1f}" if value >= 10 else f"{value:.2f}"


def capacity_table(facts: dict[str, Any]) -> RenderableType:
    """Tabulate the replicas that serve a rate, and what their callers get."""
    origin = "measured here" if facts["measured"] else f"estimated for {facts['device']}"
    head = Text(
        f"{facts['rate']:g} questions a second, {facts['questions_per_image']:g} about each image, "
        f"answers of {facts['tokens']} tokens, {facts['lanes']} lanes; costs {origin}"
    )
    needed = facts["needed"]
    table = Table("", *needed)
    for column in table.columns[1:]:
        column.justify = "right"
    rows = {
        f"replicas for {facts['p95_ms']:g} ms at the 95th percentile": ("replicas", "{}"),
        "first token, median": ("first_token_p50_ms", "{:.0f} ms"),
        "first token, 95th percentile": ("first_token_p95_ms", "{:.0f} ms"),
        "between tokens, median": ("token_p50_ms", "{:.1f} ms"),
        "between tokens, 95th percentile": ("token_p95_ms", "{:.1f} ms"),
        "busy": ("utilisation", "{:.0%}"),
    }
    for words, (key, form) in rows.items():
        table.add_row(words, *(form.format(found[key]) for found in needed.values()))
    names = {
        "vision encoder": "encode_ms",
        "prefill, new image": "prefill_ms",
        "prefill, known image": "question_ms",
    }
    for words, key in names.items():
        table.add_row(words, *(f"{costs[key]:.1f} ms" for costs in facts["costs"].values()))
    for count in sorted({1, facts["lanes"]}):
        words = f"a token of {count} answer{'s' * (count != 1)}"
        steps = (costs["step_ms"][count - 1] for costs in facts["costs"].values())
        table.add_row(words, *(f"{ms:.1f} ms" for ms in steps))
    lines = [Text(line) for line in _apart(facts)]
    return Group(head, table, *lines)


def _apart(facts: dict[str, Any]) -> list[str]:
    """Say where machines that only encode would save some."""
    lines = []
    for name, found in facts["needed"].items():
        apart = found["apart"]
        if apart is None:
            lines.append(f"{name}: encoding on machines of its own saves none")
            continue
        lines.append(
            f"{name}: {apart['encoders']} machines that encode and {apart['replicas']} that decode "
            f"would do; {show_bytes(facts['image_bytes'])} travel for each image"
        )
    return lines
