"""The picture of ``visistage explain`` in the README.

    python -m visistage.bench.explain_picture

Builds the demo with a plan that prunes at the entry, too, and unpruned, asks both about one of the
package's images, and photographs the page with Chromium. Times are left out: on the demo they are
those of the machine's other work (docs/explain.md), and measured ones are in the tables.
"""

from __future__ import annotations

import re
import shutil
import subprocess
import tempfile
from pathlib import Path

import click
from PIL import Image

from ..compile.build import make_bundle
from ..demo.gallery import bundled
from ..tools.explain.explanation import explain

PICTURE = Path(__file__).resolve().parents[1] / "docs" / "explain.png"
BROWSERS = ("chromium", "chromium-browser", "google-chrome")
WIDTH, HEIGHT = 1100, 1060
TIMES = r'<div><dt>to the first token</dt>.*?</div>|<p class="alarm">Slower.*?</p>'


def photograph(page: Path, picture: Path) -> None:
    """Write a screenshot of ``page``, in 64 colours."""
    browser = next(filter(None, map(shutil.which, BROWSERS)), None)
    if browser is None:
        raise click.ClickException("no Chromium is installed. Type: apt-get install chromium")
    shot = page.with_suffix(".png")
    # fmt: off
    command = [
        browser, "--headless", "--no-sandbox", "--disable-gpu", "--hide-scrollbars",
        f"--window-size={WIDTH},{HEIGHT}", "--virtual-time-budget=3000",
        f"--screenshot={shot}", page.as_uri(),
    ]
    # fmt: on
    subprocess.run(command, check=True, capture_output=True, timeout=120)
    image = Image.open(shot).convert("RGB")
    image.quantize(64, dither=Image.Dither.NONE).save(picture, optimize=True)


@click.command()
@click.option("--plan", default="visipruner:entry=scope-32", show_default=True)
@click.option("--out", default="engines", show_default=True, help="Folder of the bundles.")
def main(plan: str, out: str) -> None:
    """Write docs/explain.png, of the last bundled image and the first question about it."""
    pruned = make_bundle("demo", plan=plan, out=out).path
    dense = make_bundle("demo", plan="dense", out=out).path
    shown = bundled()[-1]
    question, answer = shown.questions[0]
    made = explain(pruned, [str(shown.path)], question, dense=dense, threads=1)
    with tempfile.TemporaryDirectory() as folder:
        page = Path(folder) / "explain.html"
        page.write_text(re.sub(TIMES, "", made.html), "utf-8")
        photograph(page, PICTURE)
    click.echo(f"{PICTURE}: {question} {answer}")


if __name__ == "__main__":
    main()
