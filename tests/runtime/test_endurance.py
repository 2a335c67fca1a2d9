"""A session asked a thousand times holds as much memory as one asked a hundred times."""

import subprocess
import sys
from pathlib import Path

import pytest
from PIL import Image
from visistage.compile.build import make_bundle
from visistage.tests.support.asking import picture
from visistage.tests.support.toy import make_checkpoint

ASK = """
import sys, psutil
from visistage.runtime import load

bundle, *images = sys.argv[1:]
with load(bundle, cache_bytes=1 << 20) as session:  # fewer than 50 images fit
    for number in range(1, 1001):
        question = f"What is in corner {number % 7}?"
        session.infer(images[number % len(images)], question, max_tokens=3)
        if number in (100, 1000):
            print(psutil.Process().memory_info().rss)
"""


@pytest.mark.slow
def test_memory_after_1000_questions_is_within_2_percent_of_that_after_100(tmp_path):
    model = make_checkpoint(tmp_path / "model", layers=3)
    bundle = make_bundle(str(model), plan="visipruner:t=1,keep=4,e=2", out=tmp_path).path
    images = [tmp_path / f"{number}.png" for number in range(50)]
    for number, file in enumerate(images):
        Image.fromarray(picture(number)).save(file)
    command = [sys.executable, "-c", ASK, str(bundle), *map(str, images)]
    done = subprocess.run(command, capture_output=True, text=True, check=True, cwd=Path.home())
    early, late = map(int, done.stdout.split())
    assert late <= 1.02 * early
