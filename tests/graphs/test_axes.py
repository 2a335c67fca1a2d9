"""Rows with three positions, norms by head and features added within, against transformers.

A decoder of Qwen3-VL over given rows: an image's rows stand on a grid, and what follows it goes on
behind the longer side. Every mistake that keeps shapes must be noticed, some in decoding only.
"""

from dataclasses import replace

import numpy as np
import pytest
import torch
from transformers import Qwen3VLForConditionalGeneration
from visistage.graphs.chain import torch_reference as chain
from visistage.graphs.presets.presets import preset
from visistage.graphs.text_config import TextConfig
from visistage.tests.support.qwen import lively, qwen3_vl_config

NEW, GRIDS = 16, ((3, 5), (4, 2))
TEXT = (4, 3, 5)


@pytest.fixture(scope="module")
def model():
    torch.manual_seed(0)
    return lively(Qwen3VLForConditionalGeneration(qwen3_vl_config())).eval()


def positions_of(lengths, grids):
    """Positions (S, 3) of texts with an image between each two, and the spans of the images."""
    at, places, spans = 0, [], []
    for index, length in enumerate(lengths):
        places += [[at + i] * 3 for i in range(length)]
        at += length
        if index < len(grids):
            rows, columns = grids[index]
            spans.append((len(places), len(places) + rows * columns))
            places += [[at, at + r, at + c] for r in range(rows) for c in range(columns)]
            at += max(rows, columns)
    return np.array(places), spans


class Prompt:
    def __init__(self, model, seed=1):
        generator = torch.Generator().manual_seed(seed)
        text = model.config.text_config
        self.positions, self.spans = positions_of(TEXT, GRIDS)
        count = len(self.positions)
        self.rows = torch.randn(1, count, text.hidden_size, generator=generator)
        self.seen = torch.zeros(1, count, dtype=torch.bool)
        for start, stop in self.spans:
            self.seen[:, start:stop] = True
        visual = int(self.seen.sum())
        self.features = [
            2 * torch.randn(visual, text.hidden_size, generator=generator) for _ in range(3)
        ]
        self.config = text.to_dict()
        language = {n: w for n, w in model.model.language_model.state_dict().items()}
        self.weights = {f"model.{name}": weight for name, weight in language.items()}

    @property
    def inject(self):
        out = {}
        for layer, features in enumerate(self.features, 1):
            out[layer] = torch.zeros_like(self.rows)
            out[layer][self.seen] = features
        return out

    def run(self, plan="dense", **changed):
        given = {"positions": self.positions[None], "inject": self.inject} | changed
        config = given.pop("config", self.config)
        if isinstance(plan, str):
            plan = preset(plan, self.config["num_hidden_layers"], 23)
        return chain.run(self.weights, config, self.rows, [self.spans], plan, NEW, **given)

    @torch.no_grad()
    def theirs(self, model):
        """Logits of the last prompt row, and greedy tokens, by transformers' own loop over rows."""
        from transformers import DynamicCache

        language, cache, tokens = model.model.language_model, DynamicCache(), []
        at = torch.from_numpy(self.positions).T[:, None]
        out = language(
            inputs_embeds=self.rows, position_ids=at, cache=cache, use_cache=True,
            visual_pos_masks=self.seen, deepstack_visual_embeds=self.features,
        )  # fmt: skip
        first = logits = model.lm_head(out.last_hidden_state[:, -1])
        for step in range(NEW):
            tokens.append(int(logits.argmax()))
            row = language.embed_tokens(torch.tensor([tokens[-1:]]))
            places = torch.full((3, 1, 1), int(self.positions.max()) + 1 + step)
            out = language(inputs_embeds=row, position_ids=places, cache=cache, use_cache=True)
            logits = model.lm_head(out.last_hidden_state[:, -1])
        return first, tokens


@pytest.fixture(scope="module")
def prompt(model):
    return Prompt(model)


@pytest.fixture(scope="module")
def wanted(model, prompt):
    return prompt.theirs(model)


def difference(got, wanted):
    return float((got.logits - wanted[0]).abs().max() / wanted[0].std())


