"""Outputs that must not change while code is rearranged: bundles, facts, pages, words, errors.

    frozen.py save OUT.json          run many commands, note what comes out
    frozen.py compare OUT.json       run them again, tell every difference; exit code 1 if any

The ``visistage`` that Python finds is run in a temporary folder, on one thread: sums then do not
depend on the number of cores. They do depend on the CPU and on libraries: save and compare on one
machine. Values that differ between two runs of the same code are emptied, their keys stay:
``FACTS`` and ``FILES`` say which, as regular expressions of their paths.
"""

import argparse
import fnmatch
import hashlib
import json
import os
import re
import shlex
import shutil
import subprocess
import sys
import tempfile
import time
from collections import defaultdict
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import visistage

ENGINE = r"(nbytes|sha256|seconds|peak_\w+)"
FACTS = {  # by command; of those that are not here every value is kept
    "engines": r"(.*/)?seconds|peak_memory_bytes",
    "build": rf"(steps/\d+/|engines/\d+/)?{ENGINE}",
    "infer": r"timings/\w+_ms",
    "evaluate": r"\w+_ms",
    "explain": r"(answer|dense)/timing/\w+_ms",
    "verify": r"rungs/\d+/seconds|versions|machine",
    "doctor": r"(?!targets).*",
    "inspect": rf"versions|engines/(version|built_on|memory_bytes|engines/\d+/{ENGINE})",
    "profile": r"machine|peaks|beaten|speed_up|power|dominant|runs/\w+/(memory|operators|energy)"
    r"|runs/.*/(\w+_ms|ms|median|p90|p99|least|share|bound)",
}
FILES = {  # by name, the first that fits; None: nothing but the name. Other files are hashed
    "*.html": None,  # a page
    "*.log": None,
    "*.engine": None,  # not always the same bytes: docs/tensorrt.md
    "engines/engines.json": rf"version|built_on|engines/\d+/{ENGINE}",
    "engines/.build.json": r"key|origin|steps/[^/]+/(seconds|files/.*)",
    "engines/*.json": ENGINE,
    "*.build.json": r"key|origin|steps/[^/]+/(seconds|outcome)",  # the key holds modification times
    "*.stamp.json": None,
    "*manifest.json": r"versions",
    "*calibration.json": r"versions",
}
MEASURED = r".*#\s%, .*|.* beat it, .*|of it .*"  # lines of pages that times decide
ENVIRONMENT = {"VISISTAGE_THREADS": "1", "OMP_NUM_THREADS": "1", "COLUMNS": "80", "PYTHONUTF8": "1"}

