"""Peers, their settings, and one checkpoint in the form that each reads, made once and kept.

    .cache/bench/models/NAME/published, openvino-fp32|int8|int4, gguf-f32|f16|q8_0|q4_0
    .cache/bench/bundles, .cache/bench/calibrations/PLAN

A folder appears under its name when it is whole.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from itertools import product
from pathlib import Path
from typing import Any

from safetensors.torch import load_file, save_file

from ..calib.calibrate import calibrate
from ..calib.plan_search.measure_plans import Origin
from ..calib.samples import Sample
from ..compile.build import make_bundle
from ..compile.checkpoint.checkpoint import Checkpoint, open_checkpoint
from ..compile.checkpoint.known_models import OWN_MODELS
from ..compile.checkpoint.names import canonical, published_name
from ..compile.checkpoint.safetensors_file import read_header
from ..demo.heldout import HeldOutSample, held_out
from ..demo.worlds import DEMO, WORLDS
from ..graphs.families.registry import FAMILIES
from ..graphs.progress import Progress
from ..graphs.quantization import is_quantised
from .environments import LLAMA_CPP, OPENVINO, OPENVINO_QWEN, OWN, ROOT, Environment, run_in
from .runner import RUNNERS, PeerError

REFERENCE = "transformers"
PRECISIONS = ("fp32", "int8")
EXPORTERS = {"qwen2_vl": OPENVINO_QWEN, "qwen2_5_vl": OPENVINO_QWEN}
"""Family -> the environment that exports it for OpenVINO, where it is not the usual one."""

BLOCKS = ("w8", "w4")
"""Precisions with weights alone in integers, a scale for each block of them."""

STEPS = "int8:decode=w4"
"""Ours with weights of four bits where one row passes, beside those in blocks."""

OURS = {"fp32": "FP32", "int8": "W8A8", "w8": "W8", "w4": "W4", STEPS: "W8A8, one row W4"}
REPORTED = {"f32": "fp32", "bf16": "bf16"}
"""OpenVINO's name of an inference precision -> the lower bound's."""

CALIBRATION_SERIES = 1000
"""Held-out scenes that no peer is asked about."""

CALIBRATION_SAMPLES = 8


@dataclass(frozen=True)
class PeerCheckpoint:
    """A checkpoint, its name in our commands, and the minutes that a conversion may take."""

    origin: Origin
    checkpoint: Checkpoint
    minutes: float

    @classmethod
    def named(cls, model: str, minutes: float = 20) -> PeerCheckpoint:
        """Open a demo model, or random weights in a published geometry.

        Where images differ in their tokens, none has more than a square one that is not resized.
        """
        origin = Origin(model, dummy_weights=model not in OWN_MODELS)
        checkpoint = open_checkpoint(model, dummy_weights=origin.dummy_weights)
        config, side = checkpoint.config, checkpoint.config.vision.image_size
        if FAMILIES[config.family].budgeted is not None:
            origin = replace(origin, image_tokens=config.layout(side, side).rows)
            checkpoint = open_checkpoint(
                model, dummy_weights=origin.dummy_weights, image_tokens=origin.image_tokens
            )
        return cls(origin, checkpoint, minutes)

    @property
    def side(self) -> int:
        """Pixels of an image that the vision encoder takes, or one that it takes as it is."""
        return self.checkpoint.config.vision.image_size

    def scenes(self, count: int, series: int) -> Iterator[HeldOutSample]:
        """Yield held-out scenes: its own where it is a demo model, else the demo's."""
        world = WORLDS.get(self.origin.model, DEMO)
        return held_out(count, series, self.side, world)


def hugging_face(subject: PeerCheckpoint) -> Path:
    """Return the checkpoint under published names, which every version of transformers reads.

    Newer ones write a vision encoder's weights under shorter names; an older one finds none of
    those, takes random numbers and continues.
    """

    def make(folder: Path, log: Path) -> None:
        del log  # nothing to say
        folder.mkdir()
        for file in subject.checkpoint.path.iterdir():
            if file.is_file() and ".safetensors" not in file.name:
                shutil.copy(file, folder)
        tensors = {name: tensor for file in files for name, tensor in load_file(file).items()}
        renamed = {published_name(canonical(name, kind), kind): t for name, t in tensors.items()}
        save_file(renamed, folder / "model.safetensors", {"format": "pt"})

    kind = subject.checkpoint.config.family
    files = sorted(subject.checkpoint.path.glob("*.safetensors"))
    names = {name for file in files for name in read_header(file)}
    if names == {published_name(canonical(name, kind), kind) for name in names}:
        return subject.checkpoint.path.absolute()
    return _made(subject, "published", make)


