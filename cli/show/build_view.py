"""Whether ``visistage engines`` also compiles: a question of target, machine and wish."""

from __future__ import annotations

from collections.abc import Sequence

from rich.console import Console

from ...compile.engines.engines import can_compile
from ...graphs.errors import MissingDependencyError, TargetError
from ...graphs.quantization import QUANTISED, is_quantised
from ...graphs.targets import Capability, find_target
from ...runtime.device.tensorrt import INSTALL, find_trt_variant
from ...runtime.hardware import find_gpu


def with_kept(precision: str | None, kept: Sequence[str]) -> str | None:
    """A precision with the layers that ``--keep-float`` names added to its recipe.

    Raises:
        TargetError: nothing is quantised that could be kept from it.
    """
    if not kept:
        return precision
    if precision is None or not is_quantised(precision):
        raise TargetError(
            "--keep-float keeps layers of a quantised precision float, "
            f"{precision or 'the default'} quantises none. Choose one of {', '.join(QUANTISED)}, "
            "or leave it out"
        )
    return "+".join([precision, *(f"keep={one}" for one in kept)])


def compile_here(name: str, portable: bool, capabilities: Sequence[Capability]) -> bool:
    """Decide, before minutes are spent, and say so where the bundle will stay portable.

    Raises:
        TargetError: an option that means nothing for the target.
        MissingDependencyError: a compiler that needs no GPU is not installed.
    """
    target = find_target(name)
    if not target.engines:
        for option, given in (("--portable", portable), ("--sm", bool(capabilities))):
            if given:
                raise TargetError(
                    f"target '{name}' compiles no engines, {option} means nothing there. "
                    "Leave it out"
                )
        return False
    why = "--portable was given" if portable else can_compile(target, find_gpu())
    if why is None:
        return True
    trt_variant = find_trt_variant(target.backend)
    if not portable and not target.capabilities and trt_variant is None:
        raise MissingDependencyError(
            f"target '{name}' is compiled by {target.backend}, which is not installed here. "
            f"{INSTALL[target.backend]}. Or stop at a portable bundle: --portable"
        )
    if capabilities:
        raise TargetError(f"--sm cannot be honoured: {why}")
    Console(stderr=True, highlight=False, soft_wrap=True).print(
        f"the bundle will be portable: {why}. Finish it on its machine: visistage build BUNDLE"
    )
    return False
