"""The rungs that need the checkpoint: the bundle's weights and prefix are its own."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ...compile.checkpoint.checkpoint import Checkpoint, open_checkpoint
from ...compile.checkpoint.names import EMBEDDING
from ...compile.export.prefix import prefix_cache
from ...compile.quantize.cache_scales import calibrated_cache_scales, quantised_rows
from ...compile.quantize.calibration_file import Calibration
from ...compile.quantize.int_arithmetic import unpack_int4
from ...compile.quantize.quantize import CALIBRATIONS, QuantisedTensors, input_shifts
from ...graphs.bundle import Bundle, Manifest
from ...graphs.errors import DataError, ModelError
from ...graphs.modules.quantized import WEIGHT, cache_scale_names, is_cache_scale
from ...graphs.targets import find_target
from .check_steps import NothingError
from .compare import BOUNDS, first_wrong, tensor_error
from .module_checks import stored_tensor
from .quantised_checks import QuantisedWeights, WrongError
from .stored_graph import StoredGraph, all_weights, graph_files
from .verify_report import CheckResult


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


def weights(bundle: Bundle, checkpoint: Checkpoint, calibration: Calibration | None) -> CheckResult:
    """Every weight is the checkpoint's: bit for bit in the bundle's precision, or rounded from it.

    ``calibration``: the one that the bundle rests on; with it what was rounded is rounded again.
    """
    manifest = bundle.manifest
    failure = ""
    if not _same(stored_tensor(bundle, manifest.embedding), checkpoint.load(EMBEDDING)):
        failure = f"weight {EMBEDDING} is not the checkpoint's"
    arrays = all_weights(bundle)
    quantised = QuantisedWeights(manifest, checkpoint, arrays)
    for graph_name in manifest.graphs:
        graph = StoredGraph(bundle, graph_name)
        for name in graph.weights:
            if quantised.touches(name) or is_cache_scale(name):
                continue
            found = torch.from_numpy(graph.weights[name])
            if not _same(found, checkpoint.load(name).to(found.dtype)):
                failure = failure or f"weight {name} of {graph.fact.file} is not the checkpoint's"
            checkpoint.release()
    facts: dict[str, Any] = {"tensors": len(arrays) + 1}
    if manifest.quantization.quantises_cache and not failure:
        failure = _wrong_cache_scale(bundle, calibration, arrays)
        facts["scales of caches"] = 2 * manifest.config.text.layers
    if manifest.quantization.schemes and not failure:
        try:
            quantised.check()
            if calibration is not None:
                _round_again(manifest, checkpoint, calibration, arrays)
        except WrongError as error:
            failure = f"weight {error}"
        facts["rounded or folded layers"] = quantised.layers
        facts["largest rounding error"] = f"{quantised.worst / 2:.4f} steps"
        if quantised.hidden:
            facts["not checked: channels whose norm is 0"] = quantised.hidden
    if manifest.quantization.quantises:
        facts |= _calibration_facts(manifest, calibration)
    return CheckResult(failure, graph_files(bundle), facts=facts)


def _wrong_cache_scale(
    bundle: Bundle, calibration: Calibration | None, arrays: Mapping[str, np.ndarray]
) -> str:
    """What is wrong with the scales of an INT8 cache; empty where nothing is.

    Graphs and runtime have the same, above 0, and those that ``calibration`` makes where it is
    given.
    """
    manifest = bundle.manifest
    assert manifest.cache_scales is not None
    told = stored_tensor(bundle, manifest.cache_scales).float().numpy()
    made = None
    if calibration is not None:
        made = calibrated_cache_scales(calibration, half=manifest.dtype == "float16")
    for layer in range(manifest.config.text.layers):
        for number, name in enumerate(cache_scale_names(layer)):
            found = arrays[name].astype(np.float32)
            if not (np.isfinite(found) & (found > 0)).all():
                return f"weight {name} holds what is not above 0 or not finite"
            if not np.array_equal(found, told[number, layer]):
                return f"weight {name} is not what the manifest tells the runtime"
            if made is not None and not np.array_equal(found, made[number, layer]):
                return f"weight {name} is not what the calibration makes of it"
    return ""


def open_calibration(bundle: Bundle, folder: Path | None) -> Calibration | None:
    """The calibration that ``bundle`` rests on: in ``folder``, or in the usual place if there.

    Raises:
        DataError: ``folder`` holds none, or another one.
    """
    wanted = bundle.manifest.quantization.calibration
    usual = CALIBRATIONS / bundle.manifest.model
    if folder is None and (wanted is None or not usual.is_dir()):
        return None
    found = Calibration.load(folder or usual)
    if found.hash == wanted:
        return found
    if folder is None:
        return None
    rests = f"rests on {wanted[:12]}" if wanted else "needs none"
    raise DataError(
        f"{folder} holds calibration {found.hash[:12]}, {bundle.path} {rests}. Name the one that "
        "it was built with, or leave --calib out"
    )


def _round_again(
    manifest: Manifest,
    checkpoint: Checkpoint,
    calibration: Calibration,
    arrays: Mapping[str, np.ndarray],
) -> None:
    """Every tensor that a build makes of the checkpoint and the calibration, bit for bit.

    Raises:
        WrongError: the first that differs.
    """
    quantised_tensors = QuantisedTensors(
        checkpoint,
        manifest.quantization,
        calibration,
        half=manifest.dtype == "float16",
        engines=find_target(manifest.target).engines,
        shifts=input_shifts(manifest.fallback),
    )
    for name in sorted(name for name in arrays if quantised_tensors.changes(name)):
        found, want = torch.from_numpy(arrays[name]), quantised_tensors.tensor(name)
        if name.endswith(WEIGHT["w4"]):
            want = torch.from_numpy(unpack_int4(want.numpy(), tuple(found.shape)))
        if not _same(found, want.to(found.dtype)):
            raise WrongError(f"{name} is not what checkpoint and calibration make of it")


def _calibration_facts(manifest: Manifest, calibration: Calibration | None) -> dict[str, Any]:
    """What was checked against the calibration, and what could not be."""
    facts: dict[str, Any] = {}
    known = manifest.quantization.calibration
    if known is not None and calibration is None:
        facts["not checked"] = (
            "input scales, scales of caches and strengths of smoothing, against calibration "
            f"{known[:12]}: --calib CALIBRATION"
        )
    if calibration is not None:
        facts["rounded again"] = f"with calibration {calibration.hash[:12]}, bit for bit"
    return facts


def prefix(bundle: Bundle, checkpoint: Checkpoint) -> CheckResult:
    """The shipped keys and values of the prefix, computed again from the checkpoint.

    Raises:
        NothingError: the bundle ships none.
    """
    shipped = bundle.manifest.prefix
    if shipped is None:
        raise NothingError("the template begins with the picture, or differently every time")
    manifest, again = bundle.manifest, prefix_cache(checkpoint, shipped.ids)
    if manifest.cache_scales is not None:
        scales = stored_tensor(bundle, manifest.cache_scales).float().numpy()
        again = quantised_rows(again, scales)
    errors = []
    for number, (name, ref) in enumerate((("keys", shipped.keys), ("values", shipped.values))):
        stored = stored_tensor(bundle, ref)
        found = (stored.float() if stored.is_floating_point() else stored).numpy()
        for layer in range(found.shape[0]):
            want = again[number, layer].numpy()
            errors.append(tensor_error(f"prefix {name} of layer {layer}", found[layer], want))
    tolerance = BOUNDS[manifest.dtype].graph
    return CheckResult(first_wrong(errors, tolerance), (shipped.keys.file,), tuple(errors))


def _same(found: Tensor, wanted: Tensor) -> bool:
    """Bit for bit: a NaN equals itself."""
    if found.dtype != wanted.dtype or found.shape != wanted.shape:
        return False
    return torch.equal(*(one.reshape(-1).view(torch.uint8) for one in (found, wanted)))
