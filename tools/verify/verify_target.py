"""The bundle that is verified, and what several checks use of it: sessions, chains, prompts.

Each is made when a check first asks for it, and kept until the last has run. torch is imported
where it is needed: a machine with the runtime alone has none.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import cached_property
from typing import TYPE_CHECKING, Any

import psutil

from ... import runtime
from ...calib.samples import Sample
from ...graphs.bundle import Bundle
from ...graphs.targets import ONNXRUNTIME
from .compare import LOOSE, Bounds, bounds_of, bundle_kinds, strict
from .verify_report import ImpossibleError, NothingError

if TYPE_CHECKING:
    from ...compile.checkpoint.checkpoint import Checkpoint
    from ...compile.quantize.calibration_file import Calibration
    from .chains import PreparedPrompt, TorchChain

VERIFY_MAX_TOKENS = 16


class VerifyTarget:
    """A bundle, and the checkpoint and calibration that it was built from where they are named.

    Arguments are those of ``verify.verify``, opened.
    """

    def __init__(
        self,
        bundle: Bundle,
        samples: Sequence[Sample] = (),
        origin: Checkpoint | None = None,
        calibration: Calibration | None = None,
        max_tokens: int = VERIFY_MAX_TOKENS,
        memory: int | None = None,
    ):
        self.bundle, self.samples = bundle, samples
        self.origin, self.calibration = origin, calibration
        self.max_tokens, self.memory = max_tokens, memory
        self.compared: dict[str, Any] = {}  # one graph's arrays at a time

    def __enter__(self) -> VerifyTarget:
        return self

    def __exit__(self, *_) -> None:
        if "session" in vars(self):
            self.session.close()

    @property
    def free(self) -> int:
        """Bytes that a check may take now."""
        return self.memory or psutil.virtual_memory().available

    @property
    def files(self) -> tuple[str, ...]:
        """Names of the files of every graph."""
        return tuple(fact.file for fact in self.bundle.manifest.graphs.values())

    @property
    def kinds(self) -> set[str]:
        """The types that the bundle's graphs compute and round in (``compare.BOUNDS``)."""
        return bundle_kinds(self.bundle.manifest)

    @property
    def loose(self) -> bool:
        """Return whether ONNX Runtime rounds more than the graphs do."""
        return bool(self.kinds & set(LOOSE))

    @property
    def half_bounds(self) -> Bounds:
        """Bounds of FP16 arithmetic against FP32."""
        return bounds_of({"float16", *strict(self.kinds)})

    @property
    def checkpoint(self) -> Checkpoint:
        """The checkpoint.

        Raises:
            ImpossibleError: none was named.
        """
        if self.origin is None:
            raise ImpossibleError(
                f"no checkpoint of '{self.bundle.manifest.model}' was named: --model CHECKPOINT"
            )
        return self.origin

    @cached_property
    def session(self) -> runtime.Session:
        """The bundle in the public runtime, on ONNX Runtime."""
        return self.load()

    @cached_property
    def prompts(self) -> list[PreparedPrompt]:
        """The samples, preprocessed and tokenised."""
        from .chains import prepare_prompts

        return prepare_prompts(self.session, self.samples)

    @cached_property
    def reference(self) -> TorchChain:
        """The torch chain in FP32."""
        from .chains import TorchChain

        return TorchChain.stored(self.bundle, half=False, free=self.free)

    @cached_property
    def original(self) -> TorchChain:
        """The torch chain over the checkpoint's own weights."""
        from .chains import TorchChain

        return TorchChain.original(self.bundle, self.checkpoint, free=self.free)

    def load(self) -> runtime.Session:
        """Open the bundle in a new session."""
        return runtime.load(self.bundle.path, backend=ONNXRUNTIME, memory_limit=self.memory)

    def require_half(self) -> None:
        """Raise ``NothingError`` where the graphs compute in another type than FP16."""
        dtype = self.bundle.manifest.dtype
        if dtype != "float16":
            raise NothingError(f"the graphs compute in {dtype}")
