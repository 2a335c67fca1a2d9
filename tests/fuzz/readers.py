# ruff: noqa: E501  # the tables of hostile texts
"""Readers of what strangers give, each as a function: (random numbers, folder) -> (name, act).

``act()`` does what a user would have done with the hostile input. ``READERS`` lists them. Hashes of
a bundle's manifest are made to fit what was changed: who sends a bundle can compute them, too.
"""

from __future__ import annotations

import functools
import io
import json
import random
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image
from safetensors.numpy import load_file, save_file
from visistage.calib.samples import read_samples
from visistage.cli.main import main as command_line
from visistage.compile.build import make_bundle
from visistage.compile.checkpoint.checkpoint import open_checkpoint
from visistage.compile.export.texts import text_facts
from visistage.compile.planfile import load_plan, plan_to_yaml, resolve_plan
from visistage.compile.quantize.calibration_file import Calibration
from visistage.graphs.bundle import MANIFEST, sha256
from visistage.graphs.errors import ImageError
from visistage.graphs.safetensors_header import read_safetensors
from visistage.runtime import image_file, load
from visistage.runtime.image.image import load_image, preprocess
from visistage.runtime.text.template import ChatTemplate
from visistage.tests.support.calibrated import calibrate
from visistage.tests.support.mutations import HOSTILE_NAMES, changes, json_mutations, mutated_bytes
from visistage.tests.support.toy import make_checkpoint

Act = Callable[[], Any]
Reader = Callable[[random.Random, Path], tuple[str, Act]]

PLANS = (
    "dense", "visipruner", "visipruner:t=1,keep=4,e=2", "fastv:keep=50%", "pyramiddrop", "exit-only",
    "visipruner-code", "visipruner-paper", "visipruner-adaptive:cosine=0.94", "plan.yaml",
)  # fmt: skip
TEMPLATES = (
    "{% for m in messages %}{{ m.role }}: {% for c in m.content %}{% if c.type == 'image' %}<image>"
    "{% else %}{{ c.text }}{% endif %}{% endfor %}\n{% endfor %}{% if add_generation_prompt %}a:{% endif %}",
    "{%- set ns = namespace(n=0) %}{% for m in messages %}{% set ns.n = ns.n + 1 %}{{ m.role|upper }}"
    "{{ m.content if m.content is string else m.content|map(attribute='text')|join(' ') }}{% endfor %}",
)
PIECES = (
    "{% for i in range(999999999) %}x{% endfor %}", "{% for a in messages %}{% for b in range(10**6) %}"
    "{% for c in range(10**6) %}{% endfor %}{% endfor %}{% endfor %}", "{{ 'x' * 10**9 }}",
    "{{ ('x' * 10**5)|replace('x', 'x' * 10**5) }}", "{{ 9**9**9 }}", "{{ [[0] * 10**4] * 10**4 }}",
    "{% set a = 'x' * 9999 %}{% set a = a ~ a %}{% set a = a ~ a %}{{ a }}", "{{ '%999999999d' % 1 }}",
    "{{ '{:999999999}'.format(1) }}", "{{ ''.__class__.__mro__ }}", "{{ self.__init__.__globals__ }}",
    "{{ cycler.__init__.__globals__.os }}", "{{ messages|map('attr', '__class__')|list }}",
    "{{ lipsum(n=10**7) }}", "{% macro f(n) %}{{ f(n) }}{{ f(n) }}{% endmacro %}{{ f(0) }}",
    "{{ messages|tojson|batch(10**9, ' ')|list }}", "{{ 'a'|center(10**9) }}", "{% include '/etc/passwd' %}",
    "{{ range(10**7)|sort|sum }}", "{{ raise_exception('\x1b]0;x\x07') }}", "{{ messages|pprint }}",
    "{{ ('a' * 10**6)|wordwrap(1) }}", "{{ 'x'.join(['y' * 10**5] * 10**5) }}", "{{ 'x'|indent(10**9) }}",
    "{{ ('<' * 10**6)|escape|urlize }}", "{{ 'x'.rjust(10**10) }}", "{{ ('a,' * 10**6).split(',')|length }}",
    "{{ strftime_now('%Y' * 10**6) }}", "{{ (1,) * 10**10 }}", "{% call messages() %}{% endcall %}",
    "{{ 'x'.zfill(10**9) }}", "{{ 'x\\t'.expandtabs(10**9) }}", "{{ 'ab'.translate({97: 'x' * 10**8}) }}",
)  # fmt: skip


