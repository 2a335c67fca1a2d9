"""Checks that need the checkpoint: the bundle's weights and prefix are its own."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ...compile.checkpoint.checkpoint import Checkpoint, open_checkpoint
from ...compile.checkpoint.names import EMBEDDING
from ...compile.export.prefix import prefix_cache
from ...compile.quantize.calibration_file import Calibration
from ...compile.quantize.int_arithmetic import unpack_int4
from ...compile.quantize.quantize import (
    CALIBRATIONS,
    QuantisedTensors,
    calibrated_cache_scales,
    input_shifts,
    quantised_rows,
)
from ...graphs.bundle import Bundle
from ...graphs.errors import DataError, ModelError
from ...graphs.modules.quantized import WEIGHT, cache_scale_names, is_cache_scale
from ...graphs.targets import find_target
from ...graphs.vision_contract import vision_readings
from .compare import BOUNDS, first_wrong, tensor_error
from .quantised_checks import QuantisedWeights, WrongError
from .stored_graph import StoredGraph, all_weights, stored_tensor
from .verify_report import CheckResult
from .verify_target import NothingError, VerifyTarget


def open_origin(bundle: Bundle, model: str) -> Checkpoint:
    """Open the checkpoint ``model`` on this machine; nothing is downloaded.

    Raises:
        ModelError: it cannot be opened, or has another shape than the bundle's model.
    """
    checkpoint = open_checkpoint(model, offline=True)
    built = bundle.manifest.config  # perhaps with a budget, or on a canvas, that the model has not
    config = replace(checkpoint.config, limits=built.limits, canvas=built.canvas)
    checkpoint = replace(checkpoint, config=config)
    if checkpoint.config != built:
        raise ModelError(
            f"{model} has other sizes than the model '{bundle.manifest.model}' of {bundle.path}. "
            "Name the checkpoint that the bundle was built from: --model CHECKPOINT"
        )
    return checkpoint


def open_calibration(bundle: Bundle, folder: Path | None) -> Calibration | None:
    """Open the calibration that ``bundle`` rests on: in ``folder``, or in the usual place if there.

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


def check_weights(target: VerifyTarget) -> CheckResult:
    """Compare every weight with the checkpoint's: bit for bit, or within what rounding makes of it.

    With the calibration that the bundle rests on, what was rounded is rounded again.
    """
    bundle, checkpoint, calibration = target.bundle, target.checkpoint, target.calibration
    manifest, arrays = bundle.manifest, all_weights(bundle)
    quantised = QuantisedWeights(manifest, checkpoint, arrays)
    facts: dict[str, Any] = {"tensors": len(arrays) + 1}
    failure = ""
    try:
        _require_unchanged(target, quantised)
        if manifest.quantization.quantises_cache:
            facts["scales of caches"] = _check_cache_scales(target, arrays)
        if manifest.quantization.schemes:
            facts["rounded or folded layers"] = quantised.layers
            quantised.check()
            if calibration is not None:
                _round_again(target, calibration, arrays)
    except WrongError as error:
        failure = f"weight {error}"
    if "rounded or folded layers" in facts:
        facts["largest rounding error"] = f"{quantised.worst / 2:.4f} steps"
        if quantised.hidden:
            facts["not checked: channels whose norm is 0"] = quantised.hidden
    known = manifest.quantization.calibration
    if calibration is not None and manifest.quantization.quantises:
        facts["rounded again"] = f"with calibration {calibration.hash[:12]}, bit for bit"
    elif known is not None and manifest.quantization.quantises:
        facts["not checked"] = (
            "input scales, scales of caches and strengths of smoothing, against calibration "
            f"{known[:12]}: --calib CALIBRATION"
        )
    return CheckResult(failure, target.files, facts=facts)


