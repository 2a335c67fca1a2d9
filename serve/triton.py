"""A bundle as a model repository of Triton: NAME/config.pbtxt, NAME/1/model.py and the bundle.

The model is Python; its requests and answers: ``triton_model.py``.
"""

from __future__ import annotations

import re
import shutil
from pathlib import Path

from ..graphs.bundle import Bundle
from ..graphs.errors import CapacityError
from ..graphs.targets import find_target
from ..runtime.backends.registry import backend_of
from ..runtime.engine import DEFAULT_LANES

VERSION = "1"

BUNDLE_FOLDER = "bundle"
"""Of the bundle, within a version's."""

CONFIG = """\
name: "{name}"
backend: "python"
max_batch_size: 0
model_transaction_policy {{ decoupled: true }}
input [
  {{ name: "PROMPT" data_type: TYPE_STRING dims: [ 1 ] }},
  {{ name: "IMAGE" data_type: TYPE_STRING dims: [ -1 ] optional: true }},
  {{ name: "MAX_TOKENS" data_type: TYPE_INT32 dims: [ 1 ] optional: true }}
]
output [ {{ name: "TEXT" data_type: TYPE_STRING dims: [ 1 ] }} ]
instance_group [ {{ count: 1 kind: {kind} }} ]
parameters {{ key: "lanes" value: {{ string_value: "{lanes}" }} }}
"""

MODEL = '''\
"""A visistage bundle; needs visistage in the Python of Triton's backend."""

from visistage.serve.triton_model import TritonPythonModel

__all__ = ["TritonPythonModel"]
'''


def export_triton(
    bundle: Bundle, repository: Path, name: str | None = None, lanes: int | None = None
) -> Path:
    """Write a bundle into a model repository; return the model's folder.

    Args:
        bundle: it is copied.
        repository: made if need be.
        name: of the model; None: of the bundle's model and plan.
        lanes: answers written at once; None: 8 where the back end can, else 1.

    Raises:
        CapacityError: there is a model of that name, or it cannot be written.
    """
    manifest = bundle.manifest
    target = find_target(manifest.target)
    several = "lanes" in backend_of(target).options
    name = re.sub(r"[^\w.-]+", "-", name or f"{manifest.model}-{manifest.plan.name}", flags=re.A)
    folder = repository / name
    new = repository / f".{name}.partial"
    if folder.exists():
        raise CapacityError(f"{folder} is there already. Choose another --name, or remove it")
    try:
        shutil.rmtree(new, ignore_errors=True)  # of an export that was stopped
        inner = new / VERSION
        inner.mkdir(parents=True)
        ignored = shutil.ignore_patterns(".*")
        shutil.copytree(bundle.path, inner / BUNDLE_FOLDER, ignore=ignored)
        (inner / "model.py").write_text(MODEL, encoding="utf-8")
        config = CONFIG.format(
            name=name,
            kind="KIND_CPU" if several else "KIND_GPU",
            lanes=lanes or (DEFAULT_LANES if several else 1),
        )
        (new / "config.pbtxt").write_text(config, encoding="utf-8")
        new.rename(folder)
    except (OSError, shutil.Error) as error:
        reason = getattr(error, "strerror", None) or "files could not be copied"
        raise CapacityError(
            f"{folder} cannot be written: {reason}. Choose another folder"
        ) from error
    return folder
