"""Device readings from trees of files as a Jetson has them.

The trees are written by hand, after the kernel's documentation of thermal zones and of the ina3221 driver, and after the
rails and zones that NVIDIA's developer guide names for an Orin; no Jetson was at hand to record one.
"""

from __future__ import annotations

import os
import subprocess
import sys
import time
from pathlib import Path

import pytest

from apps import power_mode
from apps.power_mode import read_power_mode
from apps.streaming.contracts import DeviceReading
from apps.streaming.device import DeviceReader, read_device

ORIN = {
    "sys/class/thermal/thermal_zone0/type": "cpu-thermal\n",
    "sys/class/thermal/thermal_zone0/temp": "48718\n",
    "sys/class/thermal/thermal_zone1/type": "gpu-thermal\n",
    "sys/class/thermal/thermal_zone1/temp": "47187\n",
    "sys/class/thermal/thermal_zone10/type": "tj-thermal\n",
    "sys/class/thermal/thermal_zone10/temp": "48718\n",
    "sys/class/thermal/thermal_zone2/type": "cv0-thermal\n",  # powered off: its temp cannot be read
    "sys/class/thermal/cooling_device0/type": "pwm-fan\n",
    "sys/class/hwmon/hwmon0/name": "tmp451\n",
    "sys/class/hwmon/hwmon3/name": "ina3221\n",
    "sys/class/hwmon/hwmon3/in1_label": "VDD_IN\n",
    "sys/class/hwmon/hwmon3/in1_input": "5040\n",
    "sys/class/hwmon/hwmon3/curr1_input": "1000\n",
    "sys/class/hwmon/hwmon3/in2_label": "VDD_CPU_GPU_CV\n",
    "sys/class/hwmon/hwmon3/in2_input": "5032\n",
    "sys/class/hwmon/hwmon3/curr2_input": "250\n",
    "sys/class/hwmon/hwmon3/in3_label": "NC\n",
    "sys/class/hwmon/hwmon3/in3_input": "0\n",
    "sys/class/hwmon/hwmon3/curr3_input": "0\n",
    "sys/class/hwmon/hwmon3/in4_input": "30\n",  # shunt voltages: no rails
    "sys/class/hwmon/hwmon3/in7_label": "sum of shunt voltages\n",
    "sys/class/hwmon/hwmon3/in7_input": "60\n",
    "sys/class/hwmon/hwmon3/curr4_input": "1250\n",
    "var/lib/nvpmodel/status": "pmode:0002\n",
    "etc/nvpmodel.conf": (
        "# comment\n< POWER_MODEL ID=0 NAME=MAXN >\nCPU_ONLINE CORE_0 1\n"
        "< POWER_MODEL ID=2 NAME=MODE_30W >\nGPU MAX_FREQ 612000000\n< POWER_MODEL ID=12 NAME=MODE_X >\n"
        "< PM_CONFIG DEFAULT=0 >\n"
    ),
    "sys/devices/system/cpu/cpu0/cpufreq/scaling_governor": "schedutil\n",
}


def tree(root: Path, files: dict[str, str]) -> Path:
    for name, content in files.items():
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(content)
    return root


def test_a_jetson(tmp_path: Path) -> None:
    reading = DeviceReader(tree(tmp_path, ORIN)).read()
    assert reading == DeviceReading(
        temperatures_c={"cpu": 48.7, "gpu": 47.2, "tj": 48.7},
        power_mw={"VDD_IN": 5040.0, "VDD_CPU_GPU_CV": 1258.0},
        power_mode="MODE_30W",
    )


def test_a_machine_that_says_nothing(tmp_path: Path) -> None:
    assert DeviceReader(tmp_path).read() == DeviceReading()


