"""The bundle that is verified, and what several rungs use of it: sessions, chains, prompts.

Each is made when a rung first asks for it, and kept until the ladder is climbed. torch is imported
where it is needed: a machine with the runtime alone has no torch.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import cached_property, lru_cache
from typing import TYPE_CHECKING

import psutil

from ... import runtime
from ...calib.samples import Sample
from ...graphs.bundle import Bundle
from ...graphs.targets import ONNXRUNTIME
from .check_steps import ImpossibleError, NothingError
from .compare import LOOSE, bundle_kinds

if TYPE_CHECKING:
    from ...compile.checkpoint.checkpoint import Checkpoint
    from ...compile.quantize.calibration_file import Calibration
    from .chains import Asked, TorchChain
    from .graph_checks import GraphChecks


class VerifyTarget:
    """A bundle, and the checkpoint and calibration that it was built from where they are named.

    Args:
        bundle: nothing of it is believed but that it has a manifest.
        samples: prompts for the rungs of whole answers; at least one.
        origin: the checkpoint.
        calibration: the calibration.
        max_tokens: length of the answers.
        memory: bytes that a rung may take; None: what is free when it begins.
    """

    def __init__(
        self,
        bundle: Bundle,
        samples: Sequence[Sample],
        origin: Checkpoint | None,
        calibration: Calibration | None,
        max_tokens: int,
        memory: int | None,
    ):
        self.bundle, self.samples = bundle, samples
        self.origin, self.calibration = origin, calibration
        self.max_tokens, self.memory = max_tokens, memory
        self.graph = lru_cache(maxsize=1)(self._graph)  # one graph's arrays at a time

    def __enter__(self) -> VerifyTarget:
        return self

    def __exit__(self, *_) -> None:
        if "session" in vars(self):
            self.session.close()

    @property
    def free(self) -> int:
        """Bytes that a rung may take now."""
        return self.memory or psutil.virtual_memory().available

    @cached_property
    def session(self) -> runtime.Session:
        """The bundle in the public runtime."""
        return self.load()

    @cached_property
    def asked(self) -> list[Asked]:
        """The samples, preprocessed and tokenised."""
        from .chains import prepare_prompts

        return prepare_prompts(self.session, self.samples)

    @cached_property
    def reference(self) -> TorchChain:
        """The torch chain in FP32."""
        from .chains import TorchChain

        return TorchChain.stored(self.bundle, half=False, free=self.free)

    @property
    def kinds(self) -> set[str]:
        """What the bundle's graphs compute in (``compare.BOUNDS``)."""
        return bundle_kinds(self.bundle.manifest)

    @property
    def loose(self) -> bool:
        """Whether ONNX Runtime rounds more than the graphs do."""
        return bool(self.kinds & set(LOOSE))

    @cached_property
    def original(self) -> TorchChain:
        """The torch chain over the checkpoint's own weights."""
        from .chains import TorchChain

        return TorchChain.original(self.bundle, self.required_origin(), free=self.free)

    def load(self) -> runtime.Session:
        """The bundle in a session of its own."""
        return runtime.load(self.bundle.path, backend=ONNXRUNTIME, memory_limit=self.memory)

    def required_origin(self) -> Checkpoint:
        """The checkpoint.

        Raises:
            ImpossibleError: none was named.
        """
        if self.origin is None:
            raise ImpossibleError(
                f"no checkpoint of '{self.bundle.manifest.model}' was named: --model CHECKPOINT"
            )
        return self.origin

    def require_half(self) -> None:
        """Leave a rung of FP16 out where the graphs compute in something else."""
        dtype = self.bundle.manifest.dtype
        if dtype != "float16":
            raise NothingError(f"the graphs compute in {dtype}")

    def _graph(self, name: str) -> GraphChecks:
        from .graph_checks import GraphChecks
        from .stored_graph import StoredGraph

        return GraphChecks(StoredGraph(self.bundle, name), self.free)
