"""Accuracy of a saved model by Hugging Face's classes, chat template and greedy `generate`.

    python -m visistage.demo.training.check demo --count 2000
    python -m visistage.demo.training.check easy-vqa --count 9673

Prints a table by kind and uses nothing of the training code.
"""

from __future__ import annotations

import argparse
import itertools
from collections import defaultdict
from collections.abc import Iterable
from pathlib import Path

import torch
from transformers import AutoProcessor, LlavaForConditionalGeneration

from ..easy_vqa import easy_vqa_samples
from ..heldout import HeldOutSample, held_out
from ..worlds import WORLDS


@torch.inference_mode()
def check(folder: Path, samples: Iterable[HeldOutSample], chunk: int = 25) -> dict[str, float]:
    """Return the share of exactly right answers to `samples`, by kind and "all"."""
    model = LlavaForConditionalGeneration.from_pretrained(folder, dtype=torch.float32).eval()
    processor = AutoProcessor.from_pretrained(folder)
    hits = defaultdict(list)
    samples = iter(samples)
    while part := list(itertools.islice(samples, chunk)):
        texts = []
        for sample in part:
            content = [{"type": "image"}, {"type": "text", "text": sample.question}]
            message = {"role": "user", "content": content}
            text = processor.apply_chat_template([message], add_generation_prompt=True)
            if text != sample.prompt:
                raise AssertionError(f"the template gives {text!r}, not {sample.prompt!r}")
            texts.append(text)
        images = [[sample.image] for sample in part]
        inputs = processor(images=images, text=texts, return_tensors="pt", padding=True)
        tokens = model.generate(**inputs, max_new_tokens=8, do_sample=False)
        tokens = tokens[:, inputs["input_ids"].shape[1] :]
        for sample, words in zip(part, processor.batch_decode(tokens, True), strict=True):
            hit = words.strip() == sample.answer
            hits[sample.kind].append(hit)
            hits["all"].append(hit)
    return {kind: sum(found) / len(found) for kind, found in hits.items()}


def main() -> None:
    """Parse the command line and print the table."""
    parser = argparse.ArgumentParser(description="Ask the demo model held-out questions.")
    parser.add_argument("series", choices=[*WORLDS, "easy-vqa"], help="what is asked")
    parser.add_argument(
        "--model", type=Path, help="folder of the model, the shipped one if left out"
    )
    parser.add_argument("--count", type=int, default=2000)
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    if options.series == "easy-vqa":
        samples = easy_vqa_samples(options.count)
    else:
        samples = held_out(options.count, options.seed, world=WORLDS[options.series])
    folder = "model-576" if options.series == "demo-576" else "model"
    shares = check(options.model or Path(__file__).parents[1] / folder, samples)
    for kind, share in shares.items():
        print(f"{kind:10} {100 * share:5.1f}")


if __name__ == "__main__":
    main()