@functools.cache
def seeds() -> dict[str, Path]:
    """Make a checkpoint, a bundle and a calibration, once in this process."""
    folder = Path("seeds").absolute()
    checkpoint = make_checkpoint(folder / "model", layers=3)
    bundle = make_bundle(str(checkpoint), plan="visipruner:t=1,keep=4,e=2", out=folder / "out").path
    plan = resolve_plan("visipruner:t=1,keep=4,e=2", 3, 16)
    (folder / "plan.yaml").write_text(plan_to_yaml(plan))
    calibrate(checkpoint, "dense", folder / "calibration")
    image = Image.fromarray(np.random.default_rng(0).integers(0, 256, (40, 52, 3), dtype=np.uint8))
    image.save(folder / "image.png")
    with load(bundle, threads=1) as session:
        session.save_image(image, folder / "saved.safetensors")
    return {
        "checkpoint": checkpoint,
        "bundle": bundle,
        "calibration": folder / "calibration",
        "plan": folder / "plan.yaml",
        "image": folder / "image.png",
        "saved": folder / "saved.safetensors",
    }


def one_of(mutations, rng: random.Random):
    """Return a mutation: the order is random, so the first is any."""
    return next(mutations)


def _fresh(source: Path, folder: Path) -> Path:
    copy = folder / "case"
    shutil.rmtree(copy, ignore_errors=True)
    return Path(shutil.copytree(source, copy))


def _changed_json(rng: random.Random, folder: Path, files: list[Path]) -> tuple[str, Path]:
    file = rng.choice(sorted(files))
    name, content = one_of(json_mutations(json.loads(file.read_text()), rng), rng)
    file.write_bytes(content)
    return f"{file.name}: {name}", file


def _rehash(bundle: Path, file: Path) -> None:
    """Note a changed file's size and hash in the manifest."""
    data = json.loads((bundle / MANIFEST).read_text())
    if file.name in data["files"]:
        size, digest = file.stat().st_size, sha256(file)
        noted = data["files"][file.name]
        for key in noted:
            noted[key] = digest if noted[key] and isinstance(noted[key], str) else size
        (bundle / MANIFEST).write_text(json.dumps(data))


def _ask(bundle: Path) -> None:
    with load(bundle, threads=1) as session:
        session.infer(seeds()["image"], "What?", max_tokens=2)


def _refused(bundle: Path, file: str) -> Act:
    """Return what asks a bundle that must not answer, if its manifest lists ``file``."""
    listed = file in json.loads((seeds()["bundle"] / MANIFEST).read_text())["files"]

    def act() -> None:
        _ask(bundle)
        assert not listed, "an answer from a file that is not the bundle's"

    return act


def bundle_json(rng: random.Random, folder: Path) -> tuple[str, Act]:
    """A bundle with one changed field of one JSON."""
    bundle = _fresh(seeds()["bundle"], folder)
    files = list(bundle.glob("*.json"))
    name, file = _changed_json(rng, bundle, files if rng.random() < 0.5 else [bundle / MANIFEST])
    if file.name != MANIFEST:
        _rehash(bundle, file)
    return name, lambda: _ask(bundle)


