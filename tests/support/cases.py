"""Toy checkpoints, and prompts through them, in the hands of judges and in ours."""

import dataclasses
import itertools

import torch
from transformers import LlavaForConditionalGeneration
from visistage.compile.checkpoint.names import canonical
from visistage.graphs.chain import torch_reference as chain
from visistage.graphs.config import ModelConfig
from visistage.graphs.modules.ops import Eager
from visistage.graphs.modules.vision import Vision
from visistage.graphs.presets.presets import preset

from . import published, toy

ANSWER = 24
MARGIN = 1e-4
VARIANTS = {"code": published.CODE, "paper": published.PAPER}


def text_dict(config):
    """The Llama config as ``chain.run`` takes it: both spellings of the rope."""
    text = dict(config["text_config"])
    return {**text, "rope_theta": text["rope_parameters"]["rope_theta"]}


class Case:
    """A toy checkpoint in Hugging Face's hands and in ours."""

    def __init__(self, path, **config):
        toy.make_checkpoint(path, **config)
        self.hf = LlavaForConditionalGeneration.from_pretrained(
            path, dtype=torch.float32, attn_implementation="eager"
        ).eval()
        config.pop("layout", None)
        config.pop("scale", None)
        config.pop("seed", None)
        self.config = toy.make_config(**config)
        self.model = ModelConfig.from_hf(self.config)
        self.weights = {canonical(k): v for k, v in self.hf.state_dict().items()}
        self.text = text_dict(self.config)

    def prompt(self, seed, before=6, after=9):
        generator = torch.Generator().manual_seed(seed)
        image = toy.SPECIALS["<image>"]
        ids = torch.randint(5, toy.VOCAB, (before + after,), generator=generator)
        visual = torch.full((self.model.visual_tokens,), image)
        pixels = torch.randn(1, 3, 32, 32, generator=generator)
        return torch.cat((ids[:before], visual, ids[before:]))[None], pixels

    def vision(self, pixels):
        module = chain.load_weights(Vision(self.model, Eager()), self.weights)
        with torch.no_grad():
            return module(pixels)

    def embeds(self, ids, pixels):
        """Our embeddings of a prompt, and where its image is."""
        rows = torch.nn.functional.embedding(ids, self.weights["model.embed_tokens.weight"])
        at = (ids[0] == toy.SPECIALS["<image>"]).nonzero()[:, 0]
        rows = rows.clone()
        rows[0, at] = self.vision(pixels)[0]
        return rows, [[(int(at[0]), int(at[-1]) + 1)]]

    def run(self, ids, pixels, plan, new=ANSWER):
        rows, spans = self.embeds(ids, pixels)
        return chain.run(self.weights, self.text, rows, spans, plan, new)

    def plan(self, name, **options):
        return preset(name, self.model.text.layers, self.model.visual_tokens, **options)

    @torch.no_grad()
    def generate(self, ids, pixels, new=ANSWER):
        out = self.hf.generate(
            input_ids=ids,
            pixel_values=pixels,
            attention_mask=torch.ones_like(ids),
            max_new_tokens=new,
            min_new_tokens=new,
            do_sample=False,
        )
        return out[:, ids.shape[1] :]

    @torch.no_grad()
    def logits(self, ids, pixels):
        return self.hf(input_ids=ids, pixel_values=pixels).logits[:, -1]


class Prompt:
    """One prompt of a checkpoint, as both sides take it."""

    def __init__(self, case, seed, before=6):
        self.case = case
        ids, pixels = case.prompt(seed, before=before)
        self.rows, self.spans = case.embeds(ids, pixels)
        self.visual = torch.zeros(ids.shape[1], dtype=torch.bool)
        for start, stop in self.spans[0]:
            self.visual[start:stop] = True

    def judge(self, method, new=0):
        case = self.case
        rows = self.rows[0]
        if not new:
            return *published.forward(case.weights, case.text, rows, self.visual, method), []
        return published.generate(case.weights, case.text, rows, self.visual, method, new)

    def run(self, variant, method, new=32):
        """The plan of ``variant`` with the numbers of ``method``."""
        plan = self.case.plan(f"visipruner-{variant}", **options(method))
        return chain.run(self.case.weights, self.case.text, self.rows, self.spans, plan, new)

    def events(self, method):
        """``method`` with thresholds at which each possible event happens on this prompt."""
        last = self.case.model.text.layers - 1
        _, dense, _ = self.judge(dataclasses.replace(method, cosine=-1.0))
        lowest, ceiling = [], 1.0
        for layer, cosines in dense.cosines.items():
            floor = float(cosines.min())
            if floor < ceiling - MARGIN:
                lowest.append((layer, (floor + ceiling) / 2))
                ceiling = floor
        for layer, cosine in lowest:  # the layers that can be the first below a threshold
            norms = dense.norms[layer].sort().values
            gaps = [(float(low), float(high)) for low, high in itertools.pairwise(norms)]
            for count in (0, 1, len(norms) // 3):  # K = 0, one token, some tokens
                low, high = (float(norms[-1]), float(norms[-1]) + 1) if count == 0 else gaps[-count]
                if high - low < MARGIN:
                    continue
                chosen = dataclasses.replace(
                    method, cosine=cosine, contribution=(low + high) / 2, exit_cosine=1.0
                )
                yield f"t={layer} K={count}", chosen
                _, kept, _ = self.judge(chosen)
                later = sorted(
                    float(kept.cosines[at].min()) for at in kept.cosines if at > layer and count
                )
                for low, high in itertools.pairwise([-1.0, *later]):
                    if high - low > MARGIN:
                        quiet = dataclasses.replace(chosen, exit_cosine=(low + high) / 2)
                        yield f"t={layer} K={count} exit_cosine={quiet.exit_cosine:.3f}", quiet
        yield "never", dataclasses.replace(method, cosine=-1.0)
        assert all(layer < last for layer, _ in lowest)


def options(method):
    """A method as options of its preset."""
    given = {
        "shallow": method.shallow or False,
        "probe": method.probe,
        "middle": method.middle,
        "deep": method.deep,
    }
    if method.middle:
        given |= {"cosine": method.cosine, "contribution": method.contribution}
        if method.deep:
            rule = "cumulative" if method.cumulative else "consecutive"
            given |= {"exit_cosine": method.exit_cosine, "exit_rule": rule}
            given |= {"exit_layers": method.exit_layers}
    else:
        del given["probe"]
    if method.layer0 == "half":
        given["template"] = "13b"
    return given


def small(variant, **changes):
    """The published numbers scaled to nine layers: the same gap, the same rules."""
    shallow, probe = (2, 3) if variant == "code" else (3, 3)
    scaled = dataclasses.replace(VARIANTS[variant], shallow=shallow, probe=probe)
    return dataclasses.replace(scaled, **changes)


def agree(result, logits, trace, tokens, prompt, note):
    depth = prompt.case.model.text.layers
    tolerance = 1e-4 * max(1.0, float(logits.abs().max()))
    assert (result.logits[0] - logits).abs().max() < tolerance, note
    everything = prompt.visual.nonzero()[:, 0].tolist()
    kept = everything if trace.kept is None else trace.kept.tolist()
    assert result.kept == [kept], note
    trigger = depth - 1 if trace.trigger is None else trace.trigger
    assert (result.trigger, result.exit) == (trigger, trace.exit), note
    assert result.tokens[0].tolist() == tokens, note