# Lines: what to keep, and the command. "facts" is what --json says; ":" names pages and folders to
# keep, too. {} holds choices, each a command of its own; ";" is a comma, "@" the demo's bundles.
FAST = """
help {,engines,build,infer,plan,inspect,explain,evaluate,calibrate,verify,profile,estimate,doctor}
facts plan {dense,visipruner,visipruner-code,visipruner-paper,visipruner-adaptive,fastv,pyramiddrop}
facts plan {visipruner,pyramiddrop,visipruner-adaptive} --model {demo,llava-13b} --accounting graphs
facts plan {visipruner-paper --trigger 14 --kept 10.3 --exit 23,visipruner:t=14;keep=32,exit-only}
words {plan,plan visipruner,plan fastv,plan visipruner-code,plan visipruner --yaml,doctor}
facts estimate llava-7b --device {orin-agx-64,orin-nano-8,h100} --precision {fp16,w4}
words estimate llava-7b --device thor
facts:@visipruner-fp32-cpu engines --model demo
facts {inspect @visipruner-fp32-cpu,estimate @visipruner-fp32-cpu --device h200,doctor}
words inspect @visipruner-fp32-cpu
facts infer {0,1,2}.png "What is the shape of the red object?" --bundle @visipruner-fp32-cpu
facts infer 0.png 1.png "Count the shapes." --bundle @visipruner-fp32-cpu --temperature 1 --seed 7
facts infer Hello! --bundle @visipruner-fp32-cpu --max-tokens 9 --stop e
words infer 1.png "What do you see?" --bundle @visipruner-fp32-cpu
facts evaluate @visipruner-fp32-cpu --samples 60
facts:explain.html explain @visipruner-fp32-cpu 2.png "How many objects?"
errors {frob,engines,inspect missing,infer --max-tokens 0 Hi,infer Hi --bundle missing}
errors plan {nonsense,visipruner:t=99,visipruner:depth=3,dense --frob}
errors engines --model demo {--target moon,--plan no.yaml,--precision int3,--context 64,--sm 86}
errors engines --model {nowhere/none --offline,demo --precision int8 --calib missing}
errors {estimate demo --device moon,calibrate demo --lose 2% --cost 50%,build @visipruner-fp32-cpu}
errors infer {no.png Hi,0.png Hi --backend moon} --bundle @visipruner-fp32-cpu
errors evaluate @visipruner-fp32-cpu --data missing.jsonl
"""
SLOW = """
facts:@dense-fp32-cpu engines --model demo --plan dense
facts:@visipruner-adaptive-fp32-cpu engines --model demo --plan visipruner-adaptive
facts:@visipruner-fp32-cpu-portable engines --model demo --target cpu-portable
facts:@visipruner-fp16-cuda engines --model demo --target cuda
facts engines --model demo --target rtx --portable
facts:@visipruner-fp16-rtx build @visipruner-fp16-rtx --sm 86
facts:parts engines --model demo --target orin-jp72 --precision w4 --build-memory 516MiB --out parts
facts:calibrations:calibrations/demo/calibration.html calibrate demo --samples 8 --plan visipruner
facts:@visipruner-int8-cpu engines --model demo --precision int8
facts:mixed engines --model demo --precision int8:vision=float;stage2=w4;cache=int8 --out mixed
facts:new:new/demo/calibration.html calibrate demo --lose 2% --samples 24 --candidates 2 --out new
facts inspect {@dense-fp32-cpu,@visipruner-adaptive-fp32-cpu,@visipruner-int8-cpu,mixed,parts}
facts inspect @visipruner-{fp16-cuda,fp16-rtx,fp32-cpu-portable}
facts evaluate --samples 60 {@dense-fp32-cpu,@visipruner-adaptive-fp32-cpu,@visipruner-int8-cpu}
facts evaluate --samples 60 mixed
facts infer 0.png "Count the shapes." --backend openvino --bundle @visipruner-fp32-cpu-portable
facts infer 0.png "Count the shapes." --backend onnxruntime --bundle @visipruner-fp16-{cuda,rtx}
facts:@visipruner-fp32-cpu/verify.md verify @visipruner-fp32-cpu --samples 2
facts verify @visipruner-{fp16-rtx,int8-cpu} --samples 2
facts:other.html explain @visipruner-adaptive-fp32-cpu 2.png "How many objects?" --out other.html
facts:profile.html profile @visipruner-fp32-cpu --repetitions 2 --warm-up 1 --tokens 4
"""


def observe(lines: str, folder: Path, found: dict[str, dict[str, Any]]) -> None:
    """Run the commands of a table in a folder, and note what comes out of them."""
    for line in lines.strip().replace("@", "engines/demo/").splitlines():
        what, text = line.split(" ", 1)
        kind, *paths = what.split(":")
        for command in spread(text):
            option = {"facts": " --json", "help": " --help"}.get(kind, "")
            code, said, complaint = run(command + option, folder)
            if kind == "facts":
                rule = FACTS.get(command.split()[0], "")
                value = emptied(json.loads(said), rule) if code == 0 else [code, said, complaint]
            else:
                exact = kind != "words" or command.startswith(("plan", "estimate"))
                value = [code, *(plain(text, exact=exact) for text in (said, complaint))]
            found[kind][command] = value
            if kind == "help":
                found["flags"][command] = sorted(set(re.findall(r"--[a-z][\w-]*", said)))
            for path in map(folder.joinpath, paths):
                name = str(path.relative_to(folder))
                if path.is_file():
                    found["pages"][name] = tags(path.read_text(encoding="utf-8"))
                else:
                    files = (file for file in sorted(path.rglob("*")) if file.is_file())
                    inside = ((file, str(file.relative_to(path))) for file in files)
                    found["files"][name] = {inner: digest(file, inner) for file, inner in inside}


def processor() -> list[str]:
    """Name this machine's CPU and what it can do."""
    info = Path("/proc/cpuinfo")
    text = info.read_text(encoding="utf-8") if info.is_file() else ""
    return sorted(set(re.findall(r"^(?:model name|flags)\s*: (.*)", text, re.MULTILINE)))


def spread(text: str) -> list[str]:
    """Write a command out for every choice in it."""
    before, brace, rest = text.partition("{")
    choices, _, after = rest.partition("}")
    if not brace:
        return [text.replace(";", ",")]
    return [one for choice in choices.split(",") for one in spread(before + choice + after)]


