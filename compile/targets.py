"""Where a bundle can run: data, in one place. No logic but the look-ups."""

from __future__ import annotations

import difflib
from dataclasses import dataclass
from importlib import metadata

from ..graphs.contract import ORT_LLM_SINCE
from ..graphs.errors import TargetError

DTYPES = {"fp32": "float32", "fp16": "float16"}


@dataclass(frozen=True)
class Target:
    """One kind of machine.

    ``precisions``: what it runs, its default first. ``local``: whether the weights must fit the
    memory of the machine that builds, because that is where it runs.
    """

    name: str
    lowering: str
    precisions: tuple[str, ...]
    local: bool
    summary: str


TARGETS = {
    target.name: target
    for target in (
        Target("cpu", "llm", ("fp32",), True, "ONNX Runtime on this CPU"),
        Target(
            "cpu-portable",
            "portable",
            ("fp32",),
            True,
            "ONNX Runtime before 1.25, basic operators only (opset 20)",
        ),
        Target("cuda", "llm", ("fp16", "fp32"), False, "ONNX Runtime on an NVIDIA GPU"),
    )
}

LATER_TARGETS = (
    "openvino",
    "rtx",
    "dgx-spark",
    "h100",
    "h200",
    "orin-jp62",
    "orin-jp72",
    "thor-jp72",
)
LATER_PRECISIONS = ("int8", "int4", "w8", "w4")


def resolve_target(name: str, precision: str | None) -> tuple[Target, str]:
    """The target called ``name`` and the precision to build it in.

    Raises:
        TargetError: unknown, not in this version, or a precision the target does not run.
    """
    target = TARGETS.get(name)
    if target is None:
        if name in LATER_TARGETS:
            raise TargetError(
                f"target '{name}' is planned, this version does not build it. "
                f"It builds: {', '.join(TARGETS)}"
            )
        near = difflib.get_close_matches(name, TARGETS, 1)
        hint = f" Did you mean '{near[0]}'?" if near else ""
        raise TargetError(f"unknown target '{name}'.{hint} Known: {', '.join(TARGETS)}")
    if target.name == "cpu" and _ort_version() < ORT_LLM_SINCE:
        target = TARGETS["cpu-portable"]
    precision = precision or target.precisions[0]
    if precision not in target.precisions:
        why = ""
        if precision in LATER_PRECISIONS:
            why = " (planned, not in this version)"
        elif precision == "fp16":
            why = " (ONNX Runtime computes FP16 graphs in FP32 on a CPU, from twice the memory)"
        raise TargetError(
            f"target '{target.name}' does not run precision '{precision}'{why}. "
            f"It runs: {', '.join(target.precisions)}"
        )
    return target, precision


def _ort_version() -> tuple[int, int]:
    """(major, minor) of the installed ONNX Runtime, asked without loading it."""
    for name in ("onnxruntime", "onnxruntime-gpu"):
        try:
            major, minor = metadata.version(name).split(".")[:2]
            return int(major), int(minor)
        except metadata.PackageNotFoundError:
            continue
    return ORT_LLM_SINCE
