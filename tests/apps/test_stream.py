"""`edgefold stream` as a process: exit codes, signals, what is left on disk, what is imported."""

from __future__ import annotations

import importlib.util
import json
import os
import resource
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from types import ModuleType

import cv2
import pytest
from waiting import PATIENCE_S, SLACK_S

from apps.cli import main

EDGEFOLD = [sys.executable, "-c", "from apps.cli import main; main()", "stream"]


def load_parts() -> ModuleType:
    spec = importlib.util.spec_from_file_location(
        "streaming_parts", Path(__file__).parent / "streaming" / "conftest.py"
    )
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def bundle(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path: Path = load_parts().write_bundle(tmp_path_factory.mktemp("bundles") / "mean-color")
    return path


def environment(tmp_path: Path) -> dict[str, str]:
    kept = {key: value for key, value in os.environ.items() if key not in ("DISPLAY", "WAYLAND_DISPLAY")}
    return {**kept, "EDGEFOLD_CACHE": str(tmp_path / "cache"), "OMP_NUM_THREADS": "2"}


def run(tmp_path: Path, *arguments: object, **options: object) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [*EDGEFOLD, *map(str, arguments)],
        capture_output=True,
        text=True,
        timeout=2 * PATIENCE_S,
        check=False,
        env=environment(tmp_path),
        **options,  # type: ignore[call-overload]
    )


def start(tmp_path: Path, *arguments: object, program: str | None = None) -> subprocess.Popen[str]:
    command = EDGEFOLD if program is None else [sys.executable, "-c", program, "stream"]
    return subprocess.Popen(
        [*command, *map(str, arguments)],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env=environment(tmp_path),
    )


def wait_for(
    condition: Callable[[], bool], process: subprocess.Popen[str], seconds: float = PATIENCE_S
) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        if process.poll() is not None or time.monotonic() > deadline:
            process.kill()
            pytest.fail(f"the stream did not get going: {process.communicate()}")
        time.sleep(0.02)


def n_lines(path: Path) -> int:
    return path.read_text().count("\n") if path.exists() else 0


def n_playable(path: Path) -> int:
    video = cv2.VideoCapture(str(path))
    n = 0
    while video.read()[0]:
        n += 1
    return n


def test_the_end_of_the_source_is_success(bundle: Path, tmp_path: Path) -> None:
    result = run(tmp_path, bundle, "--source", "synthetic:3:12", "--json")
    assert result.returncode == 0, result.stderr
    summary = json.loads(result.stdout)  # and nothing else on standard output
    assert (summary["frames_inferred"], summary["ended"]) == (12, "end of source")
    assert "no window: no display" in summary["notes"]  # headless by itself


def test_a_person_gets_lines_and_a_summary(bundle: Path, tmp_path: Path) -> None:
    result = run(tmp_path, bundle, "--source", "synthetic:3", "--max-seconds", "2.5", "--headless")
    assert result.returncode == 0, result.stderr
    assert result.stdout == ""
    assert "age p50/p95/p99" in result.stderr
    assert "ended by time limit" in result.stderr
    assert "Traceback" not in result.stderr


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_ends_cleanly_and_the_recording_plays(
    bundle: Path, tmp_path: Path, number: signal.Signals
) -> None:
    record, log = tmp_path / "out.mp4", tmp_path / "out.jsonl"
    process = start(
        tmp_path, bundle, "--source", "synthetic:3", "--record", record, "--predictions", log, "--json"
    )
    wait_for(lambda: n_lines(log) >= 10, process)
    process.send_signal(number)
    stdout, stderr = process.communicate(timeout=PATIENCE_S)
    assert process.returncode == 0, stderr
    summary = json.loads(stdout)
    assert summary["ended"] == number.name
    assert summary["frames_inferred"] == n_lines(log)
    assert n_playable(record) >= 10
    assert {path.name for path in tmp_path.iterdir()} == {"out.mp4", "out.jsonl", "cache"}


