"""The demo's bundle without torch: graphs that come with the package, weights from its checkpoint.

    demo/ready/manifest.json, *.onnx, prefix.bin    as a build on a machine with torch wrote them
    demo/ready/weights.json                         where weights.bin takes its tensors from

Graphs are for target ``cpu-portable``, which every supported ONNX Runtime and OpenVINO read. Hashes
in the manifest tell whether what is put together here is what was built there.
``tests/support/ready_made.py`` writes the folder anew.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Collection
from importlib.util import find_spec
from pathlib import Path

import numpy as np

from ..graphs.bundle import MANIFEST, Bundle, Manifest
from ..graphs.progress import Progress
from .checkpoint.known_models import DEMO, own_folder
from .steps import Staging

READY = Path(__file__).resolve().parents[1] / "demo" / "ready"
TARGET, WEIGHTS, TABLE, CHECKPOINT = (
    "cpu-portable",
    "weights.bin",
    "weights.json",
    "model.safetensors",
)
STORED = "float16"
"""Type of the checkpoint's tensors."""


def ready_made(model: str, target: str, others: Collection[str]) -> bool:
    """Return whether a build is to take the graphs of the package: torch cannot be imported, and
    nothing but the demo on a CPU was asked for.

    Args:
        model: as it was named.
        target: as it was named.
        others: options that were given besides.
    """
    usual = model == DEMO and target in ("cpu", TARGET) and not others
    return usual and find_spec("torch") is None and (READY / MANIFEST).is_file()


def unpack(out: Path, progress: Progress | None = None) -> Bundle:
    """Put the demo's bundle together in ``OUT/demo/``; one that is already there is left as it is.

    Raises:
        BundleError: files of the package are not those that the manifest names.
    """
    manifest, model = Manifest.read(READY / MANIFEST), own_folder(DEMO)
    folder = out / DEMO / f"{manifest.plan.name}-{manifest.precision}-{manifest.target}"
    inputs = (READY / MANIFEST).read_text("utf-8")
    staging = Staging(folder, inputs, progress or Progress(), origin=str(model))
    if staging.up_to_date():
        return Bundle.open(folder)

    def weights() -> list[str]:
        write_weights(model / CHECKPOINT, READY / TABLE, staging.folder / WEIGHTS)
        return [WEIGHTS]

    def files() -> list[str]:
        names = [MANIFEST, *(name for name in manifest.files if name != WEIGHTS)]
        for name in names:
            source = READY / name
            shutil.copyfile(source if source.is_file() else model / name, staging.folder / name)
        return names

    with staging:
        staging.step("weights", weights)
        staging.step("graphs and text files", files)
        Bundle.open(staging.folder).check(rehash=True)
        staging.finish()
    return Bundle.open(folder)


def write_weights(checkpoint: Path, table: Path, file: Path) -> None:
    """Write ``weights.bin``; a row of the table is: from byte, so many numbers, to byte, type."""
    stored = np.memmap(checkpoint, mode="r")
    with file.open("wb") as stream:
        for start, count, place, dtype in json.loads(table.read_text("utf-8")):
            numbers = stored[start : start + 2 * count].view(STORED)
            stream.seek(place)
            stream.write(numbers.astype(dtype).data)