def bundle_bytes(rng: random.Random, folder: Path) -> tuple[str, Act]:
    """A bundle with changed bytes in a file that is not hashed as it is now."""
    bundle = _fresh(seeds()["bundle"], folder)
    file = rng.choice(sorted(f for f in bundle.iterdir() if f.is_file() and f.stat().st_size))
    name, content = mutated_bytes(file.read_bytes(), rng)
    file.write_bytes(content)
    return f"{file.name}: {name}", _refused(bundle, file.name)


def bundle_names(rng: random.Random, folder: Path) -> tuple[str, Act]:
    """A bundle that names files outside of it, or links there."""
    bundle = _fresh(seeds()["bundle"], folder)
    file = rng.choice(sorted(f for f in bundle.iterdir() if f.is_file()))
    if rng.random() < 0.3:
        outside = folder / "outside.bin"
        shutil.move(file, outside)
        file.symlink_to(outside)
        return f"{file.name}: a link", _refused(bundle, file.name)
    kind, hostile = rng.choice(sorted(HOSTILE_NAMES.items()))
    text = json.dumps(json.loads((bundle / MANIFEST).read_text()))
    (bundle / MANIFEST).write_text(text.replace(json.dumps(file.name), json.dumps(hostile)))
    return f"{file.name}: {kind}", _refused(bundle, file.name)


def image(rng: random.Random, folder: Path) -> tuple[str, Act]:
    """An image with changed bytes, or of an odd mode, shape or format."""
    mode = rng.choice(("RGB", "L", "1", "P", "CMYK", "RGBA", "LA", "I;16", "I", "F", "YCbCr"))
    size = rng.choice(((1, 1), (1, 300), (300, 1), (3, 3), (52, 40), (200, 3), (64, 64)))
    kind = rng.choice(
        ("PNG", "JPEG", "GIF", "WEBP", "BMP", "TIFF", "PPM", "ICO", "JPEG2000", "TGA")
    )
    made = Image.fromarray(
        np.random.default_rng(rng.randrange(9)).integers(0, 256, (*size, 3), np.uint8)
    )
    stream = io.BytesIO()
    try:
        made.convert(mode).save(stream, kind)
    except (OSError, ValueError, KeyError):
        mode, kind = "RGB", "PNG"
        stream = io.BytesIO()
        made.save(stream, kind)
    content, names = stream.getvalue(), []
    for _ in range(rng.randrange(4)):
        name, content = (
            mutated_bytes(content[:64], rng) if rng.random() < 0.3 else mutated_bytes(content, rng)
        )
        names.append(name)

    def act() -> None:
        preprocessing = _session().preprocessing
        preprocess(load_image(content), preprocessing)

    return f"{kind} {mode} {size}: {', '.join(names) or 'as it is'}", act


@functools.cache
def _session():
    return load(seeds()["bundle"], threads=1)


def template(rng: random.Random, folder: Path) -> tuple[str, Act]:
    """A chat template with hostile pieces, or cut and spliced."""
    text = rng.choice((*TEMPLATES, ""))
    for _ in range(rng.randrange(1, 3)):
        at = rng.randrange(len(text) + 1)
        piece = rng.choice(PIECES)
        if rng.random() < 0.3:  # other pieces of the same kinds
            piece = piece.replace("10**", f"{rng.choice((3, 20, 10))}**").replace("999", "9999")
        cut = rng.randrange(at, len(text) + 1) if rng.random() < 0.3 else at
        text = text[:at] + piece + text[cut:]
    blocks = [{"type": "image"}, {"type": "text", "text": "What is it?"}]
    messages = [{"role": "user", "content": rng.choice((blocks, "What?"))}] * rng.choice((1, 1, 30))
    return text, lambda: ChatTemplate(text).render(messages)


def checkpoint_json(rng: random.Random, folder: Path) -> tuple[str, Act]:
    """A checkpoint with one changed field of one JSON."""
    checkpoint = _fresh(seeds()["checkpoint"], folder)
    name, _ = _changed_json(rng, checkpoint, list(checkpoint.glob("*.json")))
    return name, lambda: text_facts(open_checkpoint(str(checkpoint)))


