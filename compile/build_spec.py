"""Everything that a build decides before it writes a byte: what, for which machine, how exact.

Two specs with the same ``source`` give the same bytes, on any machine.
"""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from importlib import metadata
from pathlib import Path

import onnx_ir
import psutil
import torch

from .. import __version__
from ..graphs.bundle import MANIFEST_FORMAT
from ..graphs.caches import cache_dtype
from ..graphs.commands import visistage
from ..graphs.config import ModelConfig
from ..graphs.errors import CapacityError, DataError, TargetError
from ..graphs.families.registry import FAMILIES
from ..graphs.fields import to_json
from ..graphs.parts import StagePart
from ..graphs.plan.plan import StagePlan
from ..graphs.plan.routing import Routing
from ..graphs.precision import NO_FALLBACK, Fp32Fallback
from ..graphs.presets.request import UNCALIBRATED
from ..graphs.quantization import (
    FLOAT,
    QUANTISED,
    QuantConfig,
    Quantization,
    base_of,
    is_quantised,
    parse_quant_config,
)
from ..graphs.targets import Target
from .checkpoint.checkpoint import Checkpoint
from .checkpoint.known_models import ALIASES, KNOWN_MODELS, model_config
from .checkpoint.names import tensor_shapes
from .checkpoint.routers import check_routers
from .export.export import Graph, graphs_of
from .export.static_shapes import resolve_contexts, resolve_parts
from .export.texts import TextFacts, text_facts
from .planfile import resolve_plan
from .quantize.calibration_file import Calibration
from .quantize.quantize import CALIBRATIONS, QuantisedTensors, check_sizes, input_shifts, resolve

NO_SETTINGS = "; of this family of models no settings were published"


@dataclass(frozen=True)
class BuildSpec:
    """A build that was decided, and can be carried out.

    Attributes:
        precision: as folder and manifest name it; of a quantised one its recipe.
        dtype: of the float numbers in the graphs.
        parts: how stages are cut; None: each is one graph.
    """

    checkpoint: Checkpoint
    plan: StagePlan
    target: Target
    precision: str
    dtype: str
    texts: TextFacts
    contexts: tuple[int, ...] = ()
    parts: Sequence[StagePart] | None = None
    quantization: Quantization = FLOAT
    calibration: Calibration | None = None

    @property
    def config(self) -> ModelConfig:
        """The model's config."""
        return self.checkpoint.config

    @property
    def name(self) -> str:
        """Name of the bundle's folder."""
        tokens = self.checkpoint.image_tokens
        limits = "" if tokens is None else f"-images{tokens}"
        if self.config.canvas is not None:
            limits += "-canvas{}x{}".format(*self.config.canvas)
        return f"{self.plan.name}-{self.precision}-{self.target.name}{limits}"

    @property
    def prefix_ids(self) -> tuple[int, ...]:
        """Ids of rows that are computed when the bundle is built; none where a plan compares all
        rows of a prompt, the prefix's among them.
        """
        return () if self.plan.whole_prompt else self.texts.prefix_ids

    @property
    def cache_dtype(self) -> str:
        """Type of cached keys and values."""
        return cache_dtype(self.dtype, self.quantization.cache)

    @property
    def half(self) -> bool:
        """True if graphs compute in FP16, whose range must be checked."""
        return self.dtype == "float16"

    @property
    def source(self) -> str:
        """Hash of what the bundle is made from, the same on every machine."""
        facts = [
            MANIFEST_FORMAT,
            self.config.to_dict(),
            self.plan.to_dict(),
            self.target.name,
            self.target.lowering,
            self.precision,
            to_json(self.quantization),
            versions(),
            self.contexts,
            [part.layers for part in self.parts or ()],
        ]
        return hashlib.sha256(json.dumps(facts, sort_keys=True).encode()).hexdigest()

    def graphs(self, fallback: Fp32Fallback = NO_FALLBACK) -> list[Graph]:
        """Return every graph to export."""
        return graphs_of(
            self.config,
            self.plan,
            self.dtype,
            self.target.lowering,
            self.parts,
            fallback,
            self.quantization,
            engines=self.target.engines,
        )

    def quantised_tensors(self, fallback: Fp32Fallback = NO_FALLBACK) -> QuantisedTensors | None:
        """Return where quantised weights come from; None where nothing is quantised."""
        if not self.quantization.schemes:
            return None
        return QuantisedTensors(
            self.checkpoint,
            self.quantization,
            self.calibration,
            half=self.half,
            engines=self.target.engines,
            shifts=input_shifts(fallback),
        )


