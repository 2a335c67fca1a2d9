"""Options and arguments that several commands take, and what they stand for."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import click

as_json = click.option("--json", "as_json", is_flag=True, help="Print facts as JSON.")
bundle_argument = click.argument("bundle", required=False, type=click.Path(path_type=Path))
backend_option = click.option(
    "--backend",
    help="onnxruntime: run the graphs of any bundle on this CPU. openvino: those of cpu-portable.",
)
sm_option = click.option(
    "--sm",
    "capabilities",
    multiple=True,
    callback=lambda ctx, param, values: tuple(map(_capability, values)),
    help="Compute capability to compile for, such as 86; may be repeated.",
)
bundle_default = "Without BUNDLE: what VISISTAGE_BUNDLE names, or the only bundle in ./engines."


def bundle_at(given: Path | None) -> Path:
    """Return the folder of the bundle that a command is about."""
    from ..runtime.oneshot import default_bundle

    return given or default_bundle()


def session_of(bundle: Path | None, **options) -> Any:
    """Load that bundle."""
    from .. import runtime

    return runtime.load(bundle_at(bundle), **options)


def _capability(text: str) -> tuple[int, int]:
    from ..graphs.targets import parse_capability

    return parse_capability(text)
