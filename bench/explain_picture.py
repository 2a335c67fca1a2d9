"""The picture of ``visistage explain`` in the README, of an answer that pruning put right.

    python -m visistage.bench.explain_picture

Asks the demo's held-out questions with and without the plan, takes the first one that the plan
answers right and the unpruned model wrong, and photographs its page with Chromium.
"""

from __future__ import annotations

import io
import shutil
import subprocess
import tempfile
from pathlib import Path

import click
from PIL import Image

from .. import runtime
from ..compile.build import make_bundle
from ..demo.heldout import held_out
from ..tools.explain.explanation import explain

PICTURE = Path(__file__).resolve().parents[1] / "docs" / "explain.png"
BROWSERS = ("chromium", "chromium-browser", "google-chrome")
SIZE = (1100, 1290)


def photograph(page: Path, picture: Path) -> None:
    """Write a screenshot of ``page``, in 64 colours."""
    browser = next(filter(None, map(shutil.which, BROWSERS)), None)
    if browser is None:
        raise click.ClickException("no Chromium is installed. Type: apt-get install chromium")
    shot = page.with_suffix(".png")
    # fmt: off
    command = [
        browser, "--headless", "--no-sandbox", "--disable-gpu", "--hide-scrollbars",
        f"--window-size={SIZE[0]},{SIZE[1]}", "--virtual-time-budget=3000",
        f"--screenshot={shot}", page.as_uri(),
    ]
    # fmt: on
    subprocess.run(command, check=True, capture_output=True, timeout=120)
    image = Image.open(shot).convert("RGB")
    image.quantize(64, dither=Image.Dither.NONE).save(picture, optimize=True)


@click.command()
@click.option("--plan", default="visipruner", show_default=True)
@click.option("--samples", default=2000, show_default=True)
@click.option("--out", default="engines", show_default=True, help="Folder of the bundles.")
def main(plan: str, samples: int, out: str) -> None:
    """Find the question, and write docs/explain.png."""
    pruned = make_bundle("demo", plan=plan, out=out).path
    dense = make_bundle("demo", plan="dense", out=out).path
    better, worse = [], 0
    with runtime.load(pruned, threads=1) as one, runtime.load(dense, threads=1) as other:
        for sample in held_out(samples):
            said = [s.infer(sample.image, sample.question).text.strip() for s in (one, other)]
            right = [text == sample.answer for text in said]
            better += [sample] if right == [True, False] else []
            worse += right == [False, True]
    click.echo(
        f"of {samples} questions {plan} alone answers {len(better)} right, dense alone {worse}"
    )
    if not better:
        raise click.ClickException("there is none to show. Ask more: --samples")
    with tempfile.TemporaryDirectory() as folder:
        file = io.BytesIO()
        better[0].image.save(file, "png")
        page = Path(folder) / "explain.html"
        made = explain(pruned, [file.getvalue()], better[0].question, dense=dense)
        page.write_text(made.html, "utf-8")
        photograph(page, PICTURE)
    click.echo(f"{PICTURE}: {better[0].question} {better[0].answer}")


if __name__ == "__main__":
    main()
