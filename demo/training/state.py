"""The state of a training: saved often, so that `--resume` continues from it in either phase."""

from __future__ import annotations

import os
import time
from pathlib import Path

import torch

from .muon import Optimizer


class TrainState:
    """The progress of a training, with all that is needed to go on.

    Args:
        model: what is trained.
        file: where the state is kept.
        minutes: time between two savings.
    """

    def __init__(self, model: torch.nn.Module, file: Path, minutes: float = 5):
        self.model, self.file, self.minutes = model, file, minutes
        self.phase, self.images, self.step = "encoder", 0, 0
        self.modules: dict[str, torch.nn.Module] = {}
        self.optimizers: dict[str, Optimizer] = {}
        self._read: dict = {}
        self._saved = time.time()

    def read(self) -> None:
        """Take the model and the counts from the file; `begin` takes the rest."""
        self._read = torch.load(self.file, weights_only=True)
        self.model.load_state_dict(self._read["model"])
        self.phase, self.images, self.step = (
            self._read[key] for key in ("phase", "images", "step")
        )

    def begin(
        self,
        phase: str,
        modules: dict[str, torch.nn.Module],
        optimizers: dict[str, Optimizer],
    ) -> bool:
        """Enter a phase with heads and optimizers of its own; return whether it was resumed."""
        self.modules, self.optimizers = modules, optimizers
        resumed = bool(self._read) and self._read["phase"] == phase
        if resumed:
            for name, module in modules.items():
                module.load_state_dict(self._read["modules"][name])
            for name, optimizer in optimizers.items():
                optimizer.load_state_dict(self._read["optimizers"][name])
        elif self.phase != phase:
            self.images = self.step = 0
        self.phase, self._read = phase, {}
        return resumed

    def advance(self, images: int) -> None:
        """Count a step of `images` images."""
        self.images, self.step = self.images + images, self.step + 1

    def due(self) -> bool:
        """Return whether it is time to save."""
        return time.time() - self._saved > 60 * self.minutes

    def save(self) -> None:
        """Write the file; a training that is stopped meanwhile leaves the old one."""
        self._saved = time.time()
        kept = {
            "model": self.model.state_dict(),
            "phase": self.phase,
            "images": self.images,
            "step": self.step,
            "modules": {name: module.state_dict() for name, module in self.modules.items()},
            "optimizers": {name: each.state_dict() for name, each in self.optimizers.items()},
        }
        self.file.parent.mkdir(parents=True, exist_ok=True)
        partial = self.file.with_suffix(".tmp")
        torch.save(kept, partial)
        os.replace(partial, self.file)