def run(command: str, folder: Path) -> tuple[int, str, str]:
    """Run a command; its exit code, stdout and stderr, without the folder's place."""
    started, line = time.time(), [sys.executable, "-m", "visistage", *shlex.split(command)]
    environment = {k: v for k, v in os.environ.items() if k != "VISISTAGE_BUNDLE"} | ENVIRONMENT
    done = subprocess.run(line, cwd=folder, env=environment, capture_output=True, text=True)
    print(f"{time.time() - started:5.1f} s, exit {done.returncode}: {command}", file=sys.stderr)
    out, err = (text.replace(f"{folder}/", "") for text in (done.stdout, done.stderr))
    return done.returncode, out, err


def emptied(value: Any, rule: str, path: str = "") -> Any:
    """Empty what lies at a path that fits the rule; keys stay, there in alphabetical order."""
    gone = path and re.fullmatch(rule, path)
    if isinstance(value, dict):
        inside = ((k, value[k]) for k in (sorted(value) if gone else value))
        return {k: emptied(v, ".*" if gone else rule, f"{path}/{k}".strip("/")) for k, v in inside}
    if isinstance(value, list) and not gone:
        return [emptied(v, rule, f"{path}/{i}".strip("/")) for i, v in enumerate(value)]
    return None if gone else value


def digest(file: Path, name: str) -> Any:
    """Hash a file; one in which values are emptied is kept as it is otherwise."""
    for pattern, rule in FILES.items():
        if fnmatch.fnmatch(name, pattern):
            return rule and emptied(json.loads(file.read_text(encoding="utf-8")), rule)
    return hashlib.sha256(file.read_bytes()).hexdigest()


def plain(text: str, *, exact: bool) -> list[str]:
    """Split a text into lines without versions, widths of columns and, unless exact, numbers."""
    text = re.sub(r"\d+\.\d+\.\d+\S*", "VERSION", text)
    text = text if exact else re.sub(r"\d[\d.,]*( (ms|s|min)\b)?", "#", text)
    return [re.sub(r"([ ━─])\1*", r"\1", line).strip() for line in text.splitlines()]


def tags(page: str) -> dict[str, bool]:
    """List a page's tags and words without numbers, each once: times decide how often and where."""
    parts = re.findall(r"<[^>]*>|[^<]+" if page.startswith("<") else r".+", page)
    lines = {" ".join(plain(part, exact=False)) for part in parts}
    return {line: True for line in sorted(lines) if not re.fullmatch(MEASURED, line)}


def differences(old: Any, new: Any, path: str = "") -> Iterator[str]:
    """Tell where two values differ, the order of keys included."""
    if isinstance(old, dict) and isinstance(new, dict):
        for key in {**old, **new}:
            yield from differences(old.get(key, "-"), new.get(key, "-"), f"{path}/{key}")
        if set(old) == set(new) and list(old) != list(new):
            yield f"{path}: keys in another order: {list(new)}"
    elif isinstance(old, list) and isinstance(new, list) and len(old) == len(new):
        for i, (one, other) in enumerate(zip(old, new, strict=True)):
            yield from differences(one, other, f"{path}/{i}")
    elif old != new or type(old) is not type(new):
        yield f"{path}: was {str(old)[:400]}, is {str(new)[:400]}"


def main() -> int:
    """Save what the commands give, or compare it with what was saved."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("action", choices=["save", "compare"])
    parser.add_argument("file", type=Path)
    parser.add_argument("--only", choices=["fast"], help="leave out what takes minutes")
    parser.add_argument("--no-pages", action="store_true", help="let pages change")
    parser.add_argument("--no-words", action="store_true", help="let words, help and errors change")
    given = parser.parse_args()
    new: dict[str, dict[str, Any]] = defaultdict(dict)
    new["machine"]["cpu"] = processor()
    package = Path(visistage.__file__).parent
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name).resolve()
        for i, picture in enumerate(sorted(package.glob("demo/*/scene-*.png"))):
            shutil.copy(picture, folder / f"{i}.png")
        for table in (FAST,) if given.only else (FAST, SLOW):
            observe(table, folder, new)
    if given.action == "save":
        given.file.write_text(json.dumps(new, indent=1, ensure_ascii=False), encoding="utf-8")
        return 0
    old = json.loads(given.file.read_text(encoding="utf-8"))
    skipped = ["pages"] * given.no_pages + ["words", "help", "errors"] * given.no_words
    told: list[str] = []
    for kind in (kind for kind in new if kind not in skipped):
        known = old.get(kind, {})
        names = new[kind] if given.only else known
        told += differences({k: known[k] for k in names if k in known}, new[kind], kind)
    print(*told, f"{len(told)} differences", sep="\n")
    return 1 if told else 0


if __name__ == "__main__":
    sys.exit(main())
