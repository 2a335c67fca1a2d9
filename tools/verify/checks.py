"""The checks, cheap and decisive ones first: what each compares, and when it passes.

    files ─ weights, prefix ─ Hugging Face ─ torch stages ─ ONNX Runtime ─ variants ─ engines
                                    float ─┴─ quantised

Modules that import torch or onnx are imported when their checks run, so that a machine with the
runtime alone runs the others.
"""

from __future__ import annotations

import pkgutil
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from functools import partial
from itertools import groupby
from typing import Any

from .compare import BOUNDS, bounds_of, strict
from .verify_report import CheckResult
from .verify_target import VerifyTarget


@dataclass(frozen=True)
class Check:
    """A comparison of two neighbours.

    Attributes:
        name: as reports have it; one with ``{graph}`` is a check of every graph.
        compares: the two.
        rule: when it passes; may have the fields of ``rule_words``.
        run: takes a ``VerifyTarget`` and, where it is one of every graph, the graph's name; raises
            ``ImpossibleError`` or ``NothingError`` where it cannot run, any other error to fail.
        needs: modules that must be installed.
    """

    name: str
    compares: str
    rule: str
    run: Callable[..., CheckResult]
    needs: tuple[str, ...] = ()

    @property
    def of_graphs(self) -> bool:
        """Return whether there is one for every graph."""
        return "{graph}" in self.name


def lazy(function: str) -> Callable[..., CheckResult]:
    """Return a call of ``module:function`` of this package, imported when it is called."""
    return lambda *given: pkgutil.resolve_name(f"{__package__}.{function}")(*given)


TORCH = ("torch", "onnx_ir")
COMPILER = (*TORCH, "onnx", "transformers")
SPREAD = "of the reference's spread"

CHECKS = (
    Check(
        "files",
        "the bundle's files and the manifest's hashes",
        "every byte as it was built",
        lazy("runtime_checks:check_files"),
    ),
    Check(
        "weights",
        "the checkpoint and the graphs' weights",
        "every bit equal in the bundle's type; integers within half a step",
        lazy("origin:check_weights"),
        TORCH,
    ),
    Check(
        "prefix",
        "the checkpoint and the shipped prefix cache",
        f"errors up to {{floats.graph:g}} {SPREAD}",
        lazy("origin:check_prefix"),
        TORCH,
    ),
    Check(
        "hugging face",
        "Hugging Face and the torch stages, both unpruned, in FP32",
        "tokens equal, logits within {fp32.whole:g} of their spread",
        lazy("hugging_face:compare_dense"),
        COMPILER,
    ),
    Check(
        "quantisation",
        "the checkpoint's own weights and the rounded ones, both in torch, same plan",
        "logits finite, within their spread in the root mean square",
        lazy("answer_checks:compare_quantised"),
        TORCH,
    ),
    Check(
        "graph {graph}",
        "the torch stage in FP32 and the file in ONNX Runtime",
        f"errors up to {{strict.graph:g}} {SPREAD}{{loose_graph}}{{half_of}}",
        lazy("graph_checks:compare_onnxruntime"),
        TORCH,
    ),
    Check(
        "half {graph}",
        "the torch stage in FP32 and in FP16 arithmetic",
        f"errors up to {{half.graph:g}} {SPREAD}, all finite{{half_of}}",
        lazy("graph_checks:compare_half"),
        TORCH,
    ),
    Check(
        "runtime",
        "answers of the runtime: new, from its caches, by a new session",
        "all equal, logits finite",
        lazy("runtime_checks:compare_repeats"),
    ),
    Check(
        "answers",
        "the torch chain in FP32 and the runtime on ONNX Runtime",
        "{equal}, logits within {strict.whole:g} of their spread{loose_whole}{half_of}",
        lazy("answer_checks:compare_runtime"),
        TORCH,
    ),
    Check(
        "half answers",
        "the torch chain in FP32 and in FP16 arithmetic",
        "{tied}, logits within {half.whole:g} of their spread, all finite{half_of}",
        lazy("answer_checks:compare_half"),
        TORCH,
    ),
    Check(
        "variants",
        "the graphs for engine compilers and those that ONNX Runtime ran",
        "equal but for fixed sizes and permission to decompose attention",
        lazy("variants:compare_variants"),
        ("onnx", *TORCH),
    ),
    Check(
        "engines",
        "the engines, their index and the manifest",
        "compiled from this bundle, complete, every byte as it was compiled",
        lazy("runtime_checks:check_engines"),
    ),
    Check(
        "engine runs",
        "ONNX Runtime, and the engines or OpenVINO",
        "errors within the precision's tolerance",
        lazy("runtime_checks:compare_engines"),
    ),
)


def checks_of(target: VerifyTarget) -> Iterator[Check]:
    """Yield every check of ``target``, ready to be run without arguments."""
    words = rule_words(target)
    for of_graphs, group in groupby(CHECKS, lambda check: check.of_graphs):
        checks = list(group)
        for given in [(graph,) for graph in target.bundle.manifest.graphs] if of_graphs else [()]:
            for check in checks:
                yield replace(
                    check,
                    name=check.name.format(graph=given[0]) if given else check.name,
                    rule=check.rule.format(**words),
                    run=partial(check.run, target, *given),
                )


def rule_words(target: VerifyTarget) -> dict[str, Any]:
    """Return what rules say of ``target``: bounds, and phrases that depend on them."""
    kinds = target.kinds
    exact, loose = bounds_of(strict(kinds)), bounds_of(kinds)
    equal = "tokens and selections equal"
    tied = f"{equal} but for near ties"
    looser = "; {:g} where ONNX Runtime rounds the inputs" if target.loose else ""
    return {
        "fp32": BOUNDS["float32"],
        "floats": BOUNDS[target.bundle.manifest.dtype],
        "half": target.half_bounds,
        "strict": exact,
        "tied": tied,
        "equal": tied if exact.tie else equal,
        "loose_graph": looser.format(loose.graph),
        "loose_whole": looser.format(loose.whole),
        "half_of": "; half of a tensor, as routers decide by row" if loose.share < 1 else "",
    }
