"""transformers' own ``generate``; runs in this project's environment."""

from serving import Stopwatch, serve  # isort: skip  (first: it notes when this process began)

import json
from pathlib import Path

import torch
import transformers
from PIL import Image
from transformers import (
    AutoImageProcessor,
    AutoModelForImageTextToText,
    AutoProcessor,
    AutoTokenizer,
    GenerationConfig,
)
from transformers.generation.streamers import BaseStreamer


class TokenListener(BaseStreamer):
    """Passes new tokens on; the first call brings the prompt."""

    def __init__(self, watch):
        self.watch, self.prompt = watch, True

    def put(self, value):
        """Take the ids of the prompt, then one new id a call."""
        if not self.prompt:
            self.watch.hear(value)
        self.prompt = False

    def end(self):
        """Do nothing: all tokens were passed on."""


def processor_of(folder):
    """Return a checkpoint's processor; where it has one of videos, which needs torchvision, of
    images alone.
    """
    options = {"backend": "pil", "local_files_only": True}
    try:
        return AutoProcessor.from_pretrained(folder, **options)
    except ImportError:
        named = json.loads((Path(folder) / "processor_config.json").read_text())
        base = getattr(transformers, named["processor_class"])
        kind = type("ImagesAlone", (base,), {"check_argument_for_proper_class": lambda *_: None})
        images = AutoImageProcessor.from_pretrained(folder, **options)
        return kind(images, AutoTokenizer.from_pretrained(folder, local_files_only=True), None)


class EagerReference:
    """The reference: FP32, greedy, the end of an answer ignored."""

    def __init__(self, model, threads):
        torch.set_num_threads(threads)
        self.processor = processor_of(model)
        self.model = AutoModelForImageTextToText.from_pretrained(
            model, dtype=torch.float32, local_files_only=True
        ).eval()
        self.model.generation_config = GenerationConfig(do_sample=False, pad_token_id=0)
        attention = self.model.config.text_config._attn_implementation
        self.about = {
            "transformers": transformers.__version__,
            "torch": torch.__version__,
            "attention": attention,
        }

    @torch.no_grad()
    def ask(self, image, question, text, new):
        """Answer, keeping nothing: transformers has no cache of images."""
        del question
        watch = Stopwatch()
        inputs = self.processor(text=text, images=Image.fromarray(image), return_tensors="pt")
        self.model.generate(**inputs, max_new_tokens=new, streamer=TokenListener(watch))
        return watch.heard(inputs["input_ids"].shape[1])


if __name__ == "__main__":
    serve(EagerReference)
