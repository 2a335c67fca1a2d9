"""What a power cut would leave of a folder, before and after every ``fsync``.

Two extremes of what disks do: ``lost``, nothing lasts but what was waited for; ``ahead``, names
last at once, and of bytes only those that were waited for: the rest of a file is zeros.
"""

import os
from pathlib import Path

Tree = dict  # name -> bytes, or the tree of a folder


class Disk:
    """A context manager that watches a folder; ``states`` are trees that a power cut may leave."""

    def __init__(self, root: Path):
        self.root, self.states = root, []
        self._durable: dict[int, bytes | dict[str, int]] = {}

    def __enter__(self):
        self._real = os.fsync
        os.fsync = self._fsync
        for path in (*self.root.rglob("*"), self.root):  # long on the disk
            self._record(path)
        return self

    def __exit__(self, *_):
        os.fsync = self._real
        self._cut()

    def _fsync(self, descriptor: int) -> None:
        self._cut()
        self._real(descriptor)
        self._record(Path(os.readlink(f"/proc/self/fd/{descriptor}")))
        self._cut()

    def _record(self, path: Path) -> None:
        inode = path.stat().st_ino
        if not path.is_dir():
            self._durable[inode] = path.read_bytes()
            return
        self._durable[inode] = {entry.name: entry.inode() for entry in os.scandir(path)}
        for folder in filter(Path.is_dir, path.iterdir()):
            self._durable.setdefault(folder.stat().st_ino, {})

    def _cut(self) -> None:
        self.states += [self._lost(self.root.stat().st_ino), self._ahead(self.root)]

    def _lost(self, inode: int) -> Tree | bytes:
        known = self._durable.get(inode, b"")
        if isinstance(known, bytes):
            return known
        return {name: self._lost(inner) for name, inner in known.items()}

    def _ahead(self, path: Path) -> Tree | bytes:
        if path.is_dir():
            return {entry.name: self._ahead(entry) for entry in path.iterdir()}
        known = self._durable.get(path.stat().st_ino, b"")
        size = path.stat().st_size
        return (known if isinstance(known, bytes) else b"")[:size].ljust(size, b"\0")


def restore(tree: Tree, folder: Path) -> Path:
    """Write a state to ``folder``, which is new."""
    folder.mkdir()
    for name, inner in tree.items():
        if isinstance(inner, dict):
            restore(inner, folder / name)
        else:
            (folder / name).write_bytes(inner)
    return folder
