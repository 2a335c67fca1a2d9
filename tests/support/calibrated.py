"""Calibrations of small checkpoints, made from drawn pictures in a second."""

import json
from pathlib import Path

import numpy as np
from visistage.calib.run.collect_ranges import calibrated_ranges
from visistage.calib.sample_prompts import prepare
from visistage.calib.samples import Sample
from visistage.compile.checkpoint.checkpoint import open_checkpoint
from visistage.compile.export.texts import fits, text_facts
from visistage.compile.planfile import resolve_plan
from visistage.compile.quantize.calibration_file import Calibration
from visistage.graphs.progress import Progress
from visistage.runtime.image.preprocessing import Preprocessing

QUESTIONS = ("What is this?", "How many of them are there, and where?", "Why?")


def calibrate(model, plan: str, folder: Path) -> Calibration:
    """Calibrate ``model`` for ``plan`` and save it in ``folder``."""
    checkpoint = open_checkpoint(str(model))
    config, texts = checkpoint.config, text_facts(checkpoint)
    generator = np.random.default_rng(5)
    images = generator.integers(0, 256, (len(QUESTIONS), 40, 48, 3), np.uint8)
    samples = [
        Sample(f"drawn {number}", image, question, "It is")
        for number, (image, question) in enumerate(zip(images, QUESTIONS, strict=True))
    ]
    preprocessing = Preprocessing.from_dict(texts.preprocessing)
    prompts, _ = prepare(samples, texts.encoder, preprocessing, checkpoint.config)
    staged = resolve_plan(plan, config.text.layers, config.visual_tokens)
    facts = fits(checkpoint, texts)
    calibration = calibrated_ranges(
        checkpoint, facts, prompts, staged, texts.prefix_ids, progress=Progress()
    )
    calibration.save(folder)
    return calibration


def spoilt(folder: Path, field: str) -> None:
    """Make a saved calibration fit another ``model``, ``template`` or ``preprocessing``."""
    file = folder / "calibration.json"
    facts = json.loads(file.read_text())
    facts["fits"][field] = "0" * 64
    file.write_text(json.dumps(facts))
