"""Runs a model in FP32 with the weights of one piece in memory at a time.

What ``stitch.Stitcher`` is to export, ``Streamed`` is to computing: a ``call`` for ``compose``. The
module's own parameters stay on torch's meta device, which takes no memory.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from ..graphs.modules.decoder import Linear
from ..graphs.progress import Advance, no_advance
from .checkpoint.checkpoint import Checkpoint
from .quantize.fake_quantized import FakeQuantised

AnyModule = TypeVar("AnyModule", bound=nn.Module)
Hook = Callable[[str, Tensor, Tensor], None]
"""Told a module's name, what went in and what came out."""


def without_weights(make: Callable[[], AnyModule]) -> AnyModule:
    """The module that ``make`` returns, its parameters without storage."""
    with torch.device("meta"):
        return make()


class Streamed:
    """Calls pieces of ``module``, a ``without_weights``, with the checkpoint's weights in FP32.

    ``observed`` are the kinds of modules that ``hook`` is told of; ``progress`` counts pieces that
    have weights. With ``fake_quantised``, weights and what linear layers are given come rounded.
    """

    def __init__(
        self,
        checkpoint: Checkpoint,
        module: nn.Module,
        progress: Advance = no_advance,
        observed: tuple[type[nn.Module], ...] = (),
        hook: Hook | None = None,
        fake_quantised: FakeQuantised | None = None,
    ):
        self.checkpoint, self.progress, self.fake_quantised = checkpoint, progress, fake_quantised
        self.observed, self.hook = observed, hook
        self.names = {id(weight): name for name, weight in module.named_parameters()}
        self.weights: dict[str, Tensor] = {}

    def __call__(self, piece: nn.Module, *args: Tensor | None) -> Any:
        """Run one piece."""
        with self.loaded(piece) as run:
            return run(*args)

    @contextmanager
    def loaded(self, piece: nn.Module) -> Iterator[Callable[..., Any]]:
        """What runs one piece, any number of times while its weights are in memory."""
        self._fill(piece)
        handles = [*self._fake_quantise(piece), *self._observe(piece)]

        @torch.no_grad()
        def run(*args: Tensor | None) -> Any:
            return torch.func.functional_call(piece, self.weights, args)

        try:
            yield run
        finally:
            for handle in handles:
                handle.remove()
        if self.weights:
            self.progress(1)

    def loaded_weights(self, piece: nn.Module) -> dict[str, Tensor]:
        """The weights of a piece that is ``loaded``, by the checkpoint's names."""
        return {
            self.names[id(weight)]: self.weights[name] for name, weight in piece.named_parameters()
        }

    def _fill(self, piece: nn.Module) -> None:
        """Read the piece's weights, into the storage of the piece before where it was alike."""
        old, self.weights = self.weights, {}
        shapes = {name: weight.shape for name, weight in piece.named_parameters()}
        old = {name: weight for name, weight in old.items() if weight.shape == shapes.get(name)}
        for name, weight in piece.named_parameters():
            stored = (self.fake_quantised or self.checkpoint).load(self.names[id(weight)])
            place = old.pop(name) if name in old else torch.empty(stored.shape)
            self.weights[name] = place.copy_(stored)
            self.checkpoint.release()

    def _fake_quantise(self, piece: nn.Module) -> Iterator[torch.utils.hooks.RemovableHandle]:
        """Hooks that round what linear layers are given."""
        fake_quantised = self.fake_quantised
        if fake_quantised is None:
            return

        def given(name: str) -> Callable[..., tuple]:
            return lambda module, args: (fake_quantised.inputs(name, args[0]), *args[1:])

        for module in piece.modules():
            if isinstance(module, Linear):
                name = self.names[id(module.weight)].removesuffix(".weight")
                yield module.register_forward_pre_hook(given(name))

    def _observe(self, piece: nn.Module) -> Iterable[torch.utils.hooks.RemovableHandle]:
        if self.hook is None:
            return
        for module in piece.modules():
            if isinstance(module, self.observed):
                name = self.names[id(module.weight)].removesuffix(".weight")
                yield module.register_forward_hook(self._notify(name))

    def _notify(self, name: str) -> Callable[..., None]:
        """A torch hook that passes on the name with input and output."""

        def notify(module: nn.Module, args: tuple, output: Tensor) -> None:
            assert self.hook is not None
            self.hook(name, args[0], output)

        return notify
