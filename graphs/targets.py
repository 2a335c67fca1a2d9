"""The kinds of machine that run bundles: data, in one place. No logic but the look-ups.

Source of versions and limits: NVIDIA's support matrices. Of operators: onnx-tensorrt's tables for
TensorRT 8.4 and 10.15, and what TensorRT-RTX's parser was seen to take; the table for 10.3 itself
was not at hand.
"""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass
from importlib import metadata

from .contract import ORT_LLM_SINCE
from .errors import TargetError, nearest
from .quantization import QUANTISED, base_of, is_quantised

DTYPES = {"fp32": "float32", "fp16": "float16"}

QUANTISED_LLM = ("int8", "w8", "w4")
"""Quantised precisions of the ``llm`` lowerings. The ``portable`` one has none with scales in
blocks, which came with opset 21."""

LLM, LLM_CONDITIONAL, PORTABLE = LOWERINGS = "llm", "branched", "portable"
"""The operators that graphs are written in (``graphs/modules``): ``Llm``; ``LlmConditional``;
``Portable``."""

ONNXRUNTIME, OPENVINO = "onnxruntime", "openvino"
ORT_PACKAGES = "onnxruntime", "onnxruntime-gpu"
"""Distributions of ONNX Runtime. They write one folder: what is installed last is there."""

TENSORRT, TENSORRT_RTX = "tensorrt", "tensorrt_rtx"

Capability = tuple[int, int]
"""A CUDA compute capability: (8, 7) is an Orin's."""

MAX_HEAD = 256
"""Widest attention head that TensorRT has a fused kernel for."""

BASIC_OPERATORS = frozenset(
    """Abs Add And ArgMax ArgMin Cast CastLike Ceil Clip Concat Constant ConstantOfShape Conv Cos
    CumSum DequantizeLinear Div Einsum Equal Erf Exp Expand Flatten Floor Gather GatherElements
    GatherND Gelu Gemm Greater GreaterOrEqual Identity If LayerNormalization Less LessOrEqual Log
    LogSoftmax Loop MatMul Max Mean Min Mod Mul Neg Not OneHot Or Pad Pow QuantizeLinear Range
    Reciprocal ReduceL1 ReduceL2 ReduceMax ReduceMean ReduceMin ReduceProd ReduceSum
    ReduceSumSquare Relu Reshape Resize Round ScatterElements ScatterND Shape Sigmoid Sign Sin Size
    Slice Softmax Softplus Split Sqrt Squeeze Sub Sum Tanh Tile TopK Transpose Trilu Unsqueeze Where
    Xor""".split()  # noqa: SIM905
)
"""ONNX operators that TensorRT 10.3 is taken to import without a plugin: those of the table for
8.4, and a few that came between the two (CastLike, Gelu, LayerNormalization, Mod, OneHot,
Reciprocal, Trilu).
"""

LLM_OPERATORS = BASIC_OPERATORS | {
    "Attention",
    "RMSNormalization",
    "RotaryEmbedding",
    "TensorScatter",
}
"""With the operators of language models, which came in 10.14 and 10.15."""


