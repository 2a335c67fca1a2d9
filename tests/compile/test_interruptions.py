"""Builds through power cuts, kills, damage and full disks: the right bytes, or a fresh start."""

import errno
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from visistage.compile import steps
from visistage.compile.build import make_bundle
from visistage.compile.steps import NOTES, Staging, Steps
from visistage.graphs import files as disk_files
from visistage.graphs.bundle import MANIFEST, Bundle, sha256
from visistage.graphs.errors import BundleError, CapacityError
from visistage.graphs.progress import Progress
from visistage.tests.support import toy
from visistage.tests.support.power_cut import Disk, restore

CONTENTS = {"weights.bin": b"weights" * 1000, "stage0.onnx": b"graph", "prefix.bin": b"rows"}


class Counting(Progress):
    """Notes which steps ran; interrupts before one of them."""

    def __init__(self, interrupt=None):
        self.interrupt, self.ran = interrupt, []

    def start(self, step, total=None):
        if step == self.interrupt:
            raise KeyboardInterrupt
        self.ran.append(step)


def small_build(out, key="key", contents=CONTENTS, progress=None, origin="") -> list[str]:
    """Build a bundle of a few bytes in steps; return which of them ran."""
    progress = progress or Counting()
    with Staging(out / "bundle", key, progress, origin=origin) as work:

        def written(name):
            (work.folder / name).write_bytes(contents[name])
            return [name]

        for name in contents:
            work.step(name, lambda name=name: written(name))

        def manifest():
            hashes = {name: fact.sha256 for name, fact in work.files.items()}
            (work.folder / MANIFEST).write_text(json.dumps(hashes))
            return [MANIFEST]

        work.check_unchanged()
        work.step("manifest", manifest, uses=work.ran)
        work.finish()
    return progress.ran


def holds(bundle, contents=CONTENTS) -> bool:
    return all((bundle / name).read_bytes() == data for name, data in contents.items())


def whole(bundle) -> bool:
    """Return whether a finished bundle is what its manifest says."""
    try:
        hashes = json.loads((bundle / MANIFEST).read_text())
    except ValueError:
        return False
    return all(sha256(bundle / name) == wanted for name, wanted in hashes.items())


def states_of(root, run) -> list:
    with Disk(root) as disk:
        run()
    return disk.states


def different(states):
    return list({repr(state): state for state in states}.values())


OTHER = {name: data[::-1] for name, data in CONTENTS.items()}


@pytest.mark.parametrize("before", [None, OTHER])
def test_a_power_cut_at_any_moment_costs_time_only(tmp_path, before):
    (out := tmp_path / "out").mkdir()
    if before:
        small_build(out, "other key", before)
    states = different(states_of(out, lambda: small_build(out)))
    assert len(states) > 20
    ran = []
    for number, state in enumerate(states):
        left = restore(state, tmp_path / f"cut{number}")
        if (left / "bundle" / MANIFEST).exists():
            assert whole(left / "bundle"), state
        ran.append(small_build(left))
        assert holds(left / "bundle"), state
    assert ran[0] == [*CONTENTS, "manifest"]
    assert ["manifest"] in ran  # what was on the disk is not made again


def test_without_waiting_a_power_cut_would_leave_a_damaged_bundle(tmp_path, monkeypatch):
    monkeypatch.setattr(steps, "sync", lambda path: None)
    (out := tmp_path / "out").mkdir()
    states = states_of(out, lambda: small_build(out))
    left = [restore(state, tmp_path / f"cut{n}") / "bundle" for n, state in enumerate(states)]
    assert not all(whole(bundle) for bundle in left if (bundle / MANIFEST).exists())


def test_a_real_build_is_on_the_disk_before_it_has_its_name(tmp_path):
    model = toy.make_checkpoint(tmp_path / "toy", layers=1)
    (out := tmp_path / "out").mkdir()
    states = states_of(out, lambda: make_bundle(str(model), plan="dense", out=out))
    finished = [s["toy"]["dense-fp32-cpu"] for s in states if "dense-fp32-cpu" in s.get("toy", ())]
    assert finished
    for number, state in enumerate(different(finished)):
        Bundle.open(restore(state, tmp_path / f"cut{number}")).check(rehash=True)