def test_a_dense_plan_is_the_model(prompt, wanted):
    mine = prompt.run()
    assert difference(mine, wanted) < 1e-4
    assert mine.tokens[0].tolist() == wanted[1]
    assert len(set(wanted[1])) >= 8


def test_selections_keep_positions_and_features(prompt, wanted):
    """All rows selected, at an edge before features are added and at one behind, is dense."""
    for k in (1, 2, 3):
        layers = prompt.config["num_hidden_layers"]
        mine = prompt.run(preset("fastv", layers, 23, k=k, r=0))
        assert difference(mine, wanted) < 1e-4
        assert mine.tokens[0].tolist() == wanted[1]
        fewer = prompt.run(preset("fastv", layers, 23, k=k, r=0.6))
        assert difference(fewer, wanted) > 1e-2


@pytest.mark.parametrize(
    "mistake", ["chunked", "no features", "a layer late", "reversed", "swapped", "one axis"]
)
def test_mistakes_change_the_first_logits(prompt, wanted, mistake, monkeypatch):
    changed = {}
    features = prompt.inject
    if mistake == "chunked":
        of = TextConfig.from_hf.__func__

        def chunked(cls, data):
            text = of(cls, data)
            return replace(text, rope=replace(text.rope, interleaved=False))

        monkeypatch.setattr(TextConfig, "from_hf", classmethod(chunked))
    elif mistake == "no features":
        changed["inject"] = {layer: 0 * rows for layer, rows in features.items()}
    elif mistake == "a layer late":
        changed["inject"] = {layer + 1: rows for layer, rows in features.items() if layer < 3}
    elif mistake == "reversed":
        changed["inject"] = {4 - layer: rows for layer, rows in features.items()}
    elif mistake == "swapped":
        changed["positions"] = prompt.positions[None][..., [0, 2, 1]]
    else:
        changed["positions"] = np.arange(len(prompt.positions))[None]
    assert difference(prompt.run(**changed), wanted) > 0.05


def test_rows_counted_instead_of_positions_break_the_answer_alone(prompt, wanted, monkeypatch):
    """The prompt's logits are right: only decoding tells."""
    placed = chain._placed

    def counted(*given):
        whole, lag = placed(*given)
        return whole, 0 * lag

    monkeypatch.setattr(chain, "_placed", counted)
    mine = prompt.run()
    assert difference(mine, wanted) < 1e-4
    assert mine.tokens[0].tolist() != wanted[1]


def test_left_padding_changes_nothing(prompt):
    """A batch of two prompts, one of which has less text before its images, equals both alone."""
    cut = TEXT[0] - 1

    def short(rows):
        return rows[:, cut:]

    spans = [(start - cut, stop - cut) for start, stop in prompt.spans]
    plan = preset("dense", prompt.config["num_hidden_layers"], 23)
    given = (prompt.weights, prompt.config)
    inject = {layer: short(rows) for layer, rows in prompt.inject.items()}
    places = short(prompt.positions[None])
    alone = chain.run(
        *given, short(prompt.rows), [spans], plan, NEW, positions=places, inject=inject
    )
    # The same prompt, longer by text behind: the batch is as long as the longer one.
    after = prompt.rows[:, :cut]
    last = int(places.max()) + 1 + np.arange(cut)
    both = chain.run(
        *given,
        torch.cat((prompt.rows, torch.cat((short(prompt.rows), after), 1))),
        [prompt.spans, spans],
        plan,
        NEW,
        positions=np.concatenate(
            (prompt.positions[None], np.concatenate((places, last[None, :, None].repeat(3, 2)), 1))
        ),
        inject={
            layer: torch.cat((rows, torch.nn.functional.pad(short(rows), (0, 0, 0, cut))))
            for layer, rows in prompt.inject.items()
        },
    )
    more = chain.run(
        *given,
        torch.cat((short(prompt.rows), after), 1),
        [spans],
        plan,
        NEW,
        positions=np.concatenate((places, last[None, :, None].repeat(3, 2)), 1),
        inject={n: torch.nn.functional.pad(r, (0, 0, 0, cut)) for n, r in inject.items()},
    )
    assert alone.tokens.tolist() != more.tokens.tolist()
    assert both.tokens.tolist() == [prompt.run().tokens[0].tolist(), more.tokens[0].tolist()]