@dataclass(frozen=True)
class Target:
    """One kind of machine.

    Attributes:
        backend: who runs it: ``onnxruntime``, ``openvino``, ``tensorrt`` or ``tensorrt_rtx``.
        lowering: one of ``LOWERINGS``.
        precisions: what it runs, its default first.
        opset: the highest ONNX opset it reads.
        operators: what it imports; None: everything of its opset.
        versions: first version of the back end that serves, and the first one that does not.
        capabilities: compute capabilities of its GPUs; engines are built for these. Empty: as the
            compiler's default, or whatever GPU is there.
        build_memory: bytes that compiling one engine may take, unless set otherwise.
        int8_cache: whether it runs graphs over INT8 caches.
        local: whether the weights must fit the memory of the machine that builds, because that is
            where it runs.
    """

    name: str
    summary: str
    backend: str = ONNXRUNTIME
    lowering: str = LLM
    precisions: tuple[str, ...] = ("fp16", "fp32")
    opset: int = 24
    operators: frozenset[str] | None = None
    versions: tuple[str, str | None] = ("1.25", None)
    capabilities: tuple[Capability, ...] = ()
    build_memory: int | None = None
    int8_cache: bool = False
    local: bool = False

    @property
    def engines(self) -> bool:
        """True where a bundle is finished by compiling engines."""
        return self.backend in (TENSORRT, TENSORRT_RTX)

    def serves(self, version: str) -> bool:
        """Return whether a back end's version is in the target's range."""
        first, stop = self.versions
        return _numbers(first) <= _numbers(version) and (
            stop is None or _numbers(version) < _numbers(stop)
        )

    @property
    def schemes(self) -> tuple[str, ...]:
        """Schemes of linear layers (``quantization.Scheme``) that it runs."""
        quantised = [precision for precision in self.precisions if precision in QUANTISED]
        return tuple("w8a8" if name == "int8" else name for name in quantised)

    def dtype(self, precision: str) -> str:
        """Return the type of a graph's float numbers: engines fuse integers into FP16 graphs, what
        runs graphs on a CPU into FP32 graphs only.
        """
        return DTYPES.get(base_of(precision), "float16" if self.engines else "float32")

    def returns_new_rows(self, cache: str) -> bool:
        """Return whether its stages return new cache rows, not whole caches of type ``cache``."""
        return self.lowering == PORTABLE or (
            self.engines and cache == "int8" and self.lowering == LLM
        )

    @property
    def steps(self) -> bool:
        """True where calls of one row may have graphs of their own."""
        return self.lowering == LLM_CONDITIONAL

    @property
    def static_slots(self) -> bool:
        """True where the compiler wants the number of cache slots fixed (an aliased cache)."""
        return self.engines and self.lowering == LLM


def _tensorrt(name: str, summary: str, capability: Capability | None, **facts) -> Target:
    """Return a target of TensorRT proper from 10.15 on, unless ``facts`` say otherwise."""
    capabilities = () if capability is None else (capability,)
    defaults = {
        "backend": TENSORRT,
        "operators": LLM_OPERATORS,
        "versions": ("10.15", "12"),
        "build_memory": 24 << 30,
        "precisions": ("fp16", "fp32", *QUANTISED_LLM),
        "int8_cache": True,
    }
    return Target(name, summary, capabilities=capabilities, **{**defaults, **facts})


TARGETS = {
    target.name: target
    for target in (
        Target(
            "cpu",
            "ONNX Runtime on this CPU",
            lowering=LLM_CONDITIONAL,
            precisions=("fp32", *QUANTISED_LLM),
            int8_cache=True,
            local=True,
        ),
        Target(
            "cpu-portable",
            "ONNX Runtime before 1.25, basic operators only",
            lowering=PORTABLE,
            precisions=("fp32", "int8"),
            opset=20,
            versions=("1.23", None),
            int8_cache=True,
            local=True,
        ),
        Target(
            "openvino",
            "OpenVINO on this CPU",
            backend=OPENVINO,
            lowering=PORTABLE,
            precisions=("fp32", "int8"),
            opset=20,
            versions=("2026.0", None),
            local=True,
        ),
        Target(
            "cuda",
            "ONNX Runtime on an NVIDIA GPU",
            versions=("1.31.1", None),  # kernels before it wait for the host in every layer
        ),
        _tensorrt(
            "rtx",
            "TensorRT-RTX: GeForce and RTX cards; its compiler needs no GPU",
            None,
            backend=TENSORRT_RTX,
            versions=("1.7", "2"),
            build_memory=12 << 30,
        ),
        _tensorrt(
            "dgx-spark",
            "TensorRT-RTX on a DGX Spark",
            (12, 1),
            backend=TENSORRT_RTX,
            versions=("1.7", "2"),
            build_memory=48 << 30,
        ),
        _tensorrt("h100", "TensorRT on an H100", (9, 0), build_memory=48 << 30),
        _tensorrt("h200", "TensorRT on an H200", (9, 0), build_memory=48 << 30),
        _tensorrt(
            "orin-jp62",
            "TensorRT 10.3 on a Jetson Orin with JetPack 6.2",
            (8, 7),
            lowering=PORTABLE,
            precisions=("fp16", "fp32", "int8", "w8"),
            opset=20,
            operators=BASIC_OPERATORS,
            versions=("10.3", "10.4"),
            build_memory=10 << 30,
        ),
        _tensorrt(
            "orin-jp72",
            "TensorRT 10.16 on a Jetson Orin with JetPack 7.2",
            (8, 7),
            build_memory=10 << 30,
        ),
        _tensorrt(
            "thor-jp72",
            "TensorRT 10.16 on a Jetson Thor with JetPack 7.2",
            (11, 0),
            build_memory=24 << 30,
        ),
    )
}


