"""Commands on the pages of docs/, and what each one needs.

Those of ``RUN`` are run by tests/test_packaging.py, from the wheel, without torch. The others need
what docs/index.md says of their kind.
"""

import re
from pathlib import Path

DOCS = Path(__file__).parents[2] / "docs"
STARTS = r"(?:make|visistage|python3?|pip|sudo|rsync|cd|cp|docker|[A-Z_]+=\S+|\"\$VENV\"\S*) "
RUN = "runs without torch"
KINDS = {  # the first that fits
    "`pip`": r"^pip |-m venv|/pip install",
    "`$VENV`, `sudo`, `rsync`": r"\bVENV\b|^sudo |^rsync ",
    "`visistage.bench`": r"^python -m visistage\.bench",
    "`make`": r"^make ",
    "`serve`, `docker`": r"visistage serve|docker",
    "`BUNDLE`": r"\bBUNDLE\b",
    RUN: r"^cp |^visistage (plan|estimate|export-triton|inspect demo|list|infer)\b"
    r"|^visistage (explain photo\.png .*|build demo|verify engines/demo)$",
    "`llava-7b`, `qwen3-vl-8b`, `./FOLDER`": r"llava-7b|qwen3-vl|\./(InternVL|Qwen)",
    "`build`, `calibrate`, `compare`, `profile`, `verify`, `explain` of the demo": r"^visistage ",
}


def commands(page: Path) -> list[str]:
    """Return the commands of the indented blocks of a page, without their comments."""
    lines = re.findall(rf"^ {{4}}({STARTS}.*)$", page.read_text("utf-8"), re.M)
    return [re.sub(r"\s+# .*", "", line).strip() for line in lines]


def kind_of(command: str) -> str:
    """Return the kind of a command, by which the pages say what it needs.

    Raises:
        LookupError: it is of none.
    """
    for kind, pattern in KINDS.items():
        if re.search(pattern, command):
            return kind
    raise LookupError(command)


def runnable() -> list[str]:
    """Return the commands that run without torch, the tutorial's first."""
    pages = sorted(DOCS.glob("*.md"), key=lambda page: page.stem != "tutorial")
    found = [command for page in pages for command in commands(page)]
    return [command for command in dict.fromkeys(found) if kind_of(command) == RUN]
