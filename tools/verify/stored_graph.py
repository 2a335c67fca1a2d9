"""The files of a bundle as arrays and tensors: weights of its graphs, and inputs to try them with.

Weights are read where the file says they are, not where the checkpoint had them, so that a graph
that points to the wrong bytes is found out.
"""

from __future__ import annotations

import math
import zlib
from collections.abc import Iterator, Mapping
from pathlib import Path

import numpy as np
import onnx_ir
import torch

from ...compile.quantize.int_arithmetic import unpack_int4
from ...graphs.bundle import Bundle, Manifest, TensorRef
from ...graphs.contract import BY_LAYER, INVISIBLE, MANY_ROWS, GraphSpec
from ...graphs.errors import BundleError
from ...graphs.linears import linear_groups
from ...graphs.modules.quantized import CACHE_SCALES, replace_linears, round_caches
from ...graphs.parts import OF_LAYERS, STEP, StagePart, stage_of, stage_parts
from ...graphs.quantization import Scheme
from ...graphs.targets import LLM_CONDITIONAL, find_target
from ...graphs.vision_contract import TILES

BUILD_AGAIN = "Build the bundle again: visistage build MODEL"

FILLED = 9
"""Slots of a cache that hold earlier rows."""

CALL_ROWS = 5
"""New rows of a call by default."""

SPARE_SLOTS = 6
"""Slots beyond them that are still empty, and rows that a selection is offered beyond K."""

TEXT_ROWS = 4
"""Rows of a question, where a selection reads them."""


class StoredWeights(Mapping[str, np.ndarray]):
    """Arrays by the checkpoint's names, mapped when read; INT4 becomes INT8, one to a byte.

    ``nbytes``: their size in the files.
    """

    def __init__(self, bundle: Bundle, tensors: Mapping[str, onnx_ir.ExternalTensor]):
        self.bundle, self.tensors = bundle, tensors
        self.nbytes = sum(tensor.nbytes for tensor in tensors.values())

    def __getitem__(self, name: str) -> np.ndarray:
        """Map an array. onnx_ir itself refuses hard links, which a bundle's weights are."""
        tensor = self.tensors[name]
        shape = tensor.shape.numpy()
        raw = map_raw(self.bundle, str(tensor.location), tensor.offset or 0, tensor.nbytes)
        if tensor.dtype == onnx_ir.DataType.INT4:
            return unpack_int4(raw, shape)
        return raw.view(tensor.dtype.numpy()).reshape(shape)

    def __iter__(self) -> Iterator[str]:
        return iter(self.tensors)

    def __len__(self) -> int:
        return len(self.tensors)

    def size(self, name: str) -> int:
        """Return the number of an array's elements."""
        return self.tensors[name].size