def safetensors(rng: random.Random, folder: Path) -> tuple[str, Act]:
    """A checkpoint whose weights have a changed header or changed bytes."""
    checkpoint = _fresh(seeds()["checkpoint"], folder)
    file = checkpoint / "model.safetensors"
    name, content = _changed_header(rng, file.read_bytes())
    file.write_bytes(content)

    def act() -> None:
        opened = open_checkpoint(str(checkpoint))
        for tensor in opened.tensors:
            opened.load(tensor)

    return name, act


def _changed_header(rng: random.Random, content: bytes) -> tuple[str, bytes]:
    length = int.from_bytes(content[:8], "little")
    header, rest = content[8 : 8 + length], content[8 + length :]
    if rng.random() < 0.6:
        name, header = one_of(json_mutations(json.loads(header), rng), rng)
        return name, len(header).to_bytes(8, "little") + header + rest
    name, start = mutated_bytes(content[: 8 + length], rng)
    return name, start + rest


def saved_image(rng: random.Random, folder: Path) -> tuple[str, Act]:
    """An image's file with a changed header, or changed bytes of a tensor under a hash that fits."""
    file, seed = folder / "image.safetensors", seeds()["saved"]
    if rng.random() < 0.5:
        name, content = _changed_header(rng, seed.read_bytes())
        file.write_bytes(content)
    else:
        arrays, header = load_file(seed), read_safetensors(seed, ImageError, "")
        name = rng.choice(sorted(arrays))
        raw = arrays[name].reshape(-1).view(np.uint8)
        raw[rng.randrange(len(raw))] ^= 1 << rng.randrange(8)
        told = {key: text for key, text in header.metadata.items() if key != "sha256"}
        told["sha256"] = image_file.digest_of(told, [arrays[one] for one in header.tensors])
        save_file(arrays, file, metadata=told)
    return name, lambda: _session().infer(str(file), "What?", max_tokens=2)


def samples(rng: random.Random, folder: Path) -> tuple[str, Act]:
    """A JSONL file of questions with changed lines."""
    line = {"image": "image.png", "prompt": "What?", "answer": "a", "type": "kind"}
    lines = [json.dumps(line).encode()] * 3
    name, content = one_of(json_mutations(line, rng), rng)
    lines.insert(rng.randrange(4), content)
    text = b"\n".join(lines)
    if rng.random() < 0.2:
        name, text = mutated_bytes(text, rng)
    file = folder / "questions.jsonl"
    file.write_bytes(text)
    shutil.copy(seeds()["image"], folder / "image.png")
    return name, lambda: [load_image(sample.image) for sample in read_samples(file)]


def plan(rng: random.Random, folder: Path) -> tuple[str, Act]:
    """A plan's words, or its YAML, changed."""
    if rng.random() < 0.5:
        text = rng.choice(PLANS)
        at = rng.randrange(len(text) + 1)
        extra = rng.choice(
            (":", ",", "=", "keep=-1", ":keep=1e999", ":t=99999999999999999999", ":x=1", "\0", "/", "..",
             ":keep=NaN", ":e=0.5", ",,", ":keep=50%%", "x" * 50_000, "\x1b[31m", "\u202e", ":t=1,t=1")
        )  # fmt: skip
        text = text[:at] + extra + text[at:]
        return text, lambda: resolve_plan(text, 3, 16)
    name, content = mutated_bytes(seeds()["plan"].read_bytes(), rng)
    if rng.random() < 0.3:
        hostile = (
            "&a [*a, *a]",
            "!!python/object/apply:os.system ['true']",
            "[" * 5000,
            "{a: " * 3000,
        )
        bombs = "a: &a [x,x,x,x,x,x,x,x,x]\n" + "".join(
            f"{chr(98 + i)}: &{chr(98 + i)} [{','.join(['*' + chr(97 + i)] * 9)}]\n"
            for i in range(9)
        )
        name = rng.choice((*hostile, bombs))
        content = name.encode()
    file = folder / "plan.yaml"
    file.write_bytes(content)
    return name, lambda: load_plan(file)


