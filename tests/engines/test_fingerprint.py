from __future__ import annotations

import dataclasses

from engines.fingerprint import cpu_identity, int8_isa, make_fingerprint, parse_cpuinfo

XEON = """processor\t: 0
vendor_id\t: GenuineIntel
cpu family\t: 6
model\t\t: 143
model name\t: Intel(R) Xeon(R) Platinum 8481C CPU
stepping\t: 8
flags\t\t: fpu sse4_2 avx2 fma avx512f avx512_vnni avx512_bf16 amx_bf16 amx_tile amx_int8

processor\t: 1
flags\t\t: fpu
"""
ORIN = """processor\t: 0
BogoMIPS\t: 62.50
Features\t: fp asimd evtstrm aes crc32 atomics fphp asimdhp cpuid asimdrdm lrcpc dcpop asimddp uscat
CPU implementer\t: 0x41
CPU architecture: 8
CPU variant\t: 0x0
CPU part\t: 0xd42
CPU revision\t: 1
"""
OLD = "processor\t: 0\nmodel name\t: Atom\nvendor_id\t: GenuineIntel\nflags\t\t: sse4_2\n"


def test_x86():
    cpu = parse_cpuinfo(XEON, "x86_64")
    assert cpu.model == "Intel(R) Xeon(R) Platinum 8481C CPU (GenuineIntel 6/143/8)"
    assert cpu.isa == ("amx_bf16", "amx_int8", "avx2", "avx512_bf16", "avx512_vnni", "avx512f")
    assert int8_isa(cpu) == "AMX int8"
    without_amx = dataclasses.replace(cpu, isa=("avx2", "avx512_vnni"))
    assert int8_isa(without_amx) == "AVX-512 VNNI"


def test_arm_has_no_name_but_numbers():
    cpu = parse_cpuinfo(ORIN, "aarch64")
    assert cpu.model == "aarch64 (0x41/0xd42/0x0/1)"
    assert cpu.isa == ("dotprod", "fp16", "neon")
    assert int8_isa(cpu) == "Arm dot product"


def test_an_old_or_unknown_cpu_has_no_int8_instructions():
    assert int8_isa(parse_cpuinfo(OLD, "x86_64")) is None
    assert parse_cpuinfo("", "riscv64").isa == ()


def test_another_stepping_is_another_device():
    assert parse_cpuinfo(XEON, "x86_64") != parse_cpuinfo(
        XEON.replace("stepping\t: 8", "stepping\t: 9"), "x86_64"
    )


def test_fingerprint_of_this_machine():
    fingerprint = make_fingerprint("openvino", "1.2")
    assert (fingerprint.engine, fingerprint.version) == ("openvino", "1.2")
    assert fingerprint.device == cpu_identity().model
    assert fingerprint.capabilities == (cpu_identity().machine, *cpu_identity().isa)