def test_what_cannot_be_read_is_left_out(tmp_path: Path) -> None:
    odd = {
        "sys/class/thermal/thermal_zone0/type": "x86_pkg_temp\n",
        "sys/class/thermal/thermal_zone0/temp": "nonsense\n",
        "sys/class/thermal/thermal_zone1/type": "acpitz\n",
        "sys/class/thermal/thermal_zone1/temp": "30000\n",
        "sys/class/thermal/thermal_zone2/type": "acpitz\n",
        "sys/class/thermal/thermal_zone2/temp": "-5000\n",
        "sys/class/hwmon/hwmon0/name": "ina3221\n",
        "sys/class/hwmon/hwmon0/in1_label": "VDD_IN\n",
        "sys/class/hwmon/hwmon0/in1_input": "5000\n",  # no current
        "sys/class/hwmon/hwmon1/name": "amdgpu\n",
        "sys/class/hwmon/hwmon1/power1_input": "15250000\n",
        "sys/class/hwmon/hwmon1/power1_label": "PPT\n",
        "sys/class/hwmon/hwmon2/name": "psu\n",
        "sys/class/hwmon/hwmon2/power1_input": "1000\n",
    }
    reading = DeviceReader(tree(tmp_path, odd)).read()
    assert reading.temperatures_c == {"acpitz": 30.0, "acpitz 2": -5.0}
    assert reading.power_mw == {"PPT": 15250.0, "psu power1": 1.0}


def test_the_power_mode_where_parts_are_missing(tmp_path: Path) -> None:
    mode = tree(tmp_path / "a", {"var/lib/nvpmodel/status": "pmode:0007 fmode:cool\n"})
    assert read_power_mode(mode) == "mode 7"
    governor = "sys/devices/system/cpu/cpu0/cpufreq/scaling_governor"
    assert read_power_mode(tree(tmp_path / "b", {governor: "performance\n"})) == "governor performance"
    assert read_power_mode(tmp_path / "nothing") is None


def test_nvpmodel_is_asked_where_its_files_are_missing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    if Path("/var/lib/nvpmodel/status").exists():
        pytest.skip("a Jetson: its file is read first")
    program = tmp_path / "nvpmodel"
    program.write_text("#!/bin/sh\necho 'NV Power Mode: MODE_15W'; echo 2\n")
    program.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:{os.environ['PATH']}")
    power_mode._ask_nvpmodel.cache_clear()
    try:
        assert read_power_mode() == "MODE_15W"
        program.write_text("#!/bin/sh\nexit 1\n")
        assert read_power_mode() == "MODE_15W", "asked once"
        power_mode._ask_nvpmodel.cache_clear()
        assert read_power_mode() != "MODE_15W"
    finally:
        power_mode._ask_nvpmodel.cache_clear()


def test_the_load_and_memory_of_this_process_and_its_children() -> None:
    code = "import sys; held = bytearray(64 << 20); held[::4096] = b'x' * len(held[::4096]); print(flush=True)\nwhile True: pass"
    reader = DeviceReader()
    before = reader.read()
    assert before.cpu_percent is None, "there is nothing yet to reckon from"
    assert before.memory_used_bytes is not None
    child = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE)
    try:
        assert child.stdout is not None
        child.stdout.readline()
        reader.read()
        time.sleep(0.5)
        during = reader.read()
        assert during.memory_used_bytes is not None
        assert during.memory_used_bytes - before.memory_used_bytes >= 60 << 20
        assert during.cpu_percent is not None
        # The child turns all the time; on a busy machine it gets a part of a core.
        assert 2.0 <= during.cpu_percent <= 120.0 * (os.cpu_count() or 1)
    finally:
        child.kill()
        child.communicate()
    after = reader.read()
    assert after.cpu_percent is not None
    assert after.cpu_percent >= 0.0


def test_the_counted_time_is_that_of_proc(tmp_path: Path) -> None:
    """The name of a process may hold brackets and spaces; fields 14 and 15 follow it."""
    pid = os.getpid()
    ticks = os.sysconf("SC_CLK_TCK")
    fields = ["S", "1", *["0"] * 9, "{user}", "{system}", *["0"] * 30]
    line = f"{pid} (a b) (c) " + " ".join(fields) + "\n"
    reader = DeviceReader(tree(tmp_path, {f"proc/{pid}/stat": line.format(user=100, system=50)}))
    began = time.monotonic()
    reader.read()
    time.sleep(0.2)
    tree(tmp_path, {f"proc/{pid}/stat": line.format(user=100 + ticks // 10, system=50 + ticks // 10)})
    found = reader.read().cpu_percent
    elapsed_s = time.monotonic() - began
    assert found is not None
    assert 20.0 / elapsed_s <= found <= 20.0 / 0.2


def test_reading_this_machine_never_fails() -> None:
    reading = read_device()
    assert reading.memory_used_bytes is None or reading.memory_used_bytes > 1 << 20
