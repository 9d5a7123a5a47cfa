"""The power mode that a latency was measured in: without it the figure of a Jetson says little.

``/var/lib/nvpmodel/status`` (``pmode:0002``), which nvpmodel writes, has the number of the mode, and
``/etc/nvpmodel.conf`` (``< POWER_MODEL ID=2 NAME=MODE_30W >``) its name; both can be read without root. Where they are
missing, ``nvpmodel -q`` is asked (``NV Power Mode: MODE_30W``). [NVIDIA Jetson Linux Developer Guide, "Power Mode
Controls"] Elsewhere the frequency governor stands for it.
"""

from __future__ import annotations

import re
import shutil
import subprocess
from functools import cache
from pathlib import Path

__all__ = ["read_power_mode"]

_NVPMODEL_TIMEOUT_S = 5.0


def read_power_mode(root: Path = Path("/")) -> str | None:
    """A Jetson's power mode by name, elsewhere the governor of the first CPU; ``None`` where neither is told.

    A latency means little without it: the same Jetson is several times faster in its highest mode than in its lowest.
    """
    number = re.search(r"pmode:0*(\d+)", _text(root / "var/lib/nvpmodel/status") or "")
    if number:
        pattern = rf"<\s*POWER_MODEL\s+ID=0*{number[1]}\s+NAME=([^\s>]+)"
        named = re.search(pattern, _text(root / "etc/nvpmodel.conf") or "")
        return named[1] if named else f"mode {number[1]}"
    if root == Path("/"):
        asked = _ask_nvpmodel()
        if asked is not None:
            return asked
    governor = _text(root / "sys/devices/system/cpu/cpu0/cpufreq/scaling_governor")
    return f"governor {governor}" if governor else None


@cache
def _ask_nvpmodel() -> str | None:
    """``nvpmodel -q``, once: it takes a second, and without its status file the mode has not been changed."""
    program = shutil.which("nvpmodel")
    if program is None:
        return None
    try:
        done = subprocess.run(
            [program, "-q"], capture_output=True, text=True, timeout=_NVPMODEL_TIMEOUT_S, check=False
        )
    except (OSError, subprocess.SubprocessError):
        return None
    named = re.search(r"NV Power Mode:\s*(\S+)", done.stdout)
    return named[1] if named else None


def _text(path: Path) -> str | None:
    try:
        return path.read_text(encoding="utf-8", errors="replace").strip()
    except OSError:
        return None
