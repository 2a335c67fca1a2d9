"""Traces that the processes of one run share: the first that meets a kind of piece traces it.

A trace takes a second, a build of a toy a dozen of them, and pytest-xdist's processes meet mostly
the same kinds.
"""

import hashlib
import os
import pickle
from pathlib import Path

import onnx
from onnx_ir import serde
from visistage.compile.export.stitch import Traced


class SharedTraces(dict):
    """What ``compile.export.stitch`` remembers its traces in, and a file of each in ``folder``."""

    def __init__(self, folder: Path):
        super().__init__()
        self.folder = folder
        folder.mkdir(parents=True, exist_ok=True)

    def __contains__(self, key) -> bool:
        if not super().__contains__(key) and self._file(key).exists():
            function, outputs, is_tuple = pickle.loads(self._file(key).read_bytes())
            function = serde.deserialize_function(onnx.FunctionProto.FromString(function))
            super().__setitem__(key, Traced(function, outputs, is_tuple))
        return super().__contains__(key)

    def __setitem__(self, key, traced: Traced) -> None:
        super().__setitem__(key, traced)
        function = serde.serialize_function(traced.function).SerializeToString()
        part = self._file(key).with_suffix(f".{os.getpid()}")
        part.write_bytes(pickle.dumps((function, traced.outputs, traced.is_tuple)))
        part.replace(self._file(key))

    def _file(self, key) -> Path:
        return self.folder / hashlib.sha256(repr(key).encode()).hexdigest()
