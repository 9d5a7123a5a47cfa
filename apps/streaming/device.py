"""What the machine says of itself while it streams: temperatures, power, power mode, load, memory.

Everything is read from files of the kernel and of nvpmodel, without root; what is not there is left out.

* temperatures: ``/sys/class/thermal/thermal_zone*/{type,temp}``, thousandths of °C [kernel, sysfs-class-thermal].
  A zone of a part that is powered off fails to be read; it is left out.
* power: hwmon. An INA3221, which a Jetson has on its supply rails, gives a voltage (``inN_input``, mV), a current
  (``currN_input``, mA) and the rail's name (``inN_label``) for channels 1 to 3; its channels from 4 on are shunt voltages
  and sums [kernel, Documentation/hwmon/ina3221.rst; NVIDIA Jetson Linux Developer Guide, "Software-Based Power
  Consumption Modeling"]. Other chips give ``powerN_input`` in µW [kernel, Documentation/hwmon/sysfs-interface.rst].
* power mode: `apps.power_mode`.
* load and memory: ``/proc``, of this process and of those it started.
"""

from __future__ import annotations

import os
import re
import time
from collections.abc import Iterator
from functools import cache
from pathlib import Path

from apps.power_mode import read_power_mode
from apps.streaming.contracts import DeviceReading

__all__ = ["DeviceReader", "read_device"]

_INA3221_CHANNELS = (1, 2, 3)
_KIB = 1024


class DeviceReader:
    """Reads the machine again and again; keeps what the load of a process is reckoned from.

    Args:
        root: where ``sys``, ``proc``, ``etc`` and ``var`` lie; another one in tests.
    """

    def __init__(self, root: Path = Path("/")) -> None:
        self._root = root
        self._ticks_per_s = os.sysconf("SC_CLK_TCK")
        self._used: dict[int, int] = {}
        self._used_at_s: float | None = None

    def read(self) -> DeviceReading:
        """Everything, now. Takes a few milliseconds on a Jetson, less elsewhere; never raises."""
        processes = _family(self._root, os.getpid())
        return DeviceReading(
            temperatures_c=dict(_temperatures(self._root)),
            power_mw=dict(_power(self._root)),
            power_mode=read_power_mode(self._root),
            cpu_percent=self._cpu_percent(processes),
            memory_used_bytes=_memory_bytes(self._root, processes),
        )

    def _cpu_percent(self, processes: list[int]) -> float | None:
        """CPU time since the last call over wall time; 100 is one core. ``None`` at the first call."""
        now_s = time.monotonic()
        used = {pid: ticks for pid in processes if (ticks := _cpu_ticks(self._root, pid)) is not None}
        before, since_s = self._used, self._used_at_s
        self._used, self._used_at_s = used, now_s
        if since_s is None or not used or now_s <= since_s:
            return None
        # A process that ended takes its last time with it; one that is new counts from its start.
        ticks = sum(max(0, value - before.get(pid, 0)) for pid, value in used.items())
        return round(100.0 * ticks / self._ticks_per_s / (now_s - since_s), 1)


def read_device() -> DeviceReading:
    """The machine this runs on; the load is that since the last call in this process."""
    return _this_machine().read()


@cache
def _this_machine() -> DeviceReader:
    return DeviceReader()


def _temperatures(root: Path) -> Iterator[tuple[str, float]]:
    seen: set[str] = set()
    for zone in _numbered(root / "sys/class/thermal", "thermal_zone"):
        name, millidegrees = _text(zone / "type"), _number(zone / "temp")
        if not name or millidegrees is None:
            continue
        name = name.removesuffix("-thermal").removesuffix("-therm")
        if name in seen:  # two zones of one kind: told apart by their number
            name = f"{name} {zone.name.removeprefix('thermal_zone')}"
        seen.add(name)
        yield name, round(millidegrees / 1000.0, 1)


def _power(root: Path) -> Iterator[tuple[str, float]]:
    for chip in _numbered(root / "sys/class/hwmon", "hwmon"):
        name = _text(chip / "name") or chip.name
        if name == "ina3221":
            for channel in _INA3221_CHANNELS:
                label = _text(chip / f"in{channel}_label")
                millivolts, milliamperes = (
                    _number(chip / f"{quantity}{channel}_input") for quantity in ("in", "curr")
                )
                if label and label != "NC" and millivolts is not None and milliamperes is not None:
                    yield label, round(millivolts * milliamperes / 1000.0, 1)
            continue
        for sensor in sorted(chip.glob("power*_input")):
            microwatts = _number(sensor)
            if microwatts is not None:
                label = _text(chip / sensor.name.replace("_input", "_label"))
                yield label or f"{name} {sensor.name.removesuffix('_input')}", round(microwatts / 1000.0, 1)


def _family(root: Path, pid: int) -> list[int]:
    """The process and all that it started, and they; itself alone where the kernel does not tell."""
    family = [pid]
    for member in family:
        for listed in sorted((root / f"proc/{member}/task").glob("*/children")):
            family += [int(child) for child in (_text(listed) or "").split() if int(child) not in family]
    return family


def _cpu_ticks(root: Path, pid: int) -> int | None:
    """User and system time of a process, in clock ticks [proc(5): fields 14 and 15]."""
    stat = _text(root / f"proc/{pid}/stat")
    if stat is None:
        return None
    fields = stat.rpartition(")")[2].split()  # the name before may hold spaces and brackets
    return int(fields[11]) + int(fields[12]) if len(fields) > 12 else None


def _memory_bytes(root: Path, processes: list[int]) -> int | None:
    """Resident memory: every process's own, and once what they share (frames, libraries)."""
    own_kib, shared_kib = 0, 0
    for pid in processes:
        status = _text(root / f"proc/{pid}/status")
        if status is not None:
            sizes = {key: int(kib) for key, kib in re.findall(r"^(Rss\w+):\s+(\d+) kB", status, re.M)}
            own_kib += sizes.get("RssAnon", 0)
            shared_kib = max(shared_kib, sizes.get("RssFile", 0) + sizes.get("RssShmem", 0))
    return (own_kib + shared_kib) * _KIB or None


def _numbered(folder: Path, prefix: str) -> list[Path]:
    """The entries ``prefixN`` of a folder, by N."""
    try:
        entries = [entry for entry in folder.iterdir() if re.fullmatch(rf"{prefix}\d+", entry.name)]
    except OSError:
        return []
    return sorted(entries, key=lambda entry: int(entry.name.removeprefix(prefix)))


def _text(path: Path) -> str | None:
    """The file's text; ``None`` where it is missing, closed to us, or its device does not answer."""
    try:
        return path.read_text(encoding="utf-8", errors="replace").strip().strip("\0")
    except OSError:
        return None


def _number(path: Path) -> float | None:
    try:
        return float(_text(path) or "")
    except ValueError:
        return None
