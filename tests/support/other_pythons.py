"""The package under other versions of Python: installed with its extra cpu, asked about the demo.

    python tests/support/other_pythons.py python3.10 python3.12 python3.13

Downloads what the wheel requires. Prints a line for each: versions, and how many of the questions
that come with the package were answered right.
"""

import json
import subprocess
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).parents[2]
PICTURES = ROOT / "demo" / "pictures"
ASK = """
import json, sys
from pathlib import Path
from visistage import runtime
pictures, right, total = Path(sys.argv[1]), 0, 0
with runtime.load("engines/demo") as session:
    for name, questions in json.loads((pictures / "pictures.json").read_text()).items():
        image = session.open(pictures / name)
        for asked in questions:
            total += 1
            right += session.infer(image, asked["question"]).text.strip() == asked["answer"]
print(f"{right} of {total}")
"""


def run(*words: object, cwd: Path) -> str:
    """Return the stdout of a command, which must succeed."""
    return subprocess.run([*map(str, words)], cwd=cwd, check=True, stdout=-1, text=True).stdout


def answers(interpreter: str, wheel: Path, folder: Path) -> str:
    """Install the wheel in an environment of ``interpreter``, build the demo, and ask it."""
    run(interpreter, "-m", "venv", "environment", cwd=folder)
    python = folder / "environment" / "bin" / "python"
    run(python, "-m", "pip", "install", "-q", f"{wheel}[cpu]", cwd=folder)
    for command in (("build", "demo"), ("inspect",), ("doctor",)):
        run(python, "-m", "visistage", *command, "-q", cwd=folder)
    run(python, "-m", "visistage", "explain", PICTURES / "scene-3.png", "Why?", "-q", cwd=folder)
    facts = json.loads(run(python, "-m", "visistage", "doctor", "--json", cwd=folder))
    right = run(python, "-c", ASK, PICTURES, cwd=folder).strip()
    return f"Python {facts['python']}, onnxruntime {facts['onnxruntime']}: {right} answers right"


if __name__ == "__main__":
    with tempfile.TemporaryDirectory() as made:
        folder = Path(made)
        command = ("-m", "build", "--no-isolation", "--outdir", folder, ROOT)
        run(sys.executable, *command, cwd=folder)
        (wheel,) = folder.glob("*.whl")
        for number, interpreter in enumerate(sys.argv[1:]):
            place = folder / str(number)
            place.mkdir()
            print(answers(interpreter, wheel, place), flush=True)