NOTE = {"seconds": 1.0, "outcome": "", "files": {"weights.bin": {"nbytes": 7000, "sha256": "0"}}}


@pytest.mark.parametrize(
    "spoil",
    [
        lambda notes: {**notes, "steps": {"weights.bin": {}}},
        lambda notes: {**notes, "steps": {"weights.bin": []}},
        lambda notes: {**notes, "steps": {"weights.bin": {**NOTE, "files": {"weights.bin": 3}}}},
        lambda notes: {**notes, "steps": {"weights.bin": {**NOTE, "seconds": "soon"}}},
        lambda notes: {**notes, "steps": []},
        lambda notes: {**notes, "key": 3},
        lambda notes: {"key": notes["key"]},
        lambda notes: [],
        lambda notes: None,
        lambda notes: "[" * 100_000,
        lambda notes: json.dumps(notes)[:-9],
        lambda notes: json.dumps(notes).replace("1", "1" * 5000),
        lambda notes: b"\xff\x00",
        lambda notes: "",
        *(
            lambda notes, name=name: {
                **notes,
                "steps": {"weights.bin": {**NOTE, "files": {name: {"nbytes": 4, "sha256": "x"}}}},
            }
            for name in ("../precious", "/etc/hostname", "..", ".", "", "a\0b", "x" * 5000)
        ),
    ],
)
def test_damaged_notes_are_a_fresh_start(tmp_path, spoil):
    (tmp_path / "precious").write_bytes(b"mine")
    with pytest.raises(KeyboardInterrupt):
        small_build(tmp_path, progress=Counting("manifest"))
    file = tmp_path / "bundle.partial" / NOTES
    spoilt = spoil(json.loads(file.read_text()))
    if not isinstance(spoilt, (str, bytes)):
        spoilt = json.dumps(spoilt)
    file.write_bytes(spoilt if isinstance(spoilt, bytes) else spoilt.encode())
    assert "weights.bin" in small_build(tmp_path)
    assert holds(tmp_path / "bundle")
    assert (tmp_path / "precious").read_bytes() == b"mine"
    (tmp_path / "bundle" / NOTES).write_bytes(b"{")
    assert small_build(tmp_path) == [*CONTENTS, "manifest"]


@pytest.mark.parametrize("name", CONTENTS)
@pytest.mark.parametrize("damage", ["flip", "zero", "cut", "remove", "link", "folder"])
def test_a_step_whose_file_is_not_what_it_wrote_runs_again(tmp_path, name, damage):
    with pytest.raises(KeyboardInterrupt):
        small_build(tmp_path, progress=Counting("manifest"))
    file = tmp_path / "bundle.partial" / name
    data = file.read_bytes()
    file.unlink()
    if damage == "folder":
        file.mkdir()
        (file / "x").touch()
    elif damage == "link":
        (tmp_path / "elsewhere").write_bytes(data)
        file.symlink_to(tmp_path / "elsewhere")
    elif damage != "remove":
        changed = {"flip": bytes([data[0] ^ 1]) + data[1:], "zero": bytes(len(data))}
        file.write_bytes(changed.get(damage, data[:-1]))
    assert small_build(tmp_path) == [name, "manifest"]
    assert holds(tmp_path / "bundle")
    assert not (tmp_path / "bundle" / name).is_symlink()
    assert damage != "link" or (tmp_path / "elsewhere").read_bytes() == data


def test_what_used_a_step_that_ran_again_runs_again(tmp_path):
    def build(interrupt=None):
        progress = Counting(interrupt)
        with Staging(tmp_path / "bundle", "key", progress) as work:
            for name, uses in (("a", ()), ("b", {"a"}), ("c", ()), ("d", {"b"})):
                work.step(name, lambda name=name: [(work.folder / name).write_text(name), name][1:],
                          uses=uses)  # fmt: skip
            progress.start("end")
        return progress.ran

    with pytest.raises(KeyboardInterrupt):
        build("end")
    (tmp_path / "bundle.partial" / "a").write_text("b")
    assert build() == ["a", "b", "d", "end"]


