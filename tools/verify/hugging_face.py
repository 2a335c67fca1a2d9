"""The lowest rung: Hugging Face's own model and processor against the torch stages, unpruned.

Both take the weights in the type of the bundle's floats, so that in FP16 bundles it is the stages
that are compared and not the rounding. Hugging Face knows nothing of a bundle's integers: of
quantised ones the stages read the checkpoint's weights here.
"""

from __future__ import annotations

import gc
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageOps
from transformers import AutoProcessor, GenerationConfig, LlavaForConditionalGeneration
from transformers.utils import logging

from ...calib.samples import Sample
from ...compile.checkpoint.checkpoint import Checkpoint
from ...graphs.bundle import Bundle
from ...graphs.presets.presets import preset
from .chains import Asked, TorchChain
from .check_steps import require_memory
from .compare import BOUNDS, first_wrong, tensor_error
from .stored_graph import graph_files
from .verify_report import CheckResult


def compare_dense(
    bundle: Bundle,
    checkpoint: Checkpoint,
    stages: TorchChain,
    asked: Sequence[Asked],
    steps: int,
    free: int,
) -> CheckResult:
    """Greedy tokens equal, logits near, over the dense plan.

    Raises:
        ImpossibleError: too little memory for the model in FP32.
    """
    needed = 4 * sum(info.nbytes // _itemsize(info.dtype) for info in checkpoint.tensors.values())
    require_memory("the whole model in Hugging Face, in FP32,", needed, free)
    theirs = _generate(
        checkpoint.path,
        [one.sample for one in asked],
        steps,
        rounded=bundle.manifest.dtype == "float16",
    )
    config = bundle.manifest.config
    dense = preset("dense", config.text.layers, config.visual_tokens)
    failure, errors, equal = "", [], 0
    for one, (tokens, logits) in zip(asked, theirs, strict=True):
        ours = stages.answer(one, steps, plan=dense)
        apart = next((at for at in range(steps) if ours.tokens[at] != tokens[at]), None)
        equal += apart is None
        # Behind a differing token the two have different histories.
        same = steps if apart is None else apart + 1
        name = one.sample.name
        errors.append(tensor_error(f"{name}: logits", ours.logits[:same], logits[:same]))
        if apart is not None:
            failure = failure or f"{name}: token {apart} differs from Hugging Face's"
    return CheckResult(
        failure or first_wrong(errors, BOUNDS["float32"].whole),
        graph_files(bundle),
        tuple(errors),
        {"free-running": f"{equal} of {len(asked)} answers of {steps} tokens are equal"},
    )


@torch.no_grad()
def _generate(
    folder: Path, samples: Sequence[Sample], steps: int, *, rounded: bool
) -> list[tuple[list[int], np.ndarray]]:
    """Tokens and logits (steps, V) of every sample; the end of an answer is ignored.

    ``rounded``: weights through FP16 first.
    """
    logging.disable_progress_bar()  # the ladder shows its own
    processor = AutoProcessor.from_pretrained(folder, backend="pil", local_files_only=True)
    model = LlavaForConditionalGeneration.from_pretrained(
        folder, dtype=torch.float32, local_files_only=True
    ).eval()
    if rounded:
        for parameter in model.parameters():
            parameter.data = parameter.data.half().float()
    model.generation_config = GenerationConfig(do_sample=False, pad_token_id=0)
    out = []
    for sample in samples:
        content = [{"type": "image"}, {"type": "text", "text": sample.prompt}]
        text = processor.apply_chat_template(
            [{"role": "user", "content": content}], add_generation_prompt=True
        )
        inputs = processor(text=text, images=_rgb(sample.image), return_tensors="pt")
        made = model.generate(
            **inputs, max_new_tokens=steps, output_logits=True, return_dict_in_generate=True
        )
        tokens = made.sequences[0, inputs["input_ids"].shape[1] :].tolist()
        out.append((tokens, torch.cat(made.logits).float().numpy()))
    del model
    gc.collect()
    return out


def _rgb(image: str | Path | Image.Image) -> Image.Image:
    """RGB and upright, as the runtime reads it."""
    opened = image if isinstance(image, Image.Image) else Image.open(image)
    return ImageOps.exif_transpose(opened).convert("RGB")


def _itemsize(dtype: str) -> int:
    return 4 if dtype == "F32" else 2
