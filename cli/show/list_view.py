"""The bundles of a folder: names that other commands take, and what each is."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any

from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text

from ...graphs.bundle import MANIFEST, Bundle, bundles_in
from ...graphs.engine_index import ENGINES_FOLDER, ENGINES_INDEX
from ...graphs.errors import VisistageError
from ...graphs.targets import find_target
from ...pages.units import show_bytes


def list_facts(folder: Path) -> list[dict[str, Any]]:
    """Return a few facts of every bundle, the newest first; of those that cannot be read, why."""
    return [_facts(path, folder) for path in bundles_in(folder)]


def list_table(facts: list[dict[str, Any]], folder: Path) -> RenderableType:
    """Tabulate the same facts."""
    if not facts:
        return Text(f"no bundle in {folder}. Build one: visistage build demo")
    table = Table("bundle", "plan", "precision", "target", "size", "built", "engines")
    table.columns[4].justify = "right"
    unread = []
    for bundle in facts:
        if bundle["error"]:
            unread.append(Text(f"{bundle['path']}: {bundle['error']}"))
            continue
        table.add_row(
            *(bundle[name] for name in ("name", "plan", "precision", "target")),
            show_bytes(bundle["bundle_bytes"]),
            bundle["built"],
            bundle["engines"],
        )
    newest = Text(f"without a name: {facts[0]['name']}, the newest", style="dim")
    return Group(table, *unread, newest)


def _facts(path: Path, folder: Path) -> dict[str, Any]:
    name = path.relative_to(folder).as_posix() if path != folder else str(path)
    built = time.localtime((path / MANIFEST).stat().st_mtime)
    facts = {"name": name, "path": str(path), "built": time.strftime("%Y-%m-%d %H:%M", built)}
    try:
        manifest = Bundle.open(path).manifest
        with_engines = find_target(manifest.target).engines
    except VisistageError as error:
        return {**facts, "error": str(error)}
    compiled = (path / ENGINES_FOLDER / ENGINES_INDEX).is_file()
    return {
        **facts,
        "model": manifest.model,
        "plan": manifest.plan.name,
        "precision": manifest.precision,
        "target": manifest.target,
        "bundle_bytes": sum(file.nbytes for file in manifest.files.values()),
        "engines": "" if not with_engines else "compiled" if compiled else "to be compiled",
        "error": None,
    }
