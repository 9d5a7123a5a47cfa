"""trtexec's command lines and summaries: text as it prints it, and a stand-in that behaves as the binary does."""

from __future__ import annotations

import os
import stat
import sys
import time
from pathlib import Path

import pytest

from engines.tensorrt import trtexec
from engines.tensorrt.trtexec import command_line, find_trtexec, parse_summary, run_trtexec, trtexec_major
from pipeline.artifacts import TensorSpec
from pipeline.errors import EngineError, UnsupportedError, UsageError

FREE = TensorSpec("input", "uint8", ("batch", 299, 299, 3))
FIXED = TensorSpec("input", "float32", (1, 3, 224, 224))

LOG_10 = """\
&&&& RUNNING TensorRT.trtexec [TensorRT v100900] [b34] # trtexec --onnx=resnet50/model.onnx
[04/07/2025-23:59:33] [I] === Model Options ===
[04/07/2025-23:59:33] [I] Format: ONNX
[04/07/2025-23:59:46] [I] Engine built in 10.7204 sec.
[04/07/2025-23:59:50] [I] Timing trace has 2077 queries over 3.0039 s
[04/07/2025-23:59:50] [I]
[04/07/2025-23:59:50] [I] === Trace details ===
[04/07/2025-23:59:50] [I] Average on 10 runs - GPU latency: 1.4891 ms - Host latency: 1.52709 ms (enqueue 0.251123 ms)
[04/07/2025-23:59:50] [I]
[04/07/2025-23:59:50] [I] === Performance summary ===
[04/07/2025-23:59:50] [I] Throughput: 691.434 qps
[04/07/2025-23:59:50] [I] Latency: min = 1.42969 ms, max = 2.4856 ms, mean = 1.48183 ms, median = 1.43848 ms, percentile(90%) = 1.6447 ms, percentile(95%) = 1.65234 ms, percentile(99%) = 1.66162 ms
[04/07/2025-23:59:50] [I] Enqueue Time: min = 0.229492 ms, max = 0.455811 ms, mean = 0.26256 ms, median = 0.2565 ms, percentile(90%) = 0.292 ms, percentile(95%) = 0.307373 ms, percentile(99%) = 0.343262 ms
[04/07/2025-23:59:50] [I] H2D Latency: min = 0.0322266 ms, max = 0.0720215 ms, mean = 0.0356 ms, median = 0.0351562 ms, percentile(90%) = 0.038 ms, percentile(95%) = 0.039 ms, percentile(99%) = 0.046 ms
[04/07/2025-23:59:50] [I] GPU Compute Time: min = 1.38965 ms, max = 2.44226 ms, mean = 1.44207 ms, median = 1.39795 ms, percentile(90%) = 1.60669 ms, percentile(95%) = 1.61279 ms, percentile(99%) = 1.62201 ms
[04/07/2025-23:59:50] [I] D2H Latency: min = 0.00292969 ms, max = 0.0144043 ms, mean = 0.0041 ms, median = 0.00390625 ms, percentile(90%) = 0.005 ms, percentile(95%) = 0.0051 ms, percentile(99%) = 0.007 ms
[04/07/2025-23:59:50] [I] Total Host Walltime: 3.0039 s
[04/07/2025-23:59:50] [I] Total GPU Compute Time: 2.99518 s
[04/07/2025-23:59:50] [W] * GPU compute time is unstable, with coefficient of variance = 5.46%.
[04/07/2025-23:59:50] [W]   If not already in use, locking GPU clock frequency or adding --useSpinWait may improve the stability.
[04/07/2025-23:59:50] [I] Explanations of the performance metrics are printed in the verbose logs.
[04/07/2025-23:59:50] [V] Latency: the summation of H2D Latency, GPU Compute Time, and D2H Latency.
&&&& PASSED TensorRT.trtexec [TensorRT v100900] [b34] # trtexec --onnx=resnet50/model.onnx
"""
"""Lines and figures as in public logs of 10.x; the form is that of sampleReporting.cpp, also of 11.4."""

