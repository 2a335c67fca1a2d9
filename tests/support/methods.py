"""One small plan of each published method that is more than a cut, and checkpoints for them."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from visistage.compile.build import make_bundle
from visistage.graphs.bundle import Bundle

from . import calibrated, toy
from .routed_checkpoint import add_routers

LAYERS = 6


@dataclass(frozen=True)
class Method:
    """A plan, the kind of routers that its checkpoint has, and the layers that it fuses."""

    plan: str
    routers: str = ""
    fusion: tuple[str, ...] = ()


PRUNED = "visipruner:shallow=1,t=2,e=4,keep=5"
TARGETS = "targets=62-80"
"""Words of some rows of the toy's images."""

METHODS = {
    "late entry": Method("exit-only:e=4,entry=divprune-6-at2"),
    "hidrop": Method("hidrop:entry=1,edges=2-4,keep=6-2,exit=5"),
    "frozen rows": Method(f"embedlens:{TARGETS},freeze=0.5-1-1.5"),
    "classes of rows": Method(f"embedlens:{TARGETS},keep=12"),
    "vica": Method("vica:layers=0-2,prefix=frozen"),
    "depth": Method("fastv:k=2,r=0.5,drop=0,drop_attention=3,drop_mlp=5"),
    "skipgpt": Method("skipgpt", "skipgpt"),
    "skipgpt, capacity": Method("skipgpt:share=0.6", "skipgpt"),
    "dllm": Method("dllm", "dllm"),
    "mod": Method("mod", "mod"),
    "mod, capacity": Method("mod:form=capacity", "mod"),
    "external fusion": Method(PRUNED, fusion=("E_D", "3-18-23")),
    "internal fusion": Method(PRUNED, fusion=("I_D", "18")),
}


class Built:
    """Checkpoints, calibrations and bundles of methods, made once; ``folder`` makes folders."""

    def __init__(self, folder: Callable[[str], Path]):
        self.folder = folder
        self._made: dict[tuple, object] = {}

    def checkpoint(self, name: str) -> Path:
        """Return the checkpoint of a method, in FP16, as most are."""
        method = METHODS[name]

        def make() -> Path:
            path = self.folder("toy") / "toy"
            more = {"encoder_layers": 24, "fusion": method.fusion} if method.fusion else {}
            toy.make_checkpoint(path, layers=LAYERS, kv_heads=2, dtype="float16", **more)
            return add_routers(path, method.routers) if method.routers else path

        return self._once((method.routers, method.fusion), make)

    def calibration(self, name: str) -> Path:
        """Return a folder with the ranges of a method's plan."""

        def make() -> Path:
            folder = self.folder("calibration") / "toy"
            calibrated.calibrate(self.checkpoint(name), METHODS[name].plan, folder)
            return folder

        return self._once((name, "calibration"), make)

    def bundle(self, name: str, target: str = "cpu", **options) -> Bundle:
        """Return a method's bundle; ``options``: of ``make_bundle``."""

        def make() -> Bundle:
            path, plan = str(self.checkpoint(name)), METHODS[name].plan
            return make_bundle(path, plan=plan, target=target, out=self.folder("out"), **options)

        return self._once((name, target, *options.items()), make)

    def _once(self, key, make):
        if key not in self._made:
            self._made[key] = make()
        return self._made[key]