def test_a_second_signal_ends_at_once(bundle: Path, tmp_path: Path) -> None:
    program = """
import time
from apps.streaming.outputs import SourceOutput
take = SourceOutput.take
def slow(self, answer):
    take(self, answer)
    if answer.frame.index == 3:
        time.sleep(30)  # a disk that hangs, say
SourceOutput.take = slow
from apps.cli import main
main()
"""
    log = tmp_path / "out.jsonl"
    process = start(tmp_path, bundle, "--source", "synthetic:3", "--predictions", log, program=program)
    wait_for(lambda: n_lines(log) >= 4, process)
    process.send_signal(signal.SIGTERM)
    time.sleep(0.5)
    assert process.poll() is None
    sent = time.monotonic()
    process.send_signal(signal.SIGTERM)
    process.communicate(timeout=PATIENCE_S)
    assert process.returncode == 128 + signal.SIGTERM
    assert time.monotonic() - sent < 2 + SLACK_S  # and not 30


def test_a_kill_leaves_the_earlier_recording(bundle: Path, tmp_path: Path) -> None:
    record, log = tmp_path / "out.mp4", tmp_path / "out.jsonl"
    record.write_bytes(b"earlier")
    arguments = (bundle, "--source", "synthetic:3", "--record", record, "--predictions", log)
    process = start(tmp_path, *arguments)
    wait_for(lambda: n_lines(log) >= 5, process)
    process.kill()
    process.communicate(timeout=PATIENCE_S)
    assert record.read_bytes() == b"earlier"
    result = run(tmp_path, *arguments, "--max-frames", "20")  # and the next run cleans up
    assert result.returncode == 0, result.stderr
    assert n_playable(record) >= 5  # by time: of two frames in one 30th of a second, the later is kept
    assert {path.name for path in tmp_path.iterdir()} == {"out.mp4", "out.jsonl", "cache"}


def test_a_recording_that_does_not_fit_fails_and_leaves_nothing(bundle: Path, tmp_path: Path) -> None:
    result = run(
        tmp_path,
        bundle,
        *("--source", "synthetic:3:30", "--record", tmp_path / "out.mp4"),
        preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (50_000, 50_000)),
    )
    assert result.returncode == 1
    assert "is not whole" in result.stderr
    assert not list(tmp_path.glob("*.mp4")) + list(tmp_path.glob(".*.mp4"))


@pytest.mark.parametrize(
    ("source", "code", "message"),
    [
        ("synthetic:x", 2, "not synthetic:SEED"),
        ("/no/such/film.mp4", 2, "no such file or folder"),
        ("rtmp://camera/1", 2, "unknown source scheme"),
        ("/dev/video97", 4, "no such device"),
    ],
)
def test_exit_codes(
    bundle: Path, source: str, code: int, message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as stop:
        main(["stream", str(bundle), "--source", source])
    assert stop.value.code == code
    assert message in capsys.readouterr().err


def test_an_altered_bundle_exits_5(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = load_parts().write_bundle(tmp_path / "altered")
    with (path / "model.int8.onnx").open("ab") as file:
        file.write(b"x")
    with pytest.raises(SystemExit) as stop:
        main(["stream", str(path), "--source", "synthetic:3:2"])
    assert stop.value.code == 5
    assert "model.int8.onnx" in capsys.readouterr().err


def test_a_stream_needs_no_torch_and_imports_fast(bundle: Path, tmp_path: Path) -> None:
    # Processor time: imports run in one thread, and how busy the machine is says nothing about them.
    program = f"""
import sys, time
start = time.process_time()
import apps.cli, apps.stream, cv2, engines
engines.get_backend("openvino")
print(time.process_time() - start)
from pathlib import Path
from apps.streaming.config import SourceConfig, StreamConfig
config = StreamConfig(Path({str(bundle)!r}), (SourceConfig("synthetic:3:2"),), headless=True)
apps.stream.run_stream(config)
print(sorted({{"torch", "matplotlib", "torchvision", "timm", "onnxruntime", "scipy"}} & set(sys.modules)))
"""
    result = subprocess.run(
        [sys.executable, "-c", program],
        capture_output=True,
        text=True,
        check=True,
        env=environment(tmp_path),
    )
    seconds, loaded = result.stdout.splitlines()
    assert loaded == "[]"
    assert float(seconds) < 3.0  # with PyTorch it is more; processor time doubles where two share a core
