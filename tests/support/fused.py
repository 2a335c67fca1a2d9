"""Layer fusion written to be obvious: states of transformers' own encoder, whole sequences.

Source: docs/methods.md, "Layer fusion". ``Fused`` shares no code with the graphs but what reads
files; its options are the mistakes that one may make.
"""

import json
from pathlib import Path

import torch
from safetensors.torch import load_file
from transformers import CLIPVisionConfig, CLIPVisionModel
from visistage.compile.checkpoint.names import canonical

from .reference import forward

READ = {  # states in front of the projector (a tuple: their mean), and those within the decoder
    "18": ([18], [18]),
    "3-18-23": ([3, 18], [3, 18, 23]),
    "former": ([tuple(range(1, 13))], list(range(1, 13))),
    "latter": ([tuple(range(13, 25))], list(range(13, 25))),
    "all": ([tuple(range(1, 13)), tuple(range(13, 25))], list(range(1, 25))),
}
LITERAL = {"former": lambda depth: range(12), "latter": lambda depth: range(depth - 12, depth)}
LITERAL["all"] = lambda depth: [*range(12), *range(depth - 12, depth)]


class Fused:
    """A checkpoint of 24 encoder layers, and its answers.

    Args:
        path: of the checkpoint.
        shift: added to the number of every state that is read.
        late: features are added behind their layer.
        shared: every feature goes through the first projector.
        repeat: state 23 takes the place of the last injected one.
        decoded: the last visual row's features are added to every row of the answer, too.
    """

    def __init__(self, path, shift=0, late=False, shared=False, repeat=False, decoded=False):
        self.config = json.loads((Path(path) / "config.json").read_text())
        self.text = dict(self.config["text_config"])
        self.text["rope_theta"] = self.text["rope_parameters"]["rope_theta"]
        stored = load_file(Path(path) / "model.safetensors")
        self.weights = {canonical(name): tensor.float() for name, tensor in stored.items()}
        self.tower = CLIPVisionModel(CLIPVisionConfig(**self.config["vision_config"])).eval()
        own = {
            name.removeprefix("vision_tower."): tensor
            for name, tensor in self.weights.items()
            if name.startswith("vision_tower.")
        }
        self.tower.load_state_dict(own)
        self.shift, self.late, self.shared = shift, late, shared
        self.repeat, self.decoded = repeat, decoded
        self.strategy, self.chosen = (
            self.config.get(f"layer_{name}_strategy") for name in ("fusing", "using")
        )

    def project(self, name, x):
        for place in (1, 2):
            weight, bias = (
                self.weights[f"{name}.linear_{place}.{part}"] for part in ("weight", "bias")
            )
            x = x @ weight.T + bias
            x = torch.nn.functional.gelu(x) if place == 1 else x
        return x

    @torch.no_grad()
    def rows(self, pixels):
        """Visual rows (N, D), and what layers add to them."""
        states = self.tower(pixels[None], output_hidden_states=True).hidden_states

        def state(number):
            return states[min(number + self.shift, 24)][0, 1:]

        base = states[self.config["vision_feature_layer"]][0, 1:]
        if self.strategy != "I_D":
            read = READ[self.chosen][0] if self.strategy else []
            parts = [
                torch.stack([state(n) for n in own]).mean(0)
                if isinstance(own, tuple)
                else state(own)
                for own in read
            ]
            return self.project("multi_modal_projector", torch.cat([*parts, base], -1)), {}
        depth, read = self.text["num_hidden_layers"], READ[self.chosen][1]
        into = [int(number * depth / 24) - 1 for number in read]
        into = list(LITERAL[self.chosen](depth)) if self.chosen in LITERAL else into
        added = {}
        for number, (own, layer) in enumerate(zip(read, into, strict=True)):
            chosen = base if self.repeat and number == len(read) - 1 else state(own)
            projector = f"mm_projectors.{0 if self.shared else number}"
            added[layer + self.late] = self.project(projector, chosen)
        return self.project("multi_modal_projector", base), added

    @torch.no_grad()
    def answer(self, segments, pixels, tokens, method=None):
        """Logits (len(tokens) + 1, V) along ``tokens``; ``segments``: of the prompt, as encoded."""
        rows, added = self.rows(pixels)
        table = self.weights["model.embed_tokens.weight"]
        parts = [rows if part.is_image else table[list(part.ids)] for part in segments]
        kinds = [
            torch.full((len(own),), part.is_image)
            for own, part in zip(parts, segments, strict=True)
        ]
        embeds, visual = torch.cat(parts), torch.cat(kinds)
        whole = {}
        for layer, features in added.items():
            whole[layer] = torch.zeros_like(embeds)
            whole[layer][visual] = features
        probe, kept, out = len(embeds) - 1, None, []
        for token in (None, *tokens):
            if token is not None:
                embeds = torch.cat((embeds, table[token][None]))
                visual = torch.cat((visual, torch.tensor([False])))
                for layer, features in added.items():
                    extra = features[-1:] if self.decoded else torch.zeros_like(features[:1])
                    whole[layer] = torch.cat((whole[layer], extra))
            logits, kept = forward(
                self.weights, self.text, embeds, visual, method, probe, kept, added=whole
            )
            out.append(logits)
        return torch.stack(out)
