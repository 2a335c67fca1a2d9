"""One checkpoint in the form that each peer reads, made once and kept.

    .cache/bench/models/NAME/published, openvino-fp32, openvino-int8, gguf-f32, gguf-f16
    .cache/bench/bundles, .cache/bench/calibrations/PLAN

A folder appears under its name when it is whole.
"""

from __future__ import annotations

import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from safetensors.torch import load_file, save_file

from ..calib.calibrate import calibrate
from ..calib.plan_search.measure_plans import Origin
from ..calib.samples import Sample
from ..compile.build import make_bundle
from ..compile.checkpoint.checkpoint import Checkpoint, open_checkpoint
from ..compile.checkpoint.known_models import DEMO
from ..compile.checkpoint.names import canonical, published_name
from ..compile.checkpoint.safetensors_file import read_header
from ..demo.heldout import held_out
from ..graphs.progress import Progress
from ..graphs.quantization import is_quantised
from .environments import LLAMA_CPP, OPENVINO, ROOT, run_in
from .runner import RUNNERS, PeerError

CALIBRATION_SERIES = 1000
"""Held-out scenes that nobody is asked about."""

CALIBRATION_SAMPLES = 8


@dataclass(frozen=True)
class PeerCheckpoint:
    """A checkpoint on disk, and how this project's own commands name it."""

    origin: Origin
    checkpoint: Checkpoint

    @classmethod
    def named(cls, model: str) -> PeerCheckpoint:
        """``demo``, or random weights in a published geometry."""
        origin = Origin(model, dummy_weights=model != DEMO)
        return cls(origin, open_checkpoint(model, dummy_weights=origin.dummy_weights))

    @property
    def side(self) -> int:
        """Of the pictures that the tower takes, in pixels."""
        return self.checkpoint.config.vision.image_size


def hugging_face(subject: PeerCheckpoint) -> Path:
    """The checkpoint under the names of published files, which every version of transformers reads.

    Newer ones write a tower's weights under shorter names; an older one finds none of those, takes
    random numbers and goes on.
    """

    def make(folder: Path, log: Path) -> None:
        del log  # nothing to say
        folder.mkdir()
        for file in subject.checkpoint.path.iterdir():
            if file.is_file() and ".safetensors" not in file.name:
                shutil.copy(file, folder)
        tensors = {name: tensor for file in files for name, tensor in load_file(file).items()}
        renamed = {published_name(canonical(name)): tensor for name, tensor in tensors.items()}
        save_file(renamed, folder / "model.safetensors", {"format": "pt"})

    files = sorted(subject.checkpoint.path.glob("*.safetensors"))
    names = {name for file in files for name in read_header(file)}
    if names == {published_name(canonical(name)) for name in names}:
        return subject.checkpoint.path.absolute()
    return _made(subject, "published", make)


def openvino(subject: PeerCheckpoint, kind: str, minutes: float) -> Path:
    """OpenVINO's export, weights of ``kind``: fp32, fp16 or int8.

    Raises:
        PeerError: the environment or the export failed, or it found weights missing.
    """
    source = hugging_face(subject)

    def make(folder: Path, log: Path) -> None:
        log.unlink(missing_ok=True)
        run_in(
            OPENVINO,
            [
                *("-m", "optimum.commands.optimum_cli", "export", "openvino"),
                *("--model", str(source)),
                # Left to itself it takes image-to-text, and fails.
                *("--task", "image-text-to-text"),
                *("--weight-format", kind, str(folder)),
            ],
            log,
            minutes,
        )
        if "newly initialized" in log.read_text(errors="replace"):
            raise PeerError("openvino: the export took random numbers for weights it did not find")
        # Without it GenAI finds no mean and deviation, and takes others without a word.
        shutil.copy(source / "preprocessor_config.json", folder)

    return _made(subject, f"openvino-{kind}", make)


def gguf(subject: PeerCheckpoint, kind: str, minutes: float) -> Path:
    """llama.cpp's two files, matrices of ``kind``: f32 or f16.

    Raises:
        PeerError: the environment or the conversion failed.
    """
    source = hugging_face(subject)

    def make(folder: Path, log: Path) -> None:
        folder.mkdir()
        script = str(RUNNERS / "to_gguf.py")
        run_in(LLAMA_CPP, [script, str(source), str(folder), kind], log, minutes)

    return _made(subject, f"gguf-{kind}", make)


def bundle(subject: PeerCheckpoint, plan: str, precision: str, target: str) -> Path:
    """A bundle of ours; a quantised one is calibrated first, on scenes nobody is asked about.

    Raises:
        VisistageError: it cannot be built.
    """
    calibration = None
    if is_quantised(precision):
        out = ROOT / "calibrations" / plan.replace(":", "-")
        calibration = out / subject.checkpoint.name
        if not calibration.is_dir():
            scenes = held_out(CALIBRATION_SAMPLES, CALIBRATION_SERIES, subject.side)
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
        out=ROOT / "bundles",
    )
    return made.path


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
