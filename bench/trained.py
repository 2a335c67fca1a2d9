"""Accuracy of the demo with weights trained for a method, and of the same plan with its own.

    python -m visistage.bench.trained [--samples 2000] [--method hidrop]

Trained weights are those of ``demo/deltas``. Where the demo lacks weights that a method needs, such
as routers, its own are completed by untrained ones, as training starts from them.
"""

from __future__ import annotations

import os
from concurrent.futures import ProcessPoolExecutor
from itertools import repeat
from pathlib import Path
from typing import Any

import click

from ..calib.evaluate import Share
from ..calib.samples import Sample, normalise_answer
from ..compile.build import make_bundle
from ..compile.matched_bundles import STOCK, TRAINED
from ..demo.training import delta, finetune
from ..demo.training.methods import RULES
from ..graphs.plan.cost import Geometry
from ..graphs.presets.matching import flops_share
from ..runtime import Conversation, Session, load
from .record import dry_option, save
from .turns import series_samples

FURTHER = {"skipgpt": ("skipgpt:share=0.5",)}
"""Plans that are measured beside a method's own."""


@click.command()
@click.option("--samples", default=2000, show_default=True)
@click.option("--method", "methods", multiple=True, help="Instead of all that have a delta.")
@click.option("--out", default="engines", show_default=True, help="Folder of the bundles.")
@dry_option
def main(samples: int, methods: tuple[str, ...], out: str, dry: bool) -> None:
    """Build, ask, record."""
    chosen = methods or [name for name in RULES if delta_of(name).is_file()]
    rows: list[dict[str, Any]] = [
        {"method": "dense", "plan": "dense", "weights": STOCK, "visual_flops_share": 1.0}
    ]
    paths = [make_bundle("demo", plan="dense", out=Path(out)).path]
    for name in chosen:
        checkpoints = Path(out) / "checkpoints"
        stock, trained = "demo", checkpoints / f"demo-{name}"
        if RULES[name].routed or RULES[name].states:
            stock = str(checkpoints / f"demo-{name}-untrained")
            finetune.main([name, "--apply", stock, "--untrained"])
        found = delta.apply(delta_of(name), trained)
        for plan in (RULES[name].plan, *FURTHER.get(name, ())):
            for weights, model in ((STOCK, stock), (TRAINED, str(trained))):
                bundle = make_bundle(model, plan=plan, out=Path(out))
                manifest = bundle.manifest
                row = {"method": name, "plan": plan, "weights": weights}
                row["visual_flops_share"] = flops_share(
                    manifest.plan, Geometry.of(manifest.config.text)
                )
                rows.append(row | ({"weights_sha256": found} if weights == TRAINED else {}))
                paths.append(bundle.path)
    grouped = [row["method"] in RULES and RULES[row["method"]].apart for row in rows]
    with ProcessPoolExecutor(len(os.sched_getaffinity(0))) as pool:
        heard = list(pool.map(answers, paths, grouped, repeat(samples)))
    asked = series_samples("demo", samples)
    for row, texts in zip(rows, heard, strict=True):
        row |= {**tally(asked, texts).to_dict(), "agreement": same(texts, heard[0])}
        row["accuracy"] = row.pop("share")
        kinds = sorted({sample.type or "" for sample in asked})
        row["by_type"] = {kind: kind_share(asked, texts, kind) for kind in kinds}
    save("trained-demo", rows, dry=dry)


def delta_of(method: str) -> Path:
    """Return the file of a method's delta."""
    return delta.DELTAS / f"{method}.safetensors"


def answers(path: Path, grouped: bool, samples: int) -> list[str]:
    """Return the answers of a bundle; ``grouped``: at group positions."""
    with load(path, threads=1) as session:
        ask = ask_grouped if grouped else ask_plainly
        found = [ask(session, sample) for sample in series_samples("demo", samples)]
    print(path, flush=True)
    return found


def ask_plainly(session: Session, sample: Sample) -> str:
    """Return an answer to a prompt."""
    return session.infer(sample.image, sample.prompt, max_tokens=8).text


def ask_grouped(session: Session, sample: Sample) -> str:
    """Read the image and the question, and write the answer at positions of its own."""
    conversation = Conversation(session, positions="group")
    conversation.read(" ")  # as the template has it before an image
    conversation.read(sample.image)
    conversation.read(f"\n{sample.prompt}")
    return conversation.write(8).strip()


def tally(asked: list[Sample], texts: list[str]) -> Share:
    """Return how many answers are right."""
    marks = [
        normalise_answer(text) == normalise_answer(sample.answer)
        for sample, text in zip(asked, texts, strict=True)
    ]
    return Share(sum(marks), len(marks))


def kind_share(asked: list[Sample], texts: list[str], kind: str) -> float:
    """Return the share of the questions of a kind that are answered right."""
    own = [pair for pair in zip(asked, texts, strict=True) if (pair[0].type or "") == kind]
    return tally(*map(list, zip(*own, strict=True))).share


def same(texts: list[str], dense: list[str]) -> float:
    """Return the share of answers with the text of the unpruned demo's."""
    return sum(a == b for a, b in zip(texts, dense, strict=True)) / len(texts)


if __name__ == "__main__":
    main()
