"""Who is shown what linear layers are given while a model runs piece by piece."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any, Protocol

import numpy as np
from torch import Tensor, nn

from ...compile.checkpoint.checkpoint import Checkpoint
from ...compile.layer_stream import Streamed
from ...compile.quantize.fake_quantized import FakeQuantised
from ...graphs.modules.decoder import Linear

ENCODER, VISUAL, TEXT, ANSWER = range(4)
"""Kinds of rows: those of the tower, and in the decoder."""


class LayerObserver(Protocol):
    """Is told of one piece after the other, in the order in which they run."""

    def enter(self, kinds: Sequence[np.ndarray]) -> None:
        """A piece begins; ``kinds`` has the kind of each row of each call to come, in order."""

    def given(self, linear: str, rows: Tensor) -> None:
        """One call of a linear layer; rows: (Q, K), to be neither changed nor kept."""

    def leave(self, weights: Mapping[str, Tensor]) -> None:
        """The piece is done; its weights by the checkpoint's names, valid until this returns."""


class ObservedStream:
    """A ``Streamed`` whose linear layers a watcher sees, where there is one."""

    def __init__(
        self,
        checkpoint: Checkpoint,
        module: nn.Module,
        observer: LayerObserver | None,
        progress: Callable[[int], None],
        fake_quantised: FakeQuantised | None = None,
    ):
        self.observer = observer
        observed, hook = ((Linear,), self._notify) if observer else ((), None)
        self.stream = Streamed(checkpoint, module, progress, observed, hook, fake_quantised)

    @contextmanager
    def loaded(self, piece: nn.Module, kinds: Sequence[np.ndarray]) -> Iterator[Callable[..., Any]]:
        """As ``Streamed.loaded``; ``kinds`` as in ``LayerObserver.enter``."""
        with self.stream.loaded(piece) as run:
            if self.observer is None:
                yield run
            else:
                self.observer.enter(kinds)
                yield run
                self.observer.leave(self.stream.loaded_weights(piece))

    def _notify(self, linear: str, given: Tensor, out: Tensor) -> None:
        assert self.observer is not None
        self.observer.given(linear, given)
