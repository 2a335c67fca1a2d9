"""Plans as text: YAML and JSON files, and the short form ``visipruner:t=14,keep=32``.

    version: 1
    name: mine
    layers: 32
    visual_tokens: 576
    stages:
    - {layers: [0, 15], visual_tokens: 576, modes: 'sink, text_blind x5, dense x9'}
    - {layers: [15, 24], visual_tokens: 32, modes: dense}
    - {layers: [24, 32], visual_tokens: 0, modes: dense}
    edges:
    - {op: select, score: value_norm, keep: 32}
    - {op: drop}

``modes`` may be a list with one word per layer, or runs as above; a single word holds for the
whole stage. A plan file may come from a stranger, so it is data and no more: bounded in size,
without YAML tags and aliases, and a repeated key is an error, not a silent choice.

Source: docs/design.md, "The plan".
"""

from __future__ import annotations

import json
import os
import re
from collections.abc import Iterable
from itertools import groupby
from pathlib import Path
from typing import Any

from ..graphs.commands import install
from ..graphs.errors import MissingDependencyError, PlanError
from ..graphs.fields import parse_json, read_bytes
from ..graphs.files import write_file
from ..graphs.plan.plan import StagePlan
from ..graphs.presets.presets import PRESETS, parse_request, preset

MAX_FILE_BYTES = 64 * 1024
"""A plan of a hundred layers takes 2 KiB."""

SUFFIXES = (".yaml", ".yml", ".json")

_HEADER = "# A visistage stage plan. Layers count from 0; [start, stop) leaves out stop.\n"
_MAX_NESTING = 10  # a plan has 4 levels
_MAX_RUN = 4096  # keeps 'dense x999999999' from filling the memory


def resolve_plan(text: str, layers: int, visual_tokens: int) -> StagePlan:
    """Return the plan that ``text`` names, for a decoder of ``layers`` and N ``visual_tokens``.

    ``text`` is a preset's name, ``preset:key=value,key=value``, or a path that ends in .yaml,
    .yml or .json.

    Raises:
        PlanError: an unknown preset or option, an unusable file, or a plan for another model.
    """
    if text.lower().endswith(SUFFIXES) or "/" in text or "\\" in text:
        plan = load_plan(text)
        check_fit(plan, layers, visual_tokens, str(text))
        return plan
    name, options = parse_request(text)
    if name not in PRESETS and os.path.isfile(text):
        raise PlanError(
            f"plan: found the file {text!r}, expected a name in {', '.join(SUFFIXES)}. Rename it."
        )
    return preset(name, layers, visual_tokens, **options)


def check_fit(plan: StagePlan, layers: int, visual_tokens: int, source: str = "plan") -> None:
    """Check that ``plan`` is for this depth and this many tokens per image, or raise PlanError."""
    for field, unit, wanted in (
        ("layers", "decoder layers", layers),
        ("visual_tokens", "visual tokens per image", visual_tokens),
    ):
        found = getattr(plan, field)
        if found != wanted:
            raise PlanError(
                f"{source}: found {field}={found}, expected {wanted}: the model has {wanted} "
                f"{unit}. Use a plan made for this model, or a preset ({', '.join(PRESETS)})."
            )


def load_plan(path: str | Path) -> StagePlan:
    """Read the plan in a .yaml, .yml or .json file.

    Raises:
        PlanError: no such file, too large, not text, not a plan; names the file and the field.
        MissingDependencyError: a YAML file, and PyYAML is not installed.
    """
    path = Path(path)
    _check_suffix(path)
    text = read_bytes(
        path, PlanError, f"Name a plan file, or a preset ({', '.join(PRESETS)}).", MAX_FILE_BYTES
    )
    try:
        if path.suffix.lower() == ".json":
            return plan_from_json(text)
        return plan_from_yaml(text.decode("utf-8-sig"))
    except UnicodeDecodeError as error:
        raise PlanError(
            f"{path}: byte {error.start} is not UTF-8, expected text. Save the plan as UTF-8."
        ) from None
    except PlanError as error:
        raise PlanError(f"{path}: {error}") from None


def save_plan(plan: StagePlan, path: str | Path) -> None:
    """Write ``plan`` as JSON or YAML, by the suffix of ``path``; an existing file is replaced.

    Raises:
        PlanError: a name with another suffix, or a place that cannot be written.
    """
    path = Path(path)
    _check_suffix(path)
    if path.suffix.lower() == ".json":
        text = json.dumps(plan.to_dict(), indent=2) + "\n"
    else:
        text = plan_to_yaml(plan)
    try:
        write_file(path, text)
    except OSError as error:
        raise PlanError(f"{path}: cannot write the plan: {error.strerror}.") from None


def _check_suffix(path: Path) -> None:
    if path.suffix.lower() not in SUFFIXES:
        raise PlanError(f"{path}: expected a name in {', '.join(SUFFIXES)}. Rename the file.")


def plan_to_yaml(plan: StagePlan) -> str:
    """Return ``plan`` as YAML that ``plan_from_yaml`` reads back, modes as runs."""
    data = plan.to_dict()
    for stage in data["stages"]:
        stage["modes"] = modes_text(stage["modes"])
    return _HEADER + _yaml().safe_dump(data, sort_keys=False, default_flow_style=None, width=4096)


