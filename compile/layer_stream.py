"""Models run in FP32 with the weights of one piece in memory at a time.

``Streamed`` is a ``call`` for ``compose``, as ``stitch.Stitcher`` is one for export. The module's
own parameters stay on torch's meta device, which takes no memory.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from ..graphs.modules.layer import Linear
from ..graphs.progress import Advance, no_advance
from .checkpoint.checkpoint import Checkpoint
from .quantize.fake_quantized import FakeQuantised

AnyModule = TypeVar("AnyModule", bound=nn.Module)
Hook = Callable[[str, Tensor, Tensor], None]
"""Called with a module's name, its input and its output."""


def without_weights(make: Callable[[], AnyModule]) -> AnyModule:
    """Return the module that ``make`` returns, its parameters without storage."""
    with torch.device("meta"):
        return make()


class Streamed:
    """Calls pieces of ``module``, a ``without_weights``, with the checkpoint's weights in FP32.

    ``hook`` is called for modules of the kinds ``observed``; ``progress`` counts pieces that have
    weights. With ``fake_quantised``, weights and inputs of linear layers come rounded.
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
        """Yield what runs one piece, any number of times while its weights are in memory."""
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
        """Return the weights of a piece that is ``loaded``, by the checkpoint's names."""
        return {
            self.names[id(weight)]: self.weights[name] for name, weight in piece.named_parameters()
        }

    def _fill(self, piece: nn.Module) -> None:
        """Read the piece's weights, into the storage of the piece before where shapes match."""
        old, self.weights = self.weights, {}
        shapes = {name: weight.shape for name, weight in piece.named_parameters()}
        old = {name: weight for name, weight in old.items() if weight.shape == shapes.get(name)}
        for name, weight in piece.named_parameters():
            stored = (self.fake_quantised or self.checkpoint).load(self.names[id(weight)])
            place = old.pop(name) if name in old else torch.empty(stored.shape)
            self.weights[name] = place.copy_(stored)
            self.checkpoint.release()

    def _fake_quantise(self, piece: nn.Module) -> Iterator[torch.utils.hooks.RemovableHandle]:
        """Yield hooks that round the inputs of linear layers."""
        fake_quantised = self.fake_quantised
        if fake_quantised is None:
            return

        def given(name: str) -> Callable[..., tuple]:
            return lambda module, args: (fake_quantised.inputs(name, args[0]), *args[1:])

        for module in piece.modules():
            if isinstance(module, Linear):
                yield module.register_forward_pre_hook(given(self._name(module)))

    def _observe(self, piece: nn.Module) -> Iterator[torch.utils.hooks.RemovableHandle]:
        """Yield hooks that call ``hook`` with a module's name, input and output."""
        hook = self.hook
        if hook is None:
            return

        def notify(name: str) -> Callable[..., None]:
            return lambda module, args, output: hook(name, args[0], output)

        for module in piece.modules():
            if isinstance(module, self.observed):
                yield module.register_forward_hook(notify(self._name(module)))

    def _name(self, module: nn.Module) -> str:
        return self.names[id(module.weight)].removesuffix(".weight")