def openvino(kind: str, subject: PeerCheckpoint) -> Path:
    """Return OpenVINO's export, weights of ``kind``: fp32, fp16, int8 or int4.

    Raises:
        PeerError: the environment or the export failed, or it found weights missing.
    """
    source = hugging_face(subject)
    environment = EXPORTERS.get(subject.checkpoint.config.family, OPENVINO)

    def make(folder: Path, log: Path) -> None:
        log.unlink(missing_ok=True)
        run_in(
            environment,
            [
                *("-m", "optimum.commands.optimum_cli", "export", "openvino"),
                *("--model", str(source)),
                # Left to itself it takes image-to-text, and fails.
                *("--task", "image-text-to-text"),
                *("--weight-format", kind, str(folder)),
            ],
            log,
            subject.minutes,
        )
        if "newly initialized" in log.read_text(errors="replace"):
            raise PeerError("openvino: the export took random numbers for weights it did not find")
        # Without it GenAI finds no mean and deviation, and takes others without a word.
        shutil.copy(source / "preprocessor_config.json", folder)

    return _made(subject, f"openvino-{kind}", make)


def gguf(kind: str, subject: PeerCheckpoint) -> Path:
    """Return llama.cpp's two files, matrices of ``kind``: f32, f16, q8_0 or q4_0.

    Raises:
        PeerError: the environment or the conversion failed.
    """
    source, text = hugging_face(subject), subject.checkpoint.config.text
    sizes = {  # under published names: a config.json may leave them to its class
        "hidden_size": text.hidden,
        "intermediate_size": text.intermediate,
        "num_hidden_layers": text.layers,
        "num_attention_heads": text.heads,
        "num_key_value_heads": text.kv_heads,
        "head_dim": text.head_dim,
    }

    def make(folder: Path, log: Path) -> None:
        folder.mkdir()
        words = [str(RUNNERS / "to_gguf.py"), str(source), str(folder), kind, json.dumps(sizes)]
        run_in(LLAMA_CPP, words, log, subject.minutes)

    return _made(subject, f"gguf-{kind}", make)


def bundle(plan: str, precision: str, target: str, subject: PeerCheckpoint) -> Path:
    """Return our bundle; a quantised one is calibrated first, on scenes of its own.

    Raises:
        VisistageError: it cannot be built.
    """
    calibration = None
    if is_quantised(precision):
        out = ROOT / "calibrations" / plan.replace(":", "-")
        calibration = out / subject.checkpoint.name
        if not calibration.is_dir():
            scenes = subject.scenes(CALIBRATION_SAMPLES, CALIBRATION_SERIES)
            samples = [
                Sample(f"scene {number}", scene.image, scene.question, scene.answer)
                for number, scene in enumerate(scenes)
            ]
            calibrate(subject.origin, samples, plan, out=out, progress=Progress())
    made = make_bundle(
        subject.origin.model,
        dummy_weights=subject.origin.dummy_weights,
        plan=plan,
        precision=precision,
        target=target,
        calibration=calibration,
        image_tokens=subject.origin.image_tokens,
        out=ROOT / "bundles",
    )
    return made.path.absolute()


def _made(subject: PeerCheckpoint, name: str, make: Callable[[Path, Path], None]) -> Path:
    folder = (ROOT / "models" / subject.checkpoint.name / name).absolute()
    if folder.is_dir():
        return folder
    folder.parent.mkdir(parents=True, exist_ok=True)
    new = folder.with_name(folder.name + ".new")
    shutil.rmtree(new, ignore_errors=True)  # of a run that was stopped
    make(new, folder.with_suffix(".log"))
    new.rename(folder)
    return folder


@dataclass(frozen=True)
class Peer:
    """A library with its settings.

    key: names it in the record. script: in ``runners/``. model: makes the folder it reads.
    precision: of its linear layers, None where it reports it. decode: of a later token, where that
    is another. keeps: whether a second question
    finds the image encoded. told: visual tokens that it counts to a prompt; None: all.
    """

    key: str
    label: str
    script: str
    environment: Environment
    model: Callable[[PeerCheckpoint], Path]
    settings: dict[str, Any] = field(default_factory=dict)
    precision: str | None = "fp32"
    decode: str | None = None
    plan: str = "dense"
    keeps: bool = True
    told: int | None = None


