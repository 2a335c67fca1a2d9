"""The rungs that need the checkpoint: the bundle's weights and prefix are its own."""

from __future__ import annotations

import torch
from torch import Tensor

from ..compile.checkpoint import Checkpoint, open_checkpoint
from ..compile.names import EMBEDDING
from ..compile.prefix import prefix_cache
from ..graphs.bundle import Bundle
from ..graphs.errors import ModelError
from .compare import TOLERANCE, first_wrong, tensor_error
from .modules import stored_tensor
from .report import Finding
from .steps import NothingError
from .stored_graph import StoredGraph


def open_origin(bundle: Bundle, model: str) -> Checkpoint:
    """The checkpoint ``model`` on this machine; nothing is downloaded.

    Raises:
        ModelError: it cannot be opened, or has another shape than the bundle's model.
    """
    checkpoint = open_checkpoint(model, offline=True)
    if checkpoint.config != bundle.manifest.config:
        raise ModelError(
            f"{model} has other sizes than the model '{bundle.manifest.model}' of {bundle.path}. "
            "Name the checkpoint that the bundle was built from: --model CHECKPOINT"
        )
    return checkpoint


def weights(bundle: Bundle, checkpoint: Checkpoint) -> Finding:
    """Every weight is, bit for bit, the checkpoint's in the bundle's precision."""
    failure, files, count = "", [], 1
    if not _same(stored_tensor(bundle, bundle.manifest.embedding), checkpoint.load(EMBEDDING)):
        failure = f"weight {EMBEDDING} is not the checkpoint's"
    for graph_name in bundle.manifest.graphs:
        graph = StoredGraph(bundle, graph_name)
        files.append(graph.fact.file)
        for name, array in graph.weights.items():
            count += 1
            found = torch.from_numpy(array)
            if not _same(found, checkpoint.load(name).to(found.dtype)):
                failure = failure or f"weight {name} of {files[-1]} is not the checkpoint's"
            checkpoint.release()
    return Finding(failure, tuple(files), facts={"tensors": count})


def prefix(bundle: Bundle, checkpoint: Checkpoint) -> Finding:
    """The shipped keys and values of the prefix, computed again from the checkpoint.

    Raises:
        NothingError: the bundle ships none.
    """
    shipped = bundle.manifest.prefix
    if shipped is None:
        raise NothingError("the template begins with the picture, or differently every time")
    again = prefix_cache(checkpoint, shipped.ids)
    errors = []
    for number, (name, ref) in enumerate((("keys", shipped.keys), ("values", shipped.values))):
        found = stored_tensor(bundle, ref).float().numpy()
        for layer in range(found.shape[0]):
            want = again[number, layer].numpy()
            errors.append(tensor_error(f"prefix {name} of layer {layer}", found[layer], want))
    tolerance = TOLERANCE[bundle.manifest.precision]
    return Finding(first_wrong(errors, tolerance), (shipped.keys.file,), tuple(errors))


def _same(found: Tensor, wanted: Tensor) -> bool:
    """Bit for bit: a NaN equals itself."""
    if found.dtype != wanted.dtype or found.shape != wanted.shape:
        return False
    return torch.equal(*(one.contiguous().view(torch.uint8) for one in (found, wanted)))
