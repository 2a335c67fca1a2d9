"""The demo's graphs that come with the package, built anew.

python tests/support/ready_made.py      after a change of what a build writes
"""

import json
import shutil
import tempfile
from pathlib import Path

from visistage.compile.build import make_bundle
from visistage.compile.build_spec import resolve_build
from visistage.compile.checkpoint.checkpoint import open_checkpoint
from visistage.compile.export.weights import Placement, place
from visistage.compile.ready_made import READY, TABLE, TARGET, WEIGHTS
from visistage.graphs.bundle import MANIFEST, Bundle
from visistage.graphs.dtypes import BY_SAFETENSORS
from visistage.graphs.precision import NO_FALLBACK
from visistage.graphs.targets import find_target


def table() -> list[list]:
    """Return the rows of ``weights.json``."""
    checkpoint = open_checkpoint("demo")
    spec = resolve_build(checkpoint, plan=None, target=find_target(TARGET), precision="fp32")
    names = [name for graph in spec.graphs(NO_FALLBACK) for name in graph.weights]
    placement: Placement = place(checkpoint, names, spec.dtype)
    rows = []
    for name, span in sorted(placement.spans.items(), key=lambda item: item[1].offset):
        info = checkpoint.tensors[name]
        stored = BY_SAFETENSORS[info.dtype].name
        dtype = spec.dtype if name in placement.converted else stored
        rows.append([info.offset, info.nbytes // 2, span.offset, dtype])
    return rows


def write(bundle: Bundle, folder: Path) -> None:
    """Write what of ``bundle`` the package does not have elsewhere."""
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir()
    for name in (MANIFEST, *bundle.manifest.files):
        if name != WEIGHTS and name not in bundle.manifest.text_files.values():
            shutil.copyfile(bundle.path / name, folder / name)
    rows = ",\n".join(json.dumps(row) for row in table())
    (folder / TABLE).write_text(f"[\n{rows}\n]\n", "utf-8")


if __name__ == "__main__":
    with tempfile.TemporaryDirectory() as out:
        write(make_bundle("demo", target=TARGET, out=out), READY)