class StoredGraph:
    """A graph of ``bundle``; ``weights`` maps the checkpoint's names to arrays, read when used.

    Raises:
        BundleError: the file cannot be read, or reads files that the manifest does not name.
    """

    def __init__(self, bundle: Bundle, name: str):
        self.name, self.manifest = name, bundle.manifest
        self.fact = bundle.manifest.graphs[name]
        self.spec: GraphSpec = self.fact.spec
        self.path: Path = bundle.file(self.fact.file)
        try:
            model = onnx_ir.load(self.path)
        except Exception as error:  # protobuf's and onnx_ir's exceptions share no other base
            raise BundleError(f"{self.path} is no ONNX file ({error})") from error
        tensors: dict[str, onnx_ir.ExternalTensor] = {}
        for initializer in model.graph.initializers.values():
            tensor = initializer.const_value
            if isinstance(tensor, onnx_ir.ExternalTensor):
                if tensor.location not in bundle.manifest.files:
                    raise BundleError(
                        f"{self.path} reads {tensor.location}, which the manifest does not name. "
                        f"{BUILD_AGAIN}"
                    )
                tensors[str(initializer.name)] = tensor
        self.weights = StoredWeights(bundle, tensors)

    @property
    def kind(self) -> str:
        """``vision``, ``project``, ``serve``, ``stage``, ``step``, ``select`` or ``probe``."""
        return self.name.split(".")[0].rstrip("0123456789")

    @property
    def stage(self) -> int:
        """The stage that the graph belongs to; vision has none."""
        return stage_of(self.name)

    @property
    def part(self) -> StagePart:
        """Layers of a stage's graph, which follow from the caches that each of its graphs takes."""
        names = self.manifest.parts_of(self.stage)
        inputs = [self.manifest.graphs[name].spec.inputs for name in names]
        counts = [sum(tensor.name.startswith("key.") for tensor in own) for own in inputs]
        own = self.manifest.parts_of(self.stage, self.kind).index(self.name)
        return stage_parts(self.manifest.plan, self.stage, counts)[own]

    @property
    def row_counts(self) -> list[int]:
        """New rows of the calls that together reach all of the graph."""
        if self.kind == "stage" and self.manifest.lowering == LLM_CONDITIONAL:
            return [CALL_ROWS, 1, MANY_ROWS + CALL_ROWS]
        if self.kind == STEP:
            return [1]
        return [CALL_ROWS]

    def feeds(self, rows: int = CALL_ROWS) -> dict[str, np.ndarray]:
        """Return inputs: batch 1, a filled cache, one padded slot (unless one row is new), half of
        the gates open and half of the gains 1.
        """
        generator = np.random.default_rng(zlib.crc32(self.name.encode()))
        keep = next((spec.shape[1] for spec in self.spec.outputs if spec.name == "rows.out"), 0)
        offered = (int(keep) if self.kind == "select" else 0) + SPARE_SLOTS
        calls = self.kind in OF_LAYERS
        filled = FILLED if calls else offered + 2
        used = filled + (rows if calls else 0)
        sizes = {"B": 1, "Q": rows, "S": used + SPARE_SLOTS, "N": offered, "T": TEXT_ROWS}
        layout = self.manifest.config.layout(2, 3)  # a small image, no square
        sizes[TILES] = layout.tiles if layout.feeds else 2
        new = np.arange(filled, used) if calls else np.arange(2, 2 + offered)
        slot_order = np.full(used + SPARE_SLOTS, INVISIBLE)
        padded = int(rows > 1)  # a single row that sees all has a form of its own
        slot_order[padded:used] = np.arange(padded, used)
        fixed: dict[str, int | np.ndarray] = {
            "positions": new,
            "order": new,
            "visual_slots": new,
            "slot_order": slot_order,
            "write_index": filled,
            "query_order": used - 1,
            "text_order": np.arange(used - TEXT_ROWS, used),
        }
        feeds = {}
        value: np.ndarray
        for spec in self.spec.inputs:
            shape = [sizes.get(d, 0) if isinstance(d, str) else d for d in spec.shape]
            if spec.name == "positions" and len(shape) == 3:  # another one on each axis
                value = new[None, :, None] - np.arange(shape[2])
            elif spec.name in layout.feeds:
                value = layout.feeds[spec.name]
            elif spec.name in fixed:
                value = np.broadcast_to(fixed[spec.name], shape)
            elif spec.name in BY_LAYER:
                value = generator.integers(0, 2, shape)
            elif spec.dtype == "int8":
                value = generator.integers(-127, 128, shape)
            elif spec.name in CACHE_SCALES:
                value = generator.uniform(0.5, 2.0, shape) / 64
            else:
                value = generator.standard_normal(shape)
            feeds[spec.name] = np.ascontiguousarray(value, dtype=spec.dtype)
        return feeds


def all_weights(bundle: Bundle) -> StoredWeights:
    """Return the weights of every graph of ``bundle``.

    Raises:
        BundleError: as ``StoredGraph``.
    """
    tensors: dict[str, onnx_ir.ExternalTensor] = {}
    for name in bundle.manifest.graphs:
        tensors |= StoredGraph(bundle, name).weights.tensors
    return StoredWeights(bundle, tensors)


def stored_tensor(bundle: Bundle, ref: TensorRef) -> torch.Tensor:
    """Map a tensor that the manifest places in a file, in the type it is stored in."""
    dtype: torch.dtype = getattr(torch, ref.dtype)
    raw = map_raw(bundle, ref.file, ref.offset, math.prod(ref.shape) * dtype.itemsize)
    return torch.from_numpy(raw).view(dtype).view(ref.shape)


def quantise_module(module: torch.nn.Module, manifest: Manifest, kind: str) -> None:
    """Replace the layers and caches of ``module`` that are integers in the bundle's graphs of a
    ``StoredGraph.kind``.
    """
    engines = find_target(manifest.target).engines
    groups = linear_groups(manifest.config)
    replace_linears(module, schemes_of(manifest, kind), groups, engines=engines)
    round_caches(module, manifest.quantization.cache)


def schemes_of(manifest: Manifest, kind: str) -> Mapping[str, Scheme]:
    """Return the schemes of linear layers in graphs of a ``StoredGraph.kind``."""
    quantization = manifest.quantization
    return quantization.decode if kind == STEP else quantization.schemes


def map_raw(bundle: Bundle, name: str, offset: int, nbytes: int) -> np.ndarray:
    """Map bytes (nbytes,) uint8 of a file of the bundle; writing to them changes no file.

    Raises:
        BundleError: the file ends before.
    """
    file = bundle.file(name)
    try:
        return np.memmap(file, np.uint8, "c", offset, (nbytes,))
    except (ValueError, OSError) as error:
        raise BundleError(
            f"{file} is too short for a tensor that is placed in it. {BUILD_AGAIN}"
        ) from error


def new_rows(outputs: Mapping[str, np.ndarray], spec: GraphSpec) -> dict[str, np.ndarray]:
    """Cut whole caches to the new rows where those alone are the contract's outputs."""
    cut = {}
    for tensor in spec.outputs:
        value = outputs[tensor.name]
        if len(tensor.shape) == 4 and tensor.shape[2] == "Q" and value.shape[2] > CALL_ROWS:
            value = value[:, :, FILLED : FILLED + CALL_ROWS]
        cut[tensor.name] = value
    return cut