def kept_of(visual_tokens: int) -> tuple[int, int]:
    """Return how many tokens pruned ones keep before the decoder: some, and few."""
    return 2 * visual_tokens // 9, visual_tokens // 9


def plans_of(visual_tokens: int, selector: str = "scope") -> dict[str, str]:
    """Return our plans for images of so many tokens, by what a key calls them."""
    some, few = kept_of(visual_tokens)
    return {
        "dense": "dense",
        "visipruner": "visipruner",
        selector: f"{selector}:keep={some}",
        f"{selector}-few": f"{selector}:keep={few}",
        f"{selector}-visipruner": f"visipruner:entry={selector}-{some}",
    }


def cdpruner_peers(visual_tokens: int) -> list[Peer]:
    """Return OpenVINO GenAI with its own pruning before the decoder, which takes Qwen-VL alone."""
    peers = []
    for weights, count in product(PRECISIONS, kept_of(visual_tokens)):
        percent = 100 - round(100 * count / visual_tokens)
        words = ["OpenVINO GenAI", *(["int8 weights"] if weights == "int8" else [])]
        peers.append(
            Peer(
                f"openvino-{weights}-f32-cdpruner-{count}",
                ", ".join([*words, "f32", f"CDPruner, {percent} % removed"]),
                "openvino_genai_vlm",
                OPENVINO,
                partial(openvino, weights),
                {"precision": "f32", "prefix": False, "pruned": percent},
                precision=weights,
                plan=f"random:keep={count}",  # of as much work
                keeps=False,
                told=count,
            )
        )
    return peers


def all_peers(
    targets: Sequence[str], visual_tokens: int, *, bare: bool = False, blocks: bool = False
) -> list[Peer]:
    """Return every peer, the reference first.

    ``bare``: of an encoder that hands out rows alone. ``blocks``: with weights in ``BLOCKS``, too.
    """
    selector = "divprune" if bare else "scope"
    bounds = {"fp32": "fp32", "int8": "int8"} | ({"int4": "w4"} if blocks else {})
    peers = [Peer(REFERENCE, "transformers", "hugging_face", OWN, hugging_face, keeps=False)]
    for weights, hint, prefix in product(bounds, ("f32", None), (False, True)):
        keys = ["openvino", weights, hint or "default", *(["prefix"] if prefix else [])]
        words = ["OpenVINO GenAI", *([f"{weights} weights"] if weights != "fp32" else [])]
        words += [hint or "default", *(["prefix caching"] if prefix else [])]
        peers.append(
            Peer(
                "-".join(keys),
                ", ".join(words),
                "openvino_genai_vlm",
                OPENVINO,
                partial(openvino, weights),
                {"precision": hint, "prefix": prefix},
                precision=bounds[weights] if hint or weights != "fp32" else None,
                keeps=prefix,
            )
        )
    kinds = {"f32": "fp32", "f16": "fp16"} | ({"q8_0": "w8", "q4_0": "w4"} if blocks else {})
    for kind, precision in kinds.items():
        label = f"llama.cpp, {kind.upper()}"
        model = partial(gguf, kind)
        plain = Peer(f"llama.cpp-{kind}", label, "llama_cpp_mtmd", LLAMA_CPP, model, {}, precision)
        peers.append(plain)
        if precision in BLOCKS:  # what it rearranges them for fails on some processors
            key, label = f"{plain.key}-stored", f"{label}, weights as stored"
            peers.append(replace(plain, key=key, label=label, settings={"stored": True}))
    if bare:
        peers += cdpruner_peers(visual_tokens)
    plans = plans_of(visual_tokens, selector).items()
    precisions = (*PRECISIONS, *((*BLOCKS, STEPS) if blocks else ()))
    for target, precision, (name, plan) in product(targets, precisions, plans):
        rows, _, steps = precision.partition(":decode=")
        key, words = [name, rows, *([steps] if steps else [])], [plan, OURS[precision]]
        if target != "cpu":
            key, words = [*key, target], [*words, target]
        peers.append(
            Peer(
                "-".join(["visistage", *key]),
                ", ".join(["visistage", *words]),
                "ours",
                OWN,
                partial(bundle, plan, precision, target),
                precision=rows,
                decode=steps or None,
                plan=plan,
            )
        )
    return peers
