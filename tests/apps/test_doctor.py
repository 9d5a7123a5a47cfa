from __future__ import annotations

import json
import subprocess
import sys

import pytest
import typer
from typer.testing import CliRunner

import apps.doctor as doctor
from apps.doctor import build_feature, diagnose, doctor_command, jetpack_release
from pipeline.errors import EngineError, UnsupportedError

OPENCV_WHEEL = """
  Video I/O:
    FFMPEG:                      YES
      avcodec:                   YES (62.28.101)
    GStreamer:                   NO
    v4l/v4l2:                    YES (linux/videodev2.h)
"""
OPENCV_JETPACK = OPENCV_WHEEL.replace(
    "GStreamer:                   NO", "GStreamer:                   YES (1.20.3)"
)


def _by_name(findings):
    return {finding.name: finding for finding in findings}


def test_says_what_this_machine_has():
    findings = diagnose()
    areas = list(dict.fromkeys(finding.area for finding in findings))
    assert areas == [
        "engines",
        "cpu",
        "opencv",
        "display",
        "extra: build",
        "extra: av",
        "extra: report",
        "extra: serve",
        "extra: mqtt",
        "gpu",
        "tensorrt",
        "jetson",
    ]
    found = _by_name(findings)
    assert found["openvino"].present
    assert "ran a test graph" in found["openvino"].detail
    assert all(finding.detail for finding in findings)
    assert [f.name for f in findings if not f.present and not f.needs and f.area != "cpu"] == []


def _run(*arguments: str):
    app = typer.Typer()
    app.command()(doctor_command)
    return CliRunner().invoke(app, list(arguments))


def test_json_goes_to_standard_output_alone():
    result = _run("--json")
    assert result.exit_code == 0
    findings = json.loads(result.stdout)
    assert {"area", "name", "present", "detail", "needs"} == set(findings[0])


def test_no_engine_at_all_is_exit_4(monkeypatch):
    def broken(name: str) -> None:
        raise EngineError(f"{name} computes a wrong convolution here")

    monkeypatch.setattr(doctor, "_self_test", broken)
    result = _run("--json")
    assert isinstance(result.exception, UnsupportedError)
    assert result.exception.exit_code == 4
    engines = [finding for finding in json.loads(result.stdout) if finding["area"] == "engines"]
    assert engines
    assert not any(finding["present"] for finding in engines)
    assert all(finding["needs"] for finding in engines)
    assert "pip install openvino" in next(f["needs"] for f in engines if f["name"] == "openvino")


def test_one_engine_of_two_is_enough(monkeypatch):
    original = doctor._self_test

    def one(name: str) -> None:
        if name == "onnxruntime":
            raise EngineError("broken")
        original(name)

    monkeypatch.setattr(doctor, "_self_test", one)
    result = _run("--json")
    assert result.exit_code == 0
    assert not _by_name(doctor._engines())["onnxruntime"].present


def test_self_test_finds_a_wrong_result(monkeypatch):
    from engines.openvino import OpenVinoRunner

    original = OpenVinoRunner._infer
    monkeypatch.setattr(
        OpenVinoRunner, "_infer", lambda self, arrays: [1.01 * y for y in original(self, arrays)]
    )
    found = _by_name(doctor._engines())["openvino"]
    assert not found.present
    assert "wrong convolution" in found.detail


def test_missing_opencv_says_both_ways_to_get_it(monkeypatch):
    monkeypatch.setitem(sys.modules, "cv2", None)
    (found,) = doctor._opencv()
    assert not found.present
    assert "edgefold[opencv]" in found.needs
    assert "python3-opencv" in found.needs


@pytest.mark.parametrize(
    ("text", "name", "expected"),
    [
        (OPENCV_WHEEL, "FFMPEG", "YES"),
        (OPENCV_WHEEL, "GStreamer", None),
        (OPENCV_WHEEL, "v4l/v4l2", "YES (linux/videodev2.h)"),
        (OPENCV_JETPACK, "GStreamer", "YES (1.20.3)"),
        ("", "GStreamer", None),
    ],
)
def test_opencv_back_ends_are_read_from_its_build_information(text, name, expected):
    assert build_feature(text, name) == expected


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("# R36 (release), REVISION: 4.3, GCID: 38968081, BOARD: generic", "JetPack 6 (L4T 36.4.3)"),
        ("# R38 (release), REVISION: 2.0, GCID: 1", "JetPack 7 (L4T 38.2.0)"),
        ("# R99 (release), REVISION: 1.0", "L4T 99.1.0"),
        ("", None),
    ],
)
def test_jetpack_from_the_release_file(text, expected):
    assert jetpack_release(text) == expected


def test_gpu_from_nvidia_smi(monkeypatch):
    answer = subprocess.CompletedProcess([], 0, stdout="NVIDIA L4, 570.1, 23034 MiB\n", stderr="")
    monkeypatch.setattr(doctor.shutil, "which", lambda _: "/usr/bin/nvidia-smi")
    monkeypatch.setattr(doctor.subprocess, "run", lambda *_a, **_k: answer)
    (found,) = doctor._gpu()
    assert found.present
    assert found.detail.startswith("NVIDIA L4")


def test_a_hanging_nvidia_smi_is_reported(monkeypatch):
    def hang(*_a: object, **_k: object) -> None:
        raise subprocess.TimeoutExpired("nvidia-smi", 20)

    monkeypatch.setattr(doctor.shutil, "which", lambda _: "/usr/bin/nvidia-smi")
    monkeypatch.setattr(doctor.subprocess, "run", hang)
    (found,) = doctor._gpu()
    assert not found.present
    assert "does not answer" in found.detail


def test_gpu_without_nvidia_smi_asks_the_driver_library(monkeypatch):
    monkeypatch.setattr(doctor.shutil, "which", lambda _: None)
    monkeypatch.setattr(doctor, "_cuda_driver_version", lambda: "12.6")
    (found,) = doctor._gpu()
    assert (found.present, found.detail) == (True, "driver library for CUDA 12.6")
    monkeypatch.setattr(doctor, "_cuda_driver_version", lambda: None)
    (found,) = doctor._gpu()
    assert not found.present


def test_imports_no_torch():
    code = "import sys, apps.doctor; apps.doctor.diagnose(); sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