LOG_11 = """\
&&&& RUNNING TensorRT.trtexec [TensorRT v110401] [b12] # trtexec --loadEngine=engine.plan --percentile=99
[I] === Performance summary ===
[I] Throughput: 2890.11 qps
[I] Latency: min = 0.332975 ms, max = 0.597011 ms, mean = 0.346 ms, median = 0.345894 ms, percentile(99%) = 0.354464 ms
[I] Enqueue Time: min = 0.004 ms, max = 0.03 ms, mean = 0.0061 ms, median = 0.006 ms, percentile(99%) = 0.01 ms
[I] H2D Latency: min = 0 ms, max = 0 ms, mean = 0 ms, median = 0 ms, percentile(99%) = 0 ms
[I] GPU Compute Time: min = 0.332975 ms, max = 0.597011 ms, mean = 0.346 ms, median = 0.345894 ms, percentile(99%) = 0.354464 ms
[I] D2H Latency: min = 0 ms, max = 0 ms, mean = 0 ms, median = 0 ms, percentile(99%) = 0 ms
[I] Total Host Walltime: 3.001 s
"""


def test_ten_needs_switches_for_what_eleven_does_by_itself() -> None:
    shared = {"onnx": Path("model.onnx"), "inputs": [FREE], "batch": 4, "seconds": 5.0}
    assert command_line(major=10, **shared) == [
        "trtexec",
        "--onnx=model.onnx",
        "--stronglyTyped",
        "--shapes=input:4x299x299x3",
        "--useCudaGraph",
        "--useSpinWait",
        "--noDataTransfers",
        "--duration=5",
        "--percentile=50,95,99",
    ]
    assert command_line(major=11, **shared) == [
        "trtexec",
        "--onnx=model.onnx",
        "--shapes=input:4x299x299x3",
        "--duration=5",
        "--percentile=50,95,99",
    ]


def test_copies_are_switched_the_other_way_round() -> None:
    ten = command_line(major=10, plan=Path("e.plan"), transfers=True)
    eleven = command_line(major=11, plan=Path("e.plan"), transfers=True)
    assert "--noDataTransfers" not in ten
    assert {"--useCudaGraph", "--useSpinWait"} <= set(ten)
    assert "--includeDataTransfers" in eleven
    assert ten[1] == eleven[1] == "--loadEngine=e.plan"
    assert "--stronglyTyped" not in ten, "a plan has its types"


def test_eleven_gets_no_switch_it_ignores_or_lost() -> None:
    for transfers in (False, True):
        given = command_line(major=11, onnx=Path("m.onnx"), inputs=[FREE], transfers=transfers)
        names = {argument.split("=")[0] for argument in given}
        lost = {"--noDataTransfers", "--useCudaGraph", "--useSpinWait", "--stronglyTyped", "--fp16", "--int8"}
        assert not names & lost


def test_a_fixed_input_gets_no_shape() -> None:
    assert not any(
        part.startswith("--shapes") for part in command_line(major=10, onnx=Path("m"), inputs=[FIXED])
    )


def test_dla_core_with_fallback() -> None:
    given = command_line(major=10, onnx=Path("m.onnx"), dla_core=1)
    assert {"--useDLACore=1", "--allowGPUFallback"} <= set(given)


@pytest.mark.parametrize(
    ("options", "error", "words"),
    [
        ({"major": 9, "onnx": Path("m")}, UnsupportedError, "trtexec 9"),
        ({"major": 10}, UsageError, "one of them"),
        ({"major": 10, "onnx": Path("m"), "plan": Path("p")}, UsageError, "one of them"),
        (
            {"major": 10, "onnx": Path("m"), "inputs": [TensorSpec("x", "uint8", ("n", "h", 3))]},
            UsageError,
            r"'x' has free dimensions \['h'\]",
        ),
        (
            {"major": 10, "onnx": Path("m"), "inputs": [TensorSpec("in:0", "uint8", ("n", 3))]},
            UsageError,
            "'in:0' does not fit",
        ),
    ],
)
def test_what_has_no_command_line(options, error, words) -> None:
    with pytest.raises(error, match=words):
        command_line(**options)


def test_summary_of_ten() -> None:
    summary = parse_summary(LOG_10)
    assert summary.version == "10.9.0"
    assert summary.queries_per_s == 691.434
    assert (summary.latency.min_ms, summary.latency.max_ms) == (1.42969, 2.4856)
    assert (summary.latency.mean_ms, summary.latency.median_ms) == (1.48183, 1.43848)
    assert summary.latency.percentiles_ms == {90: 1.6447, 95: 1.65234, 99: 1.66162}
    assert summary.gpu_compute.median_ms == 1.39795
    assert summary.h2d.median_ms == 0.0351562
    assert summary.d2h.percentiles_ms[99] == 0.007
    assert summary.enqueue.max_ms == 0.455811
    (warning,) = summary.warnings
    assert warning.startswith("GPU compute time is unstable")
    assert warning.endswith("may improve the stability.")


