"""A Jetson as compiling and running a bundle want it: a list of checks, each with what to type.

Everything is read from files and from one program (``nvpmodel -q``) as JetPack has them; nothing is
changed, and nothing here needs root.
"""

from __future__ import annotations

import re
import shutil
import subprocess
from collections.abc import Callable
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path

from ..graphs.targets import TARGETS, TENSORRT, Target
from ..pages.units import show_bytes
from .device.cuda import missing_cuda_core
from .device.tensorrt import find_trt_variant
from .hardware import ROOT, find_gpu

RELEASES = {36: "jp62", 39: "jp72"}
"""Ends of targets' names, by the major release of Jetson Linux. 38, JetPack 7.0 and 7.1, has no
TensorRT that a target here is for."""

CUDA_MAJOR = {36: 12, 38: 13, 39: 13}
"""CUDA's major version, by that release."""

SEVEN_BYTES = 29 * 10**9
"""Disk that a 7B in FP16 takes, engines included (docs/size.md)."""

SWAP = (
    "Compiling a 7B takes three times a part's weights: where it is killed, add swap on NVMe "
    "(docs/jetson.md): sudo fallocate -l 16G /ssd/swap && sudo chmod 600 /ssd/swap && "
    "sudo mkswap /ssd/swap && sudo swapon /ssd/swap"
)


@dataclass(frozen=True)
class BoardCheck:
    """One line of the list: what was found, and what to do about it; None: nothing."""

    name: str
    found: str
    advice: str | None = None


def board_checks(
    folder: Path, root: Path = ROOT, ask: Callable[..., str | None] | None = None
) -> list[BoardCheck]:
    """Return every check, in the order in which to see to them.

    ``folder``: where bundles are to lie. ``root`` and ``ask``, which runs a program and returns
    what it prints, are for tests.
    """
    ask = ask or _ask
    release, model = _release(root), _text(root / "proc" / "device-tree" / "model")
    board = next((name for name in ("Orin", "Thor") if name in (model or "")), None)
    target = TARGETS.get(f"{board}-{RELEASES.get(release or 0)}".lower())
    return [
        _board(release, model, target),
        _power(root, ask("nvpmodel", "-q")),
        _clocks(root),
        _swap(root),
        _gpu(),
        _tensorrt(root, target),
        _bindings(release),
        _disk(root, folder),
    ]


def _board(release: int | None, model: str | None, target: Target | None) -> BoardCheck:
    if release is None:
        return BoardCheck("board", "no Jetson", "Type this on the board: visistage doctor --jetson")
    found = f"{model or 'unknown'}, Jetson Linux {release}"
    if target is not None:
        return BoardCheck("board", f"{found}: target {target.name}")
    known = ", ".join(name for name in TARGETS if name.endswith(tuple(RELEASES.values())))
    return BoardCheck("board", found, f"No target is for this. Install JetPack 6.2 or 7.2: {known}")


def _power(root: Path, said: str | None) -> BoardCheck:
    mode = re.search(r"NV Power Mode: *(\S+)", said or "")
    if mode is None:
        return BoardCheck("power mode", "unknown", "Type: sudo nvpmodel -q")
    if mode[1].startswith("MAXN"):
        return BoardCheck("power mode", mode[1])
    config = _text(root / "etc" / "nvpmodel.conf") or ""
    modes = {
        name: number for number, name in re.findall(r"POWER_MODEL ID=(\d+) NAME=(\S+)", config)
    }
    number = modes.get("MAXN_SUPER", modes.get("MAXN", "0"))
    return BoardCheck("power mode", mode[1], f"Type: sudo nvpmodel -m {number}")