def test_damage_while_the_build_runs_is_noticed_and_mended(tmp_path):
    class Damaging(Counting):
        def start(self, step, total=None):
            super().start(step, total)
            if step == "prefix.bin":
                (tmp_path / "bundle.partial" / "weights.bin").write_bytes(b"Weights" * 1000)

    with pytest.raises(BundleError, match=r"weights\.bin changed while the build ran"):
        small_build(tmp_path, progress=Damaging())
    assert small_build(tmp_path) == ["weights.bin", "manifest"]
    assert holds(tmp_path / "bundle")


@pytest.mark.parametrize("target", ["cpu", "cuda"])
def test_a_flipped_byte_in_every_file_of_an_interrupted_build_is_mended(tmp_path, target):
    model = str(toy.make_checkpoint(tmp_path / "toy", layers=1, dtype="bfloat16"))
    options = {"plan": "dense", "target": target}
    whole_one = make_bundle(model, out=tmp_path / "whole", **options).path
    with pytest.raises(KeyboardInterrupt):
        make_bundle(model, out=tmp_path / "out", progress=Counting("manifest"), **options)
    (partial,) = tmp_path.glob("out/toy/*.partial")
    damaged = [file for file in partial.iterdir() if file.name != NOTES]
    assert len(damaged) > 6
    for file in damaged:
        data = bytearray(file.read_bytes())
        data[len(data) // 2] ^= 1
        file.write_bytes(data)
    again = make_bundle(model, out=tmp_path / "out", **options).path
    for file in whole_one.iterdir():
        assert file.name[0] == "." or file.read_bytes() == (again / file.name).read_bytes()


def test_a_build_that_begins_while_another_ends_is_refused(tmp_path, monkeypatch):
    small_build(tmp_path, "old key", OTHER)
    refused = []

    def second(*_):
        with pytest.raises(CapacityError, match="another build"):
            small_build(tmp_path, "other key", OTHER)
        refused.append(True)

    for module, name in ((steps, "sync"), (steps, "_remove"), (Path, "rename")):
        real = getattr(module, name)

        def spying(*given, real=real):
            second()
            done = real(*given)
            second()
            return done

        monkeypatch.setattr(module, name, spying)
    small_build(tmp_path)
    assert len(refused) > 20
    assert holds(tmp_path / "bundle")


def test_a_disk_that_fills_up_at_any_write_ends_in_one_message(tmp_path, monkeypatch):
    count = 0
    for allowed in range(40):
        count = 0

        def full(descriptor, real=os.fsync, allowed=allowed):
            nonlocal count
            count += 1
            if count > allowed:
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
            real(descriptor)

        monkeypatch.setattr(disk_files.os, "fsync", full)
        out = tmp_path / str(allowed)
        try:
            small_build(out)
        except CapacityError as error:
            message = str(error)
            assert "No space left" in message
            assert "--out" in message
        monkeypatch.undo()
        small_build(out)
        assert holds(out / "bundle")
        if count <= allowed:
            break
    assert allowed > 10


def test_a_folder_that_is_a_link_is_not_emptied(tmp_path):
    (mine := tmp_path / "mine").mkdir()
    (mine / "precious").touch()
    (tmp_path / "engines").symlink_to(mine)
    with (
        pytest.raises(CapacityError, match="link"),
        Steps(tmp_path / "engines", "key", Progress()),
    ):
        pass
    assert [file.name for file in mine.iterdir()] == ["precious"]


@pytest.mark.slow
def test_killed_builds_resume_to_equal_bytes():
    script = Path(__file__).parents[1] / "kill_builds.py"
    done = subprocess.run(
        [sys.executable, script, "--times", "3", "--seed", "1"], capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr + done.stdout
    assert "3 of 3" in done.stdout