def plan_from_yaml(text: str) -> StagePlan:
    """Return the plan in a YAML text. Raises PlanError."""
    yaml = _yaml()
    try:
        _reject_beyond_plain_data(yaml, text)
        _reject_repeated_keys(yaml.compose(text, Loader=yaml.SafeLoader), "")
        data = yaml.safe_load(text)
    except (yaml.YAMLError, ValueError, RecursionError) as error:
        mark = getattr(error, "problem_mark", None)
        place = f"line {mark.line + 1}: " if mark else ""
        reason = getattr(error, "problem", None) or str(error).partition("\n")[0]
        raise PlanError(
            f"{place}not YAML: {reason}. Correct the line, or quote the value."
        ) from None
    return _plan(data)


def plan_from_json(text: str | bytes) -> StagePlan:
    """Return the plan in a JSON text. Raises PlanError."""
    return _plan(parse_json(text, PlanError, "Correct that place.", "the plan"))


def modes_text(modes: Iterable[str]) -> str:
    """Return modes as runs: ``sink, text_blind x5, dense x13``."""
    runs = [(mode, len(list(group))) for mode, group in groupby(modes)]
    return ", ".join(f"{mode} x{count}" if count > 1 else mode for mode, count in runs)


def modes_from_text(text: str, depth: int, field: str = "modes") -> list[str]:
    """Invert ``modes_text``; a single word without a count means ``depth`` layers.

    Raises:
        PlanError: an item that is not ``mode`` or ``mode xCOUNT``; the plan checks the modes.
    """
    modes: list[str] = []
    items = [item.strip() for item in text.split(",")]
    for item in items:
        match = re.fullmatch(r"(\w+)(?:\s+x\s*([1-9]\d{0,3}))?", item, re.ASCII)
        count = int(match[2] or (depth if len(items) == 1 else 1)) if match else 0
        if not match or len(modes) + count > _MAX_RUN:
            raise PlanError(
                f"{field}: found {item[:60]!r}, expected runs like 'text_blind x5, dense x13' "
                "that fit the stage. Write one word per layer, or runs."
            )
        modes += [match[1]] * count
    return modes


def _plan(data: Any) -> StagePlan:
    """Spell out runs of modes, and read the plan strictly."""
    stages = data.get("stages") if isinstance(data, dict) else None
    for index, stage in enumerate(stages if isinstance(stages, list) else []):
        if isinstance(stage, dict) and isinstance(stage.get("modes"), str):
            field = f"stages[{index}].modes"
            stage["modes"] = modes_from_text(stage["modes"], _depth(stage.get("layers")), field)
    return StagePlan.from_dict(data)


def _depth(layers: Any) -> int:
    """Return the depth of a stage with unchecked ``layers``; 1 where they make no sense."""
    if isinstance(layers, list) and len(layers) == 2 and all(type(item) is int for item in layers):
        return min(max(layers[1] - layers[0], 1), _MAX_RUN)
    return 1


def _reject_beyond_plain_data(yaml: Any, text: str) -> None:
    """Refuse tags, anchors and aliases, and nesting that costs PyYAML minutes."""
    depth = 0
    for event in yaml.parse(text, Loader=yaml.SafeLoader):
        anchor, tag = getattr(event, "anchor", None), getattr(event, "tag", None)
        opens = isinstance(event, yaml.CollectionStartEvent)
        depth += opens - isinstance(event, yaml.CollectionEndEvent)
        found = None
        if anchor:  # an alias has this attribute too
            found = f"the alias or anchor {anchor!r}"
        elif tag:
            found = f"the tag {_printable(tag)!r}"
        elif depth > _MAX_NESTING:
            found = f"more than {_MAX_NESTING} levels"
        if found:
            line = event.start_mark.line + 1
            raise PlanError(f"line {line}: found {found}, expected plain values. Remove it.")


def _reject_repeated_keys(node: Any, at: str) -> None:
    """Refuse a mapping of the YAML tree with a repeated key (YAML keeps the last)."""
    if node is None or node.id == "scalar":
        return
    if node.id == "sequence":
        for index, item in enumerate(node.value):
            _reject_repeated_keys(item, f"{at}[{index}]")
        return
    seen: dict[str, int] = {}
    for key, value in node.value:
        name = _printable(key.value) if key.id == "scalar" else "?"
        field = f"{at}.{name}" if at else name
        line = key.start_mark.line + 1
        if name in seen or name == "<<":
            first = f"after line {seen[name]}" if name in seen else "(a merge)"
            raise PlanError(
                f"{field}: found again in line {line} {first}, expected once. Remove one of them."
            )
        seen[name] = line
        _reject_repeated_keys(value, field)


def _printable(key: str) -> str:
    """Return a key of a foreign file, safe to print on a terminal."""
    return key[:80] if key.isprintable() else repr(key[:80])


def _yaml() -> Any:
    """Import PyYAML, which only YAML files need: presets and JSON files do without."""
    try:
        import yaml
    except ImportError:
        raise MissingDependencyError(
            "PyYAML is not installed, and YAML plans need it. "
            f"Type: {install('compile')}; or use a .json plan."
        ) from None
    return yaml
