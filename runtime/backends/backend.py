"""A back end: what a session asks of the executor that runs a bundle's graphs."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType
from typing import Any, Protocol

import numpy as np

from ...graphs.chain.executor import ANY_IMAGE, Encoded, Executor


@dataclass(frozen=True)
class BackendOptions:
    """Options for loading graphs; None: as the back end chooses.

    Attributes:
        threads: of the CPU; None: as many as ``autotune.choose_threads`` finds best.
        memory_limit: bytes that the weights may take; None: what is available now. ONNX Runtime
            rearranges weights for speed (one more copy) when that fits, and maps them from disk
            otherwise. FP16 graphs on a CPU are computed in FP32, from a copy of twice the size.
        profile: a folder for ONNX Runtime's times of every operator, which take time themselves.
        capture: whether ONNX Runtime's calls on a GPU are captured as CUDA graphs; None: no.
        lanes: prompts whose caches lie side by side (``cpu_caches.HostExecutor.of_lanes``); None:
            one.
    """

    threads: int | None = None
    memory_limit: int | None = None
    profile: Path | None = None
    lanes: int | None = None
    capture: bool | None = None


class Backend(Executor, Protocol):
    """An executor that a session can load, fill, rewind and close."""

    rows_dtype: np.dtype
    device_name: str | None  # None: no device, this CPU
    threads: int | None  # of this CPU; None: a device

    def activate(self) -> None:
        """Make the device that of the calling thread, before it asks for anything."""

    def prepare(self, needs: Sequence[int]) -> bool:
        """Make sure of room for ``needs`` slots in each stage; True: the caches are new and empty.

        Raises:
            CapacityError: there is not that much room.
        """

    def trim_slots(self, stage: int, used: int, wanted: int) -> int:
        """Give slots up where there are far more than ``wanted``; return how many are left.

        Attention pays for all there are. The first ``used`` slots keep what they hold.
        """

    def free_bytes(self) -> int:
        """Return how much memory is free where caches are."""

    def padding(self, stage: int, count: int) -> int:
        """Return how many padding rows it wants before ``count`` rows of a question."""

    def encode(
        self,
        pixels: np.ndarray,
        images: Sequence[str] = (ANY_IMAGE,),
        feeds: Mapping[str, np.ndarray] = MappingProxyType({}),
    ) -> Encoded:
        """Return the visual rows that enter stage 0, of an image's pixels and other ``feeds`` as
        the vision graph takes them.

        ``images``: the digest of what they show, by which a random choice is made.
        """

    def snapshot(self, stage: int, start: int, stop: int) -> dict[str, Any]:
        """Copy a stage's cache slots [start, stop)."""

    def restore(self, stage: int, start: int, saved: dict[str, Any]) -> None:
        """Write a snapshot back, or arrays of the host; the slots must exist."""

    def reset_elapsed(self) -> dict[str, float]:
        """Return milliseconds per graph since the last call."""

    def end_profiles(self) -> dict[str, Path]:
        """Return files with the times of every operator, by graph, where they were asked for."""

    def close(self) -> None:
        """Free everything."""