def _clocks(root: Path) -> BoardCheck:
    """Compare lowest and highest clocks: ``jetson_clocks`` makes them one."""
    found, free = [], False
    folders = {
        "GPU": (root / "sys/class/devfreq", "*g[ap]*", "{}_freq", 10**6),
        "CPU": (root / "sys/devices/system/cpu/cpufreq", "policy*", "scaling_{}_freq", 10**3),
    }
    for name, (folder, pattern, file, unit) in folders.items():
        for place in sorted(folder.glob(pattern)):
            limits = [_number(place / file.format(end)) for end in ("min", "max")]
            if None in limits:
                continue
            low, high = (limit // unit for limit in limits if limit is not None)
            free |= low != high
            text = f"{name} {high} MHz" if low == high else f"{name} {low} to {high} MHz"
            found += [text] * (text not in found)
    if not found:
        return BoardCheck("clocks", "unknown", "Type: sudo jetson_clocks --show")
    advice = "Type, after every boot: sudo jetson_clocks" if free else None
    return BoardCheck("clocks", ", ".join(found), advice)


def _swap(root: Path) -> BoardCheck:
    lines = (_text(root / "proc" / "swaps") or "").splitlines()[1:]
    areas = [(line.split()[0], int(line.split()[2]) << 10) for line in lines if line.strip()]
    real = sum(nbytes for name, nbytes in areas if "zram" not in name)
    packed = sum(nbytes for name, nbytes in areas if "zram" in name)
    if real:
        return BoardCheck("swap", show_bytes(real))
    if packed:
        off = "Type: sudo systemctl disable --now nvzramconfig; weights do not compress. "
        return BoardCheck("swap", f"{show_bytes(packed)} of zram", off + SWAP)
    return BoardCheck("swap", "none", SWAP)


def _gpu() -> BoardCheck:
    gpu = find_gpu()
    if gpu is None:
        return BoardCheck("gpu", "none", "No driver answers: sudo reboot, or flash JetPack again")
    return BoardCheck("gpu", f"{gpu.name}, {show_bytes(gpu.memory_bytes)} shared with the CPU")


def _tensorrt(root: Path, target: Target | None) -> BoardCheck:
    variant = find_trt_variant(TENSORRT)
    if variant is not None:
        if target is None or target.serves(variant.version):
            return BoardCheck("TensorRT's Python", variant.version)
        first, stop = target.versions
        wanted = f"{target.name} wants {first} or newer, and older than {stop}"
        return BoardCheck("TensorRT's Python", variant.version, f"{wanted}: JetPack's own")
    if any(root.glob("usr/lib/python3*/dist-packages/tensorrt")):
        return BoardCheck(
            "TensorRT's Python",
            "not seen by this environment",
            'Make it again: python3 -m venv --system-site-packages "$VENV"',
        )
    advice = "Type: sudo apt install python3-libnvinfer python3-venv"
    return BoardCheck("TensorRT's Python", "not installed", advice)


def _bindings(release: int | None) -> BoardCheck:
    wanted = CUDA_MAJOR.get(release or 0, 13)
    install_both = f"Type: pip install cuda-core 'cuda-bindings=={wanted}.*'"
    try:
        found = metadata.version("cuda-bindings")
    except metadata.PackageNotFoundError:
        return BoardCheck("cuda-core", "not installed", install_both)
    if list(missing_cuda_core()) or int(found.split(".")[0]) != wanted:
        return BoardCheck("cuda-core", f"with cuda-bindings {found}", install_both)
    return BoardCheck("cuda-core", f"{metadata.version('cuda-core')}, cuda-bindings {found}")


def _disk(root: Path, folder: Path) -> BoardCheck:
    free = shutil.disk_usage(folder).free
    mounts = [line.split()[:2] for line in (_text(root / "proc" / "mounts") or "").splitlines()]
    here = folder.resolve()
    above = [(len(at), device) for device, at in mounts if here.is_relative_to(at)]
    device = max(above, default=(0, "an unknown disk"))[1]
    found = f"{show_bytes(free)} free on {device}"
    if "mmcblk" in device:
        return BoardCheck("disk", found, "That is an SD card or eMMC: put bundles on NVMe")
    if free < SEVEN_BYTES:
        need = show_bytes(SEVEN_BYTES)
        return BoardCheck("disk", found, f"A 7B in FP16 and its engines take {need}: make room")
    return BoardCheck("disk", found)


def _release(root: Path) -> int | None:
    found = re.search(r"# R(\d+) \(release\)", _text(root / "etc" / "nv_tegra_release") or "")
    return int(found[1]) if found else None


def _number(file: Path) -> int | None:
    text = _text(file) or ""
    return int(text) if text.isdecimal() else None


def _text(file: Path) -> str | None:
    try:
        return file.read_text(errors="replace").strip().rstrip("\0")
    except OSError:
        return None


def _ask(*command: str) -> str | None:
    """Return what a program prints; None: it is not there, or does not end."""
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=10)
    except (OSError, subprocess.TimeoutExpired):
        return None
    return done.stdout