def test_summary_of_eleven_without_stamps_and_copies() -> None:
    summary = parse_summary(LOG_11)
    assert summary.version == "11.4.1"
    assert summary.latency == summary.gpu_compute
    assert summary.h2d.max_ms == 0
    assert summary.latency.percentiles_ms == {99: 0.354464}
    assert summary.warnings == ()


@pytest.mark.parametrize(
    ("banner", "version"),
    [
        ("[TensorRT v100300]", "10.3.0"),
        ("[TensorRT v101602]", "10.16.2"),
        ("[TensorRT v110401] [b12]", "11.4.1"),
        ("[TensorRT v11.1.0.106]", "11.1.0"),
        ("[TensorRT v8502]", "8.5.2"),
    ],
)
def test_versions_as_the_banner_writes_them(banner, version) -> None:
    assert parse_summary(LOG_11.replace("[TensorRT v110401] [b12]", banner)).version == version


def test_a_summary_that_cannot_be_read_is_named() -> None:
    with pytest.raises(EngineError, match=r"no performance summary; it ended with: .*Engine built"):
        parse_summary(LOG_10[: LOG_10.index("[04/07/2025-23:59:50]")])
    with pytest.raises(EngineError, match="no 'GPU Compute Time' line"):
        parse_summary(LOG_11.replace("GPU Compute Time", "GPU Time"))
    with pytest.raises(EngineError, match="has no median"):
        parse_summary(LOG_11.replace(", median = 0.345894 ms", ""))
    with pytest.raises(EngineError, match="cannot be read"):
        parse_summary(LOG_11.replace("2890.11 qps", "many qps"))
    with pytest.raises(EngineError, match="nothing was printed"):
        parse_summary("")


def _fake(folder: Path, body: str) -> Path:
    """An executable that is called trtexec."""
    folder.mkdir(exist_ok=True)
    path = folder / "trtexec"
    path.write_text(f"#!{sys.executable}\nimport sys, time\n{body}\n")
    path.chmod(path.stat().st_mode | stat.S_IXUSR)
    return path


def test_running_it(tmp_path) -> None:
    fake = _fake(tmp_path / "a b; rm", f"assert sys.argv[1] == '--loadEngine=my plan'\nprint({LOG_11!r})")
    summary = run_trtexec([str(fake), "--loadEngine=my plan"], timeout_s=30)
    assert summary.queries_per_s == 2890.11


def test_a_failing_run_has_its_errors_in_the_message(tmp_path) -> None:
    fake = _fake(
        tmp_path,
        "print('[I] fine'); print('[E] [TRT] no kernel for x', file=sys.stderr); print('bye'); sys.exit(1)",
    )
    with pytest.raises(EngineError, match=r"exit code 1: \[E\] \[TRT\] no kernel for x; ran: .*trtexec"):
        run_trtexec([str(fake)], timeout_s=30)


def test_a_hung_run_is_stopped(tmp_path) -> None:
    began = time.monotonic()
    with pytest.raises(EngineError, match=r"did not end within 0\.5 s"):
        run_trtexec([str(_fake(tmp_path, "time.sleep(60)"))], timeout_s=0.5)
    assert time.monotonic() - began < 20


def test_a_binary_that_cannot_run(tmp_path) -> None:
    with pytest.raises(EngineError, match="cannot be run"):
        run_trtexec([str(tmp_path / "absent")], timeout_s=5)


def test_its_version(tmp_path) -> None:
    help_text = "&&&& RUNNING TensorRT.trtexec [TensorRT v100300] [b17] # trtexec --help"
    assert trtexec_major(_fake(tmp_path, f"print({help_text!r})")) == 10
    with pytest.raises(UnsupportedError, match="says no TensorRT version"):
        trtexec_major(_fake(tmp_path, "print('hello')"))


def test_where_it_is_looked_for(tmp_path, monkeypatch) -> None:
    monkeypatch.setattr(trtexec, "_PLACES", (str(tmp_path / "src"),))
    monkeypatch.setenv("PATH", str(tmp_path / "nowhere"))
    with pytest.raises(UnsupportedError, match=r"libnvinfer-bin.*--trtexec print"):
        find_trtexec()
    packaged = _fake(tmp_path / "src", "")
    assert find_trtexec() == packaged
    on_path = _fake(tmp_path / "bin", "")
    monkeypatch.setenv("PATH", f"{tmp_path / 'bin'}{os.pathsep}/usr/bin")
    assert find_trtexec() == on_path