def resolve_build(
    checkpoint: Checkpoint,
    *,
    plan: str | None,
    target: Target,
    precision: str,
    contexts: Sequence[int] = (),
    build_memory: int | None = None,
    calibration: str | Path | None = None,
) -> BuildSpec:
    """Decide everything; arguments are those of ``build.make_bundle``.

    Raises:
        VisistageError: something cannot be honoured; nothing was written.
    """
    config = checkpoint.config
    quant_config = parse_quant_config(precision) if is_quantised(precision) else None
    known = _calibration(checkpoint, quant_config, calibration)
    if known is not None:
        check_sizes(known, config)
    if known is None or plan is not None:
        default = FAMILIES[config.family].plan
        staged = resolve_plan(plan or default, config.text.layers, config.visual_tokens)
        if default == "dense" and staged.note.startswith(UNCALIBRATED):
            staged = replace(staged, note=staged.note + NO_SETTINGS)
    else:
        staged = known.plan
    check_routers(checkpoint, staged, named=plan is not None)
    quantization = FLOAT
    ranges = known if known is not None and known.groups else None  # a plan alone quantises nothing
    if quant_config is not None:
        if ranges is not None and not _serves(ranges.plan, staged, quant_config):
            wanted = plan if staged.probe is None else "dense"
            raise DataError(
                f"the calibration of '{checkpoint.name}' was made for plan '{ranges.plan.name}', "
                f"under '{staged.name}' layers see other rows. Leave the plan out, or calibrate "
                f"for it: {visistage('calibrate', checkpoint.name, plan=wanted)}"
            )
        quantization = resolve(quant_config, ranges, config, staged, target)
        precision = quant_config.name
    elif calibration is not None and plan is not None:
        raise TargetError(
            f"nothing of a calibration is used in {precision} with a plan of your own. "
            "Leave --calib out, or the plan, or quantise: --precision int8"
        )
    dtype = target.dtype(precision)
    return BuildSpec(
        checkpoint=checkpoint,
        plan=staged,
        target=target,
        precision=precision,
        dtype=dtype,
        texts=text_facts(checkpoint),
        contexts=resolve_contexts(target, config, contexts),
        parts=resolve_parts(target, config, staged, dtype, build_memory),
        quantization=quantization,
        calibration=ranges if quant_config is not None else None,
    )


def dummy_routing(model: str, plan: str | None) -> Routing | None:
    """Return the routing of the plan that a checkpoint of random weights is made for."""
    if plan is None or model not in {*KNOWN_MODELS, *ALIASES.values()}:
        return None
    config = model_config(model)
    return resolve_plan(plan, config.text.layers, config.visual_tokens).routing


def check_geometry(model: str, target: Target, precision: str) -> None:
    """Refuse a published model that cannot run here, before gigabytes are fetched or made."""
    if model in KNOWN_MODELS:
        shapes = tensor_shapes(ModelConfig.from_hf(KNOWN_MODELS[model].config))
        bits = _bits(target, precision)
        values = sum(math.prod(shape) for shape in shapes.values())
        check_memory(target, precision, values * bits // 8)


def _serves(calibrated: StagePlan, staged: StagePlan, quant_config: QuantConfig) -> bool:
    """Return whether ranges made for one plan serve another under a recipe.

    A plan that decides per prompt has no rows of its own to calibrate on. Its caches never hold
    rows that the dense model has not, so dense ranges serve them; inputs of layers are rounded
    under their own ranges only.
    """
    staged_rows, calibrated_rows = (
        replace(plan, name="plan", note="", calibrated=False) for plan in (staged, calibrated)
    )
    if staged_rows == calibrated_rows:
        return True
    return staged.probe is not None and calibrated.is_dense and "w8a8" not in quant_config.asked


def versions() -> dict[str, str]:
    """Return the versions of what builds a bundle."""
    return {
        "visistage": __version__,
        "torch": torch.__version__.split("+")[0],
        "onnx_ir": onnx_ir.__version__,
        "transformers": metadata.version("transformers"),
    }


def _calibration(
    checkpoint: Checkpoint, quant_config: QuantConfig | None, given: str | Path | None
) -> Calibration | None:
    """Return the calibration named, or for a quantised precision the one in the usual place."""
    if given is not None:
        return Calibration.load(Path(given))
    usual = CALIBRATIONS / checkpoint.name
    if quant_config is not None and usual.is_dir():
        return Calibration.load(usual)
    return None


def _bits(target: Target, precision: str) -> int:
    """Return about how many bits a weight takes in a precision."""
    quantised = {"int8": 8, "w8": 9, "w4": 5}
    bits = quantised.get(base_of(precision), 8 * getattr(torch, target.dtype(precision)).itemsize)
    decode = parse_quant_config(precision).decode if is_quantised(precision) else None
    return bits + (quantised[decode] if decode else 0)


def check_memory(target: Target, precision: str, nbytes: int) -> None:
    """Refuse ``nbytes`` of weights that the machine cannot hold, if it is to run them."""
    memory = psutil.virtual_memory().total
    if target.local and nbytes > memory:
        smaller = "" if is_quantised(precision) else ", quantise (--precision int8, or w4)"
        raise CapacityError(
            f"in {precision} the weights take {nbytes / 2**30:.1f} GiB, this machine has "
            f"{memory / 2**30:.1f} GiB of memory, so target '{target.name}' cannot run them here. "
            f"Export FP16 graphs for a GPU instead (--target cuda){smaller}, or take a smaller "
            "model"
        )


def with_kept(precision: str | None, kept: Sequence[str]) -> str | None:
    """Return a precision with the layers that ``--keep-float`` names added to it.

    Raises:
        TargetError: the precision quantises nothing.
    """
    if not kept:
        return precision
    if precision is None or not is_quantised(precision):
        raise TargetError(
            "--keep-float keeps layers of a quantised precision float, "
            f"{precision or 'the default'} quantises none. Choose one of {', '.join(QUANTISED)}, "
            "or leave it out"
        )
    return "+".join([precision, *(f"keep={layer}" for layer in kept)])
