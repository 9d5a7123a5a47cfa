"""What cannot be run is refused at the start: the exit code, the words, and nothing left behind."""

from __future__ import annotations

import json
import shutil
import socket
import subprocess
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from live_app import COMMAND, environment
from PIL import Image

from apps.cli import main
from benchmarks.mjpeg_camera import MjpegCamera

RED = (220, 40, 40)
Command = Callable[..., tuple[int, str, str]]


@pytest.fixture
def command(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Command:
    """`edgefold stream` in this process: exit status, standard output, standard error."""
    monkeypatch.setenv("EDGEFOLD_CACHE", str(tmp_path / "cache"))
    monkeypatch.setenv("COLUMNS", "1000")

    def run(*arguments: object) -> tuple[int, str, str]:
        with pytest.raises(SystemExit) as stop:
            main(["stream", *map(str, arguments), "--headless"])
        said = capsys.readouterr()
        return int(stop.value.code or 0), said.out, said.err

    return run


def flip_a_bit(content: bytes) -> bytes:
    middle = len(content) // 2
    return content[:middle] + bytes([content[middle] ^ 1]) + content[middle + 1 :]


@pytest.mark.parametrize("damage", [flip_a_bit, lambda content: content[:-40], lambda content: b""])
def test_an_engine_that_was_altered(
    damage: Callable[[bytes], bytes], bundle: Path, command: Command, tmp_path: Path
) -> None:
    shutil.copytree(bundle, tmp_path / "bundle")
    engine = tmp_path / "bundle" / "model.int8.onnx"
    engine.write_bytes(damage(engine.read_bytes()))
    status, _, said = command(tmp_path / "bundle", "--source", "synthetic:3:2")
    assert status == 5
    assert "model.int8.onnx" in said
    assert "build" in said  # the remedy


def test_the_engine_of_another_bundle(
    bundle: Path, make_bundle: Callable[..., Path], command: Command, tmp_path: Path
) -> None:
    """A whole graph, which would load and answer."""
    graph = """
    <ir_version: 10, opset_import: ["" : 18]>
    other (uint8[batch, 16, 16, 3] input) => (float[batch, 3] logits) {
        pixels = Cast <to = 1> (input)
        axes = Constant <value = int64[2] {1, 2}> ()
        logits = ReduceMax <keepdims = 0> (pixels, axes)
    }
    """
    other = make_bundle(tmp_path / "other", graph)
    shutil.copytree(bundle, tmp_path / "bundle")
    shutil.copy(other / "model.int8.onnx", tmp_path / "bundle" / "model.int8.onnx")
    status, _, said = command(tmp_path / "bundle", "--source", "synthetic:3:2")
    assert (status, "model.int8.onnx" in said) == (5, True)


def test_a_class_count_that_is_not_the_labels(
    make_bundle: Callable[..., Path], command: Command, tmp_path: Path
) -> None:
    status, _, said = command(make_bundle(tmp_path / "bundle", num_classes=4), "--source", "synthetic:3:2")
    assert (status, "3 labels for 4 classes" in said) == (5, True)


def test_a_bundle_without_labels_runs_and_says_so(
    make_bundle: Callable[..., Path], command: Command, tmp_path: Path
) -> None:
    bundle = make_bundle(tmp_path / "bundle", labels=(), num_classes=3)
    status, printed, _ = command(bundle, "--source", "synthetic:3:4", "--json")
    assert status == 0
    summary = json.loads(printed)
    assert summary["frames_inferred"] == 4
    assert any("names no classes" in note for note in summary["notes"])


def test_a_key_that_does_not_exist(bundle: Path, command: Command, tmp_path: Path) -> None:
    config = tmp_path / "cameras.toml"
    config.write_text(f'bundle = "{bundle}"\n\n[[source]]\nuri = "synthetic:1:3"\nplicy = "every"\n')
    status, _, said = command("--config", config)
    assert status == 2
    assert "line 5" in said
    assert "did you mean 'policy'" in said


@pytest.mark.parametrize(
    "pipeline",
    [
        "videotestsrc num-buffers=3 ! filesink location={path}",
        "videotestsrc num-buffers=3 ! tee name=t t. ! queue ! filesink location={path}",
        "videotestsrc num-buffers=3 ! video/x-raw,format=BGR ! appsink filesink location={path}",
        "filesrc location=/etc/passwd ! fdsink",
        "videotestsrc ! multifilesink location={path}",
    ],
)
def test_a_pipeline_that_would_inject_elements(
    pipeline: str, bundle: Path, command: Command, tmp_path: Path
) -> None:
    status, _, said = command(bundle, "--source", "gst:" + pipeline.format(path=tmp_path / "written"))
    assert status == 2, said
    assert not (tmp_path / "written").exists()


def test_a_source_of_sound_alone(bundle: Path, tmp_path: Path) -> None:
    """Not a fault of a device, for which a supervisor would start the app again and again."""
    camera = MjpegCamera()
    camera.behaviour = "audio"
    try:
        done = subprocess.run(
            [*COMMAND, str(bundle), "--source", camera.url],
            env=environment(tmp_path),
            capture_output=True,
            text=True,
            timeout=60,
            check=False,
        )
    finally:
        camera.close()
    assert (done.returncode, "audio only" in done.stderr) == (2, True), done.stderr


def test_a_port_in_use(bundle: Path, command: Command) -> None:
    with socket.create_server(("127.0.0.1", 0)) as other:
        port = other.getsockname()[1]
        status, _, said = command(bundle, "--source", "synthetic:3:2", "--serve", port)
    assert (status, str(port) in said) == (2, True), said


def test_a_folder_with_a_corrupt_file_and_odd_pictures(
    bundle: Path, command: Command, tmp_path: Path
) -> None:
    """Gray, transparent and 16-bit files among those of three channels: converted, or named and left out."""
    folder = tmp_path / "pictures"
    folder.mkdir()
    red = np.full((20, 30, 3), RED, np.uint8)
    Image.fromarray(red).save(folder / "a.png")
    Image.fromarray(np.dstack([red, np.full((20, 30), 128, np.uint8)])).save(folder / "b.png")
    Image.fromarray(red[:, :, 0]).save(folder / "c.png")
    Image.fromarray(np.full((20, 30), 40_000, np.uint16)).save(folder / "d.png")
    (folder / "e.png").write_bytes((folder / "a.png").read_bytes()[:60])
    (folder / "f.png").write_bytes(b"")
    log = tmp_path / "predictions.jsonl"
    status, printed, said = command(bundle, "--source", folder, "--predictions", log, "--json")
    assert status == 0, said
    summary = json.loads(printed)
    assert summary["frames_read"] == 6
    lines = [json.loads(line) for line in log.read_text().splitlines()]
    best = {line["frame"]: line["top"][0] for line in lines}
    assert list(best) == [0, 1, 2, 3]  # and 4 and 5 are no pictures
    assert [best[index]["label"] for index in (0, 1)] == ["red", "red"]
    assert [round(best[index]["confidence"], 4) for index in (2, 3)] == [0.3333, 0.3333]  # all channels alike
    assert summary["dropped"] == {"no image": 2}
    assert all(any(name in note for note in summary["notes"]) for name in ("e.png", "f.png"))
