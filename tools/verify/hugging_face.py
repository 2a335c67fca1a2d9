"""The first link of the checks: Hugging Face's model and processor against the torch stages.

Both run unpruned, with weights in the type of the bundle's floats, so that in FP16 bundles it is
the stages that are compared and not the rounding. Hugging Face does not know a bundle's integers:
for quantised ones, those without some layers, and those whose prefix was computed by routers, the
stages read the checkpoint's weights here.
"""

from __future__ import annotations

import gc
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from transformers import AutoModelForImageTextToText, AutoProcessor, GenerationConfig
from transformers.utils import logging

from ...compile.checkpoint.known_models import model_config
from ...graphs.bundle import Manifest
from ...graphs.families.registry import FAMILIES
from ...graphs.fusion import PLAIN, STRATEGY
from ...graphs.presets.presets import preset
from ...runtime.image.preprocessing import Preprocessing
from .chains import PreparedPrompt, fp32_bytes
from .compare import BOUNDS, first_wrong, tensor_error
from .verify_report import CheckResult, NothingError, require_memory
from .verify_target import VerifyTarget


def compare_dense(target: VerifyTarget) -> CheckResult:
    """Compare greedy tokens and logits over the dense plan."""
    checkpoint, manifest = target.checkpoint, target.bundle.manifest
    if checkpoint.raw.get(STRATEGY) not in PLAIN:
        raise NothingError(f"Hugging Face's model knows no {STRATEGY}")
    plan = manifest.plan
    own = manifest.quantization.quantises or plan.dropped or plan.fixed_calls
    stages = target.original if own else target.reference
    prompts, steps = target.prompts, target.max_tokens
    needed = fp32_bytes(checkpoint)
    require_memory("the whole model in Hugging Face, in FP32,", needed, target.free)
    theirs = _generate(target)
    dense = preset("dense", manifest.config.text.layers, manifest.config.visual_tokens)
    failure, errors, equal = "", [], 0
    for prompt, (tokens, logits) in zip(prompts, theirs, strict=True):
        ours = stages.answer(prompt, steps, plan=dense)
        apart = next((at for at in range(steps) if ours.tokens[at] != tokens[at]), None)
        equal += apart is None
        # Behind a differing token the two have different histories.
        same = steps if apart is None else apart + 1
        name = prompt.sample.name
        errors.append(tensor_error(f"{name}: logits", ours.logits[:same], logits[:same]))
        if apart is not None:
            failure = failure or f"{name}: token {apart} differs from Hugging Face's"
    return CheckResult(
        failure or first_wrong(errors, BOUNDS["float32"].whole),
        target.files,
        tuple(errors),
        {"free-running": f"{equal} of {len(prompts)} answers of {steps} tokens are equal"},
    )


def _processor(folder: Path) -> Any:
    """Return the model's processor; None where it needs libraries for videos that are not here."""
    try:
        return AutoProcessor.from_pretrained(folder, backend="pil", local_files_only=True)
    except (ImportError, ValueError):
        return None


def _theirs(processor: Any, prompt: PreparedPrompt, manifest: Manifest) -> Any:
    """Return a prompt as the processor prepares it, of an image that is on the canvas already."""
    content = [{"type": "image"}, {"type": "text", "text": prompt.sample.prompt}]
    text = processor.apply_chat_template(
        [{"role": "user", "content": content}], add_generation_prompt=True
    )
    image = prompt.opened.image  # from whatever it was, as the runtime reads it
    if manifest.config.canvas is not None:
        filter_ = Image.Resampling(Preprocessing.from_dict(manifest.preprocessing).resample)
        image = image.resize(manifest.config.canvas[::-1], filter_)
    return processor(text=text, images=image, return_tensors="pt")


def _inputs(target: VerifyTarget, prompt: PreparedPrompt) -> dict[str, Tensor]:
    """Return a prompt as the runtime prepares it."""
    layout, config = prompt.opened.layout, target.bundle.manifest.config
    runs = iter([config.image_token_id] * (stop - start) for start, stop in layout.spans)
    ids = [id_ for part in prompt.parts for id_ in (next(runs) if part is None else part)]
    whole = torch.tensor([ids])
    pixels = torch.from_numpy(prompt.opened.pixels)
    inputs = {"input_ids": whole, "attention_mask": torch.ones_like(whole)}
    if layout.merge:  # patches of a video's frames, of which a still picture is all
        frames = pixels.reshape(len(pixels), config.vision.channels, 1, -1)
        pixels = frames.expand(-1, -1, config.vision.frames, -1).flatten(1)
        inputs["image_grid_thw"] = torch.tensor([[1, *layout.grid]])
        inputs["mm_token_type_ids"] = (whole == config.image_token_id).int()
    if config.packs:
        inputs["image_sizes"] = torch.tensor([config.canvas or prompt.opened.size])
    nested = FAMILIES[config.family].nested
    return inputs | {"pixel_values": pixels[None] if nested else pixels}


@torch.no_grad()
def _generate(target: VerifyTarget) -> list[tuple[list[int], np.ndarray]]:
    """Return tokens and logits (steps, V) of every sample; the end of an answer is ignored."""
    logging.disable_progress_bar()  # verification shows its own
    folder, steps = target.checkpoint.path, target.max_tokens
    config = target.bundle.manifest.config
    # With a budget the processor has an option of its own, and our pixels are compared as they are.
    budgeted = config.limits != model_config(str(folder)).limits
    processor = None if budgeted else _processor(folder)
    model = AutoModelForImageTextToText.from_pretrained(
        folder, dtype=torch.float32, local_files_only=True
    ).eval()
    if target.bundle.manifest.dtype == "float16":
        for parameter in model.parameters():
            parameter.data = parameter.data.half().float()
    if config.packs:
        model.config.image_grid_pinpoints = [list(size) for size in config.limits.sizes]
    model.generation_config = GenerationConfig(do_sample=False, pad_token_id=0)
    out = []
    for prompt in target.prompts:
        if processor is None:
            inputs = _inputs(target, prompt)
        else:
            inputs = _theirs(processor, prompt, target.bundle.manifest)
        made = model.generate(
            **inputs, max_new_tokens=steps, output_logits=True, return_dict_in_generate=True
        )
        tokens = made.sequences[0, inputs["input_ids"].shape[1] :].tolist()
        out.append((tokens, torch.cat(made.logits).float().numpy()))
    del model
    gc.collect()
    return out
