"""Identity of the CPU an engine is compiled for and runs on."""

from __future__ import annotations

import functools
import platform
from dataclasses import dataclass
from pathlib import Path

from pipeline.artifacts import Fingerprint

__all__ = ["CpuIdentity", "cpu_identity", "int8_isa", "make_fingerprint", "parse_cpuinfo"]

# Instruction sets that change which kernels an engine picks: kernel's name → ours.
_X86_ISA = {
    "avx2": "avx2",
    "avx_vnni": "avx_vnni",
    "avx512f": "avx512f",
    "avx512_vnni": "avx512_vnni",
    "avx512_bf16": "avx512_bf16",
    "avx512_fp16": "avx512_fp16",
    "amx_bf16": "amx_bf16",
    "amx_int8": "amx_int8",
}
_ARM_ISA = {
    "asimd": "neon",
    "asimdhp": "fp16",
    "asimddp": "dotprod",
    "i8mm": "i8mm",
    "bf16": "bf16",
    "sve": "sve",
    "sve2": "sve2",
}
# Instructions made for int8 dot products, best first, in words.
_INT8_ISA = {
    "amx_int8": "AMX int8",
    "avx512_vnni": "AVX-512 VNNI",
    "avx_vnni": "AVX VNNI",
    "i8mm": "Arm i8mm",
    "dotprod": "Arm dot product",
}


@dataclass(frozen=True, slots=True)
class CpuIdentity:
    """A CPU's model, its instruction sets (our names, sorted) and its word size's name."""

    model: str
    isa: tuple[str, ...]
    machine: str


def parse_cpuinfo(text: str, machine: str) -> CpuIdentity:
    """The identity of the first CPU in the text of Linux's ``/proc/cpuinfo``.

    Virtual machines give several generations the same model name, so family, model and stepping
    are part of the identity; Arm kernels give no name at all but an implementer and a part.
    """
    fields: dict[str, str] = {}
    for line in text.split("\n\n", 1)[0].splitlines():
        key, _, value = line.partition(":")
        fields[key.strip()] = value.strip()
    if "flags" in fields:
        flags = fields["flags"].split()
        isa = {_X86_ISA[flag] for flag in flags if flag in _X86_ISA}
        numbers = "/".join(fields.get(key, "?") for key in ("cpu family", "model", "stepping"))
        model = f"{fields.get('model name', machine)} ({fields.get('vendor_id', '?')} {numbers})"
    else:
        flags = fields.get("Features", "").split()
        isa = {_ARM_ISA[flag] for flag in flags if flag in _ARM_ISA}
        keys = ("CPU implementer", "CPU part", "CPU variant", "CPU revision")
        numbers = "/".join(fields.get(key, "?") for key in keys)
        model = f"{fields.get('model name', machine)} ({numbers})"
    return CpuIdentity(model=model, isa=tuple(sorted(isa)), machine=machine)


@functools.cache
def cpu_identity() -> CpuIdentity:
    """This machine's CPU. Outside Linux only its name is known, and no instruction sets."""
    try:
        text = Path("/proc/cpuinfo").read_text(encoding="utf-8", errors="replace")
    except OSError:
        name = platform.processor() or platform.machine()
        return CpuIdentity(model=name, isa=(), machine=platform.machine())
    return parse_cpuinfo(text, platform.machine())


def int8_isa(cpu: CpuIdentity) -> str | None:
    """The best int8 dot-product instructions of `cpu` in words, or ``None`` where it has none known."""
    return next((words for flag, words in _INT8_ISA.items() if flag in cpu.isa), None)


def make_fingerprint(engine: str, version: str) -> Fingerprint:
    """The fingerprint of `engine` at `version` on this machine's CPU."""
    cpu = cpu_identity()
    return Fingerprint(engine=engine, version=version, device=cpu.model, capabilities=(cpu.machine, *cpu.isa))
