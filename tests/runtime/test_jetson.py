"""The checks of a Jetson, over files and output as JetPack's tools have them.

Written from NVIDIA's guides; no board was at hand to record them.
"""

import json
from types import SimpleNamespace

import pytest
from click.testing import CliRunner
from visistage.cli.main import main
from visistage.runtime import jetson
from visistage.runtime.hardware import GpuInfo
from visistage.runtime.jetson import board_checks

ORIN = {
    "etc/nv_tegra_release": (
        "# R36 (release), REVISION: 4.3, GCID: 38968081, BOARD: generic, EABI: aarch64, "
        "DATE: Wed Jan  8 01:49:37 UTC 2025\n# KERNEL_VARIANT: oot\n"
    ),
    "proc/device-tree/model": "NVIDIA Jetson AGX Orin Developer Kit\0",
    "etc/nvpmodel.conf": (
        "< POWER_MODEL ID=0 NAME=MAXN >\nCPU_ONLINE CORE_0 1\n"
        "< POWER_MODEL ID=1 NAME=MODE_15W >\n< PM_CONFIG DEFAULT=2 >\n"
    ),
    "sys/class/devfreq/17000000.gpu/min_freq": "306000000\n",
    "sys/class/devfreq/17000000.gpu/max_freq": "1300500000\n",
    "sys/class/devfreq/8188050000.other/min_freq": "1\n",
    "sys/devices/system/cpu/cpufreq/policy0/scaling_min_freq": "729600\n",
    "sys/devices/system/cpu/cpufreq/policy0/scaling_max_freq": "2201600\n",
    "sys/devices/system/cpu/cpufreq/policy4/scaling_min_freq": "729600\n",
    "sys/devices/system/cpu/cpufreq/policy4/scaling_max_freq": "2201600\n",
    "proc/swaps": (
        "Filename\t\t\t\tType\t\tSize\t\tUsed\t\tPriority\n"
        "/dev/zram0                              partition\t2621440\t\t0\t\t5\n"
        "/dev/zram1                              partition\t2621440\t\t0\t\t5\n"
    ),
    "usr/lib/python3.10/dist-packages/tensorrt/__init__.py": "",
    "proc/mounts": "/dev/mmcblk0p1 / ext4 rw 0 0\n",
}
READY = ORIN | {
    "sys/class/devfreq/17000000.gpu/min_freq": "1300500000\n",
    "sys/devices/system/cpu/cpufreq/policy0/scaling_min_freq": "2201600\n",
    "sys/devices/system/cpu/cpufreq/policy4/scaling_min_freq": "2201600\n",
    "proc/swaps": ORIN["proc/swaps"].splitlines()[0] + "\n/ssd/swap file 16777212 0 -2\n",
    "proc/mounts": "/dev/mmcblk0p1 / ext4 rw 0 0\n/dev/nvme0n1p1 /{} ext4 rw 0 0\n",
}
PACKAGES = {"cuda-core": "1.2.2", "cuda-bindings": "12.9.10"}


@pytest.fixture
def board(tmp_path, monkeypatch):
    """Make this machine look like a board; return its checks by name."""
    monkeypatch.setattr(jetson.metadata, "version", PACKAGES.__getitem__)
    gpu = GpuInfo("Orin (nvgpu)", (8, 7), 61 << 30)
    monkeypatch.setattr(jetson, "find_gpu", lambda: gpu)

    def checks(files, power="NV Power Mode: MAXN\n0\n", tensorrt="10.3.0", free=10**12):
        for name, text in files.items():
            (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
            (tmp_path / name).write_text(text.format(str(tmp_path)[1:]))
        variant = tensorrt and SimpleNamespace(version=tensorrt)
        monkeypatch.setattr(jetson, "find_trt_variant", lambda backend: variant)
        monkeypatch.setattr(jetson.shutil, "disk_usage", lambda at: SimpleNamespace(free=free))
        found = board_checks(tmp_path, tmp_path, lambda *command: power)
        return {check.name: check for check in found}

    return checks


def test_a_board_that_is_ready_has_nothing_to_type(board):
    found = board(READY)
    assert [check.advice for check in found.values()] == [None] * 8
    assert found["board"].found.endswith("Developer Kit, Jetson Linux 36: target orin-jp62")
    assert found["clocks"].found == "GPU 1300 MHz, CPU 2201 MHz"
    assert found["swap"].found == "16.0 GiB"
    assert found["disk"].found == "931.3 GiB free on /dev/nvme0n1p1"
    assert "61.0 GiB shared" in found["gpu"].found
    assert found["cuda-core"].found == "1.2.2, cuda-bindings 12.9.10"


def test_a_board_as_it_comes_is_told_what_to_type(board):
    found = board(ORIN, power="NV Power Mode: MODE_15W\n1\n", tensorrt=None)
    advice = {name: check.advice for name, check in found.items() if check.advice}
    assert advice["power mode"] == "Type: sudo nvpmodel -m 0"
    assert advice["clocks"].endswith("sudo jetson_clocks")
    assert found["clocks"].found == "GPU 306 to 1300 MHz, CPU 729 to 2201 MHz"
    assert "nvzramconfig" in advice["swap"]
    assert "mkswap /ssd/swap" in advice["swap"]
    assert found["swap"].found == "5.0 GiB of zram"
    assert "--system-site-packages" in advice["TensorRT's Python"]
    assert "NVMe" in advice["disk"]
    assert {"board", "gpu", "cuda-core"}.isdisjoint(advice)


@pytest.mark.parametrize(
    ("change", "name", "says"),
    [
        ({"etc/nv_tegra_release": "# R39 (release), REVISION: 2.0\n"}, "cuda-core", "==13"),
        ({"etc/nv_tegra_release": "# R38 (release), REVISION: 4.0\n"}, "board", "JetPack 6.2 or 7"),
        ({"etc/nv_tegra_release": "nothing\n"}, "board", "on the board: visistage doctor"),
        ({"proc/swaps": "Filename Type Size Used Priority\n"}, "swap", "fallocate"),
        ({"proc/device-tree/model": "NVIDIA Jetson Nano\0"}, "board", "orin-jp62, orin-jp72, thor"),
    ],
)
def test_one_thing_that_is_not_right_is_found(board, change, name, says):
    assert says in board(READY | change)[name].advice


def test_modes_are_those_of_the_board(board):
    """An Orin Nano's fastest mode is not number 0."""
    modes = "< POWER_MODEL ID=0 NAME=15W >\n< POWER_MODEL ID=2 NAME=MAXN_SUPER >\n"
    found = board(READY | {"etc/nvpmodel.conf": modes}, power="NV Power Mode: 15W\n0\n")
    assert found["power mode"].advice == "Type: sudo nvpmodel -m 2"
    assert board(READY, power=None)["power mode"].advice == "Type: sudo nvpmodel -q"


def test_tensorrt_of_another_jetpack_and_a_small_disk_are_found(board):
    found = board(READY, tensorrt="10.16.2", free=10**10)
    assert "orin-jp62 wants 10.3 or newer, and older than 10.4" in found["TensorRT's Python"].advice
    assert "take 27.0 GiB" in found["disk"].advice


def test_where_there_is_no_jetson_it_is_said():
    done = CliRunner().invoke(main, ["doctor", "--jetson", "--json"])
    assert done.exit_code == 0
    facts = json.loads(done.stdout)
    assert not facts["ready"]
    assert facts["checks"][0]["found"] == "no Jetson"
    table = CliRunner().invoke(main, ["doctor", "--jetson"]).stdout
    assert "what to do" in table
