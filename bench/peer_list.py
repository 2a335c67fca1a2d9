"""Who is compared: peers, their settings, and what each needs to read."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

from . import peer_models
from .environments import LLAMA_CPP, OPENVINO, OWN, Environment
from .peer_models import PeerCheckpoint

REFERENCE = "transformers"
PLANS = ("dense", "visipruner")
PRECISIONS = ("fp32", "int8")
REPORTED = {"f32": "fp32", "bf16": "bf16"}
"""What OpenVINO calls its inference precision, and the floor's name for it."""


@dataclass(frozen=True)
class Peer:
    """Who is asked.

    key: names it in the record. script: in ``runners/``. model: makes the folder it reads, within
    some minutes a step. precision: of its linear layers, None where it says so itself. keeps:
    whether a second question finds the picture paid.
    """

    key: str
    label: str
    script: str
    environment: Environment
    model: Callable[[PeerCheckpoint, float], Path]
    settings: dict[str, Any] = field(default_factory=dict)
    precision: str | None = "fp32"
    plan: str = "dense"
    keeps: bool = True


def all_peers(targets: Sequence[str]) -> list[Peer]:
    """Everyone, the reference first."""
    genai = partial(Peer, script="openvino_genai_vlm", environment=OPENVINO)
    peers = [Peer(REFERENCE, "transformers", "hugging_face", OWN, _folder, keeps=False)]
    for weights, precision in (("fp32", "f32"), ("fp32", None), ("int8", "f32"), ("int8", None)):
        for prefix in (False, True):
            words = ["OpenVINO GenAI", f"{weights} weights" if weights == "int8" else ""]
            words += [precision or "default", "prefix caching" if prefix else ""]
            keys = ["openvino", weights, precision or "default", "prefix" if prefix else ""]
            floor = "int8" if weights == "int8" else REPORTED["f32"] if precision else None
            peers.append(
                genai(
                    key="-".join(filter(None, keys)),
                    label=", ".join(filter(None, words)),
                    model=partial(_openvino, weights),
                    settings={"precision": precision, "prefix": prefix},
                    precision=floor,
                    keeps=prefix,
                )
            )
    for kind, precision in (("f32", "fp32"), ("f16", "fp16")):
        model = partial(_gguf, kind)
        label = f"llama.cpp, {kind.upper()}"
        peers.append(
            Peer(f"llama.cpp-{kind}", label, "llama_cpp_mtmd", LLAMA_CPP, model, {}, precision)
        )
    for target in targets:
        for precision in PRECISIONS:
            for plan in PLANS:
                where = "" if target == "cpu" else f"-{target}"
                peers.append(
                    Peer(
                        f"visistage-{plan}-{precision}{where}",
                        f"visistage, {plan}, {'W8A8' if precision == 'int8' else 'FP32'}"
                        + (f", {target}" if where else ""),
                        "ours",
                        OWN,
                        partial(_bundle, plan, precision, target),
                        precision=precision,
                        plan=plan,
                    )
                )
    return peers


def _folder(subject: PeerCheckpoint, minutes: float) -> Path:
    del minutes  # a copy
    return peer_models.hugging_face(subject)


def _openvino(kind: str, subject: PeerCheckpoint, minutes: float) -> Path:
    return peer_models.openvino(subject, kind, minutes)


def _gguf(kind: str, subject: PeerCheckpoint, minutes: float) -> Path:
    return peer_models.gguf(subject, kind, minutes)


def _bundle(
    plan: str, precision: str, target: str, subject: PeerCheckpoint, minutes: float
) -> Path:
    del minutes  # builds here end by themselves
    return peer_models.bundle(subject, plan, precision, target).absolute()
