"""Commands run under watch, in a child process: what they read, write, remove or start.

    results = watch(cases, allowed, victim)      # here
    python -m visistage.tests.support.watched    # there

Python's own work is seen by an audit hook. Libraries in other languages open files unseen; whether
they touched the folder of a victim is asked of the kernel (inotify), where it is Linux.
"""

import contextlib
import ctypes
import io
import json
import os
import struct
import subprocess
import sys
import sysconfig
from dataclasses import asdict, dataclass
from pathlib import Path

PATHS = {  # event: positions of path and of the folder's descriptor that it is relative to
    "open": (0, None),
    "os.listdir": (0, None),
    "os.scandir": (0, None),
    "os.remove": (0, 1),
    "os.rmdir": (0, 1),
    "os.mkdir": (0, 2),
    "os.rename": (1, 3),
    "os.link": (1, 3),
    "os.symlink": (1, 2),
    "os.truncate": (0, None),
    "os.chmod": (0, 2),
    "os.utime": (0, 3),
    "shutil.rmtree": (0, None),
    "shutil.copyfile": (1, None),
}
PROGRAMS = {"subprocess.Popen": 0, "os.system": 0, "os.exec": 0, "os.posix_spawn": 0}
SEEN = 0x1 | 0x2 | 0x4 | 0x20 | 0x40 | 0x80 | 0x100 | 0x200
"""inotify: access, modify, attributes, open, moved from and to, create, delete."""


@dataclass
class Watched:
    """One command: its exit code (1 after a traceback), its messages, what it should not have."""

    code: int
    output: str
    touched: list[str]

    @property
    def message(self):
        """The error, without what was shown before it."""
        return self.output.rpartition("error: ")[2] if self.code == 2 else ""


def watch(cases, allowed, victim, setup="", **environment) -> list[Watched]:
    """Run every command line of ``cases``; only in ``allowed`` may it touch anything.

    ``setup``: Python to run before, with what a machine lacks.
    """
    job = {"cases": cases, "allowed": [str(a) for a in allowed], "victim": str(victim)}
    done = subprocess.run(
        [sys.executable, "-m", __name__],
        input=json.dumps(job | {"setup": setup}),
        capture_output=True,
        text=True,
        timeout=600,
        env={**os.environ, **environment},
    )
    assert done.returncode == 0, done.stderr[-2000:]
    return [Watched(**one) for one in json.loads(done.stdout.splitlines()[-1])]


class Witness:
    """What was touched outside of ``allowed``, since it was last asked."""

    def __init__(self, allowed, victim):
        own = [sys.prefix, sys.base_prefix, *sysconfig.get_paths().values(), *sys.path]
        own += ["/proc", "/sys", "/dev", "/usr/share/zoneinfo", "/etc/localtime"]
        self.allowed = {os.path.realpath(path) for path in (*own, *allowed) if path}
        self.allowed |= {str(Path(__file__).resolve().parents[2])}
        self.touched, self.on = [], False
        sys.addaudithook(self.hear)
        self.notes = None
        if sys.platform == "linux":
            libc = ctypes.CDLL(None, use_errno=True)
            self.notes = libc.inotify_init1(os.O_NONBLOCK)
            for folder in (victim, *(path for path in Path(victim).rglob("*") if path.is_dir())):
                assert libc.inotify_add_watch(self.notes, os.fsencode(folder), SEEN) >= 0

    def hear(self, event, arguments):
        if not self.on:
            return
        if event in PROGRAMS:
            self.touched.append(f"{event} {arguments[PROGRAMS[event]]!r}")
        elif event in PATHS:
            at, descriptor = PATHS[event]
            path = arguments[at]
            if isinstance(path, int) or path is None:
                return
            self.on = False
            try:
                path = os.fsdecode(path)
                folder = arguments[descriptor] if descriptor is not None else -1
                if isinstance(folder, int) and folder >= 0:
                    path = os.path.join(os.readlink(f"/proc/self/fd/{folder}"), path)
                # What has a link's name is that link; only opening and listing follow it.
                follows = event in ("os.listdir", "os.scandir") or (
                    event == "open" and not arguments[2] & getattr(os, "O_NOFOLLOW", 0)
                )
                head, tail = os.path.split(os.path.abspath(path))
                real = os.path.realpath(path) if follows else f"{os.path.realpath(head)}/{tail}"
                if not any(real == a or real.startswith(f"{a}{os.sep}") for a in self.allowed):
                    self.touched.append(f"{event} {path}")
            except ValueError:  # a NUL: the system has not seen it
                self.touched.append(f"{event} {path!r}")
            finally:
                self.on = True

    def told(self):
        touched, self.touched = self.touched, []
        with contextlib.suppress(BlockingIOError):
            while self.notes is not None:
                raw, at = os.read(self.notes, 1 << 16), 0
                while at < len(raw):
                    _, mask, _, length = struct.unpack_from("iIII", raw, at)
                    name = raw[at + 16 : at + 16 + length].rstrip(b"\0").decode()
                    touched.append(f"victim {mask & SEEN:#x} {name}")
                    at += 16 + length
        return touched


def main():
    job = json.load(sys.stdin)
    from visistage.cli.main import main as command_line

    exec(job["setup"], {})
    witness = Witness(job["allowed"], job["victim"])
    results = []
    for arguments in job["cases"]:
        text = io.TextIOWrapper(io.BytesIO(), "utf-8", write_through=True)
        code = 1
        with contextlib.redirect_stdout(text), contextlib.redirect_stderr(text):
            witness.on = True
            try:
                command_line([str(a) for a in arguments])
            except SystemExit as ended:
                code = ended.code
            except BaseException as error:
                print(f"{type(error).__name__}: {error}")
            finally:
                witness.on = False
        output = text.buffer.getvalue().decode("utf-8", "replace")
        results.append(asdict(Watched(code or 0, output, witness.told())))
    print(json.dumps(results), file=sys.__stdout__)


if __name__ == "__main__":
    main()
