"""The rung that needs a GPU: a bundle's engines against its graphs in ONNX Runtime.

Both go through the public runtime. The graphs answer first; the engines are then led through the
same answers, and every logit is compared.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING

from ...calib.samples import Sample
from .compare import bounds_of, bundle_kinds, first_wrong, tensor_error
from .verify_report import CheckResult

if TYPE_CHECKING:
    from ...runtime import Session


def compare_engines(
    graphs: Session, load: Callable[[], Session], samples: Sequence[Sample], steps: int
) -> CheckResult:
    """Teacher-forced logits of the engines, over the graphs' own answers.

    Args:
        graphs: the bundle on ONNX Runtime.
        load: opens it with its engines.
        samples: at least one.
        steps: longest answer in tokens.
    """
    greedy = replace(graphs.sampling, temperature=0.0)
    errors = []
    with load() as engines:
        for sample in samples:
            given = (sample.image, sample.prompt)
            tokens = graphs.infer(*given, max_tokens=steps, sampling=greedy).tokens
            got, want = (session.score(*given, tokens[:-1]) for session in (engines, graphs))
            errors.append(tensor_error(sample.name, got, want))
    tolerance = bounds_of(bundle_kinds(graphs.bundle.manifest)).whole
    return CheckResult(
        failure=first_wrong(errors, tolerance),
        errors=tuple(errors),
        facts={"prompts": len(samples), "tolerance": tolerance},
    )