def find_target(name: str) -> Target:
    """Return the target called ``name``.

    Raises:
        TargetError: unknown.
    """
    target = TARGETS.get(name)
    if target is not None:
        return target
    hint = nearest(name, tuple(TARGETS))
    raise TargetError(f"unknown target '{name}'.{hint} Known: {', '.join(TARGETS)}")


def resolve_target(name: str, precision: str | None) -> tuple[Target, str]:
    """Return the target called ``name`` and the precision to build it in.

    Raises:
        TargetError: unknown, or a precision the target does not run.
    """
    target = find_target(name)
    if target.name == "cpu" and _ort_version() < ORT_LLM_SINCE:
        target = TARGETS["cpu-portable"]
    precision = precision or target.precisions[0]
    if base_of(precision) not in target.precisions:
        why = ""
        if base_of(precision) == "fp16":
            why = " (a CPU computes FP16 graphs in FP32, from twice the memory)"
        elif is_quantised(precision) and target.name == "cuda":
            why = " (ONNX Runtime's kernels for it are not ones this project has seen run)"
        elif is_quantised(precision):
            why = " (its opset has no scales in blocks)"
        raise TargetError(
            f"target '{target.name}' does not run precision '{precision}'{why}. "
            f"It runs: {', '.join(target.precisions)}"
        )
    return target, precision


def check_operators(target: Target, graph: str, opset: int, operators: Collection[str]) -> None:
    """Refuse a graph that the target's parser would not read, before it is written.

    Raises:
        TargetError: naming graph, operator (or opset) and target.
    """
    if opset > target.opset:
        raise TargetError(
            f"graph '{graph}' is written in opset {opset}, target '{target.name}' reads up to "
            f"{target.opset}"
        )
    foreign = set() if target.operators is None else set(operators) - target.operators
    if foreign:
        raise TargetError(
            f"graph '{graph}' uses {', '.join(sorted(foreign))}, which target '{target.name}' "
            f"({target.backend} {target.versions[0]}) does not import. Choose another plan, or "
            "another target: visistage doctor lists them"
        )


def parse_capability(text: str) -> Capability:
    """Return ``86``, ``8.6`` or ``sm_120`` as a pair.

    Raises:
        TargetError: it is neither.
    """
    digits = text.strip().lower().removeprefix("sm_").removeprefix("sm").replace(".", "")
    if not digits.isdecimal() or len(digits) < 2:
        raise TargetError(f"'{text}' is no compute capability. Write one like 86 or 8.6")
    return int(digits[:-1]), int(digits[-1])


def show_capability(capability: Capability) -> str:
    """Return ``sm_86`` for (8, 6)."""
    return f"sm_{capability[0]}{capability[1]}"


def _ort_version() -> tuple[int, int]:
    """Return (major, minor) of the installed ONNX Runtime without loading it."""
    for name in ORT_PACKAGES:
        try:
            major, minor = metadata.version(name).split(".")[:2]
            return int(major), int(minor)
        except metadata.PackageNotFoundError:
            continue
    return ORT_LLM_SINCE


def _numbers(version: str) -> tuple[int, ...]:
    return tuple(int(part) for part in version.split(".")[:3] if part.isdecimal())
