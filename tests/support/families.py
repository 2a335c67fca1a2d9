"""A tiny checkpoint of every model family, and two pictures that it cuts differently."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from PIL import Image
from visistage.calib.samples import Sample

from . import qwen, tiny_internvl, tiny_next, tiny_onevision, tiny_smolvlm, toy
from .asking import picture

SHAPES = {"wide": (48, 64), "small": (20, 20)}
"""Height and width of the pictures."""


@dataclass(frozen=True)
class TinyFamily:
    """``make(folder)`` writes the checkpoint; ``rows``: of each picture."""

    make: Callable[[Path], Path]
    rows: dict[str, int]


TINY = {
    # The decoder of LLaVA-NeXT's: what is traced of one serves the other.
    "llava": TinyFamily(
        partial(toy.make_checkpoint, intermediate=96, kv_heads=2), {"wide": 16, "small": 16}
    ),
    "internvl": TinyFamily(tiny_internvl.make_checkpoint, {"wide": 52, "small": 4}),
    "llava_next": TinyFamily(tiny_next.make_checkpoint, {"wide": 70, "small": 88}),
    "llava_onevision": TinyFamily(tiny_onevision.make_checkpoint, {"wide": 79, "small": 88}),
    **{
        family: TinyFamily(partial(qwen.make_checkpoint, family=family), {"wide": 20, "small": 4})
        for family in ("qwen3_vl", "qwen2_5_vl", "qwen2_vl")
    },
    **{
        kind: TinyFamily(
            partial(tiny_smolvlm.make_checkpoint, kind=kind), {"wide": 20, "small": 20}
        )
        for kind in ("smolvlm", "idefics3")
    },
}
"""By ``model_type``."""

PLAN = "visipruner:shallow=1,t=1,e=3,keep=3"


def make_asked(family: str, folder: Path) -> tuple[Path, list[Sample]]:
    """Write a family's checkpoint and the pictures; return it, and a question about each."""
    checkpoint = TINY[family].make(folder / "tiny")
    write_pictures(folder)
    asked = [Sample(name, folder / f"{name}.png", "What is it?", "") for name in SHAPES]
    return checkpoint, asked


def write_pictures(folder: Path) -> None:
    """Write ``wide.png`` and ``small.png``."""
    for seed, (name, (height, width)) in enumerate(SHAPES.items()):
        Image.fromarray(picture(seed, height, width)).save(folder / f"{name}.png")