def check_prefix(target: VerifyTarget) -> CheckResult:
    """Compare the shipped keys and values of the prefix with those computed from the checkpoint."""
    bundle, checkpoint = target.bundle, target.checkpoint
    manifest, shipped = bundle.manifest, bundle.manifest.prefix
    if shipped is None:
        raise NothingError("the template begins with the image, or differently every time")
    again = prefix_cache(checkpoint, manifest.plan, shipped.ids)
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


def _require_unchanged(target: VerifyTarget, quantised: QuantisedWeights) -> None:
    """Compare what was not rounded with the checkpoint, bit for bit.

    Raises:
        WrongError: the first that differs.
    """
    bundle, checkpoint = target.bundle, target.checkpoint
    manifest, wanted = bundle.manifest, checkpoint.load(EMBEDDING)
    if "vocabulary" in vision_readings(
        manifest.config, manifest.plan
    ):  # a graph reads it, in its own type
        wanted = wanted.to(getattr(torch, manifest.dtype))
    if not _same(stored_tensor(bundle, manifest.embedding), wanted):
        raise WrongError(f"{EMBEDDING} is not the checkpoint's")
    for graph_name in manifest.graphs:
        graph = StoredGraph(bundle, graph_name)
        for name in graph.weights:
            if quantised.touches(name) or is_cache_scale(name):
                continue
            found = torch.from_numpy(graph.weights[name])
            if not _same(found, checkpoint.load(name).to(found.dtype)):
                raise WrongError(f"{name} of {graph.fact.file} is not the checkpoint's")
            checkpoint.release()


def _check_cache_scales(target: VerifyTarget, arrays: Mapping[str, np.ndarray]) -> int:
    """Make sure that graphs and runtime have the same scales of an INT8 cache, above 0, and those
    that the calibration makes where it is given; return how many there are.

    Raises:
        WrongError: the first that is not.
    """
    manifest = target.bundle.manifest
    assert manifest.cache_scales is not None
    noted = stored_tensor(target.bundle, manifest.cache_scales).float().numpy()
    made = None
    if target.calibration is not None:
        made = calibrated_cache_scales(target.calibration, half=manifest.dtype == "float16")
    attending = [layer for stage in manifest.plan.stages for layer in stage.attention_layers]
    for layer in attending:
        for number, name in enumerate(cache_scale_names(layer)):
            found = arrays[name].astype(np.float32)
            if not (np.isfinite(found) & (found > 0)).all():
                raise WrongError(f"{name} holds what is not above 0 or not finite")
            if not np.array_equal(found, noted[number, layer]):
                raise WrongError(f"{name} is not what the manifest tells the runtime")
            if made is not None and not np.array_equal(found, made[number, layer]):
                raise WrongError(f"{name} is not what the calibration makes of it")
    return 2 * len(attending)


def _round_again(
    target: VerifyTarget, calibration: Calibration, arrays: Mapping[str, np.ndarray]
) -> None:
    """Compare every tensor that a build makes of checkpoint and calibration, bit for bit.

    Raises:
        WrongError: the first that differs.
    """
    manifest = target.bundle.manifest
    tensors = QuantisedTensors(
        target.checkpoint,
        manifest.quantization,
        calibration,
        half=manifest.dtype == "float16",
        engines=find_target(manifest.target).engines,
        shifts=input_shifts(manifest.fallback),
    )
    for name in sorted(name for name in arrays if tensors.changes(name)):
        found, want = torch.from_numpy(arrays[name]), tensors.tensor(name)
        if name.endswith(WEIGHT["w4"]):
            want = torch.from_numpy(unpack_int4(want.numpy(), tuple(found.shape)))
        if not _same(found, want.to(found.dtype)):
            raise WrongError(f"{name} is not what checkpoint and calibration make of it")


def _same(found: Tensor, wanted: Tensor) -> bool:
    """Return whether two tensors are equal bit for bit: a NaN equals itself."""
    if found.dtype != wanted.dtype or found.shape != wanted.shape:
        return False
    return torch.equal(*(tensor.reshape(-1).view(torch.uint8) for tensor in (found, wanted)))