def calibration(rng: random.Random, folder: Path) -> tuple[str, Act]:
    """A calibration with one changed field or byte."""
    made = _fresh(seeds()["calibration"], folder)
    if rng.random() < 0.7:
        name, _ = _changed_json(rng, made, [made / "calibration.json"])
    else:
        file = made / "calibration.safetensors"
        name, content = mutated_bytes(file.read_bytes(), rng)
        file.write_bytes(content)
    return name, lambda: Calibration.load(made)


def question(rng: random.Random, folder: Path) -> tuple[str, Act]:
    """A question with special tokens and odd characters, or options of other types."""
    words = ["What", "\0", "\u202e", "é", "é" * 3000, "\ud800", " ", "?", "\U0001f600", "a\nb"]
    if rng.random() < 0.3:
        words += ["<image>", "</s>", "<s>", "<pad>", "<unk>"]
    text: Any = "".join(rng.choice(words) for _ in range(rng.randrange(6)))
    options: dict[str, Any] = {}
    if rng.random() < 0.5:
        option, old = rng.choice((("max_tokens", 2), ("stop", "x"), ("stop", ["x"])))
        options = {option: rng.choice(list(changes(old).values()))}
        if options.get("max_tokens") in (10**30, 2**31, 2**63 - 1, True):
            options = {}
    elif rng.random() < 0.3:
        text = rng.choice(list(changes("x").values()))
    shown = {key: repr(value)[:60] for key, value in options.items()}

    def act() -> None:
        _session().infer(seeds()["image"], text, **({"max_tokens": 2} | options))

    return f"{text!r:.80} {shown}", act


def command(rng: random.Random, folder: Path) -> tuple[str, Act]:
    """A command with wrong arguments."""
    from click.testing import CliRunner
    from visistage.graphs.errors import VisistageError

    values = [
        str(seeds()["bundle"]),
        str(seeds()["checkpoint"]),
        "demo",
        "dense",
        "1",
        "0",
        "-1",
        "x" * 5000,
    ]
    values += [
        "",
        "nan",
        "\x1b[31m",
        "/dev/null/x",
        "..",
        "\u202e",
        "visipruner:t=1",
        str(seeds()["image"]),
    ]
    name = rng.choice(
        ("plan", "inspect", "infer", "estimate", "doctor", "evaluate", "explain", "verify")
    )
    options = [
        word for param in command_line.commands[name].params for word in getattr(param, "opts", [])
    ]
    options = [word for word in options if word.startswith("--") and word != "--repetitions"]
    words = [name]
    for _ in range(rng.randrange(5)):
        words += [rng.choice(options)] if options and rng.random() < 0.5 else []
        words += [rng.choice(values)]

    def act() -> None:
        done = CliRunner().invoke(command_line, words)
        if done.exception is not None and not isinstance(done.exception, SystemExit):
            raise done.exception
        if done.exit_code not in (0, 1, 2) or len(done.stderr) > 8000:
            raise AssertionError(
                f"exit code {done.exit_code}, {len(done.stderr)} characters on stderr"
            )
        if done.exit_code:
            raise VisistageError(done.stderr[:500])

    return " ".join(word[:40] for word in words), act


READERS: dict[str, Reader] = {
    "bundle-json": bundle_json,
    "bundle-bytes": bundle_bytes,
    "bundle-names": bundle_names,
    "image": image,
    "template": template,
    "checkpoint": checkpoint_json,
    "safetensors": safetensors,
    "saved-image": saved_image,
    "samples": samples,
    "plan": plan,
    "calibration": calibration,
    "question": question,
    "command": command,
}
