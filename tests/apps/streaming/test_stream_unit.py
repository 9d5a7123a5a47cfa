"""The systemd unit: what it says for a configuration, and what systemd itself thinks of it."""

from __future__ import annotations

import re
import shutil
import subprocess
from collections.abc import Callable
from pathlib import Path

import pytest
from tolerances import UNIT_EXPOSURE

from apps.cli import main
from apps.streaming.config import EventConfig, RecordConfig, ServeConfig, SourceConfig, StreamConfig
from apps.streaming.unit import unit_text
from pipeline.errors import UsageError

SYSTEMD_ANALYZE = shutil.which("systemd-analyze")
needs_systemd = pytest.mark.skipif(
    SYSTEMD_ANALYZE is None, reason="systemd-analyze is not installed (Debian: systemd)"
)


def unit(*uris: str, gpu: bool = False, executable: Path = Path("/bin/true"), **options: object) -> str:
    changes = {key: options.pop(key) for key in ("events", "serve", "predictions") if key in options}
    record = options.pop("record", None)
    sources = tuple(SourceConfig(uri, record=record) for uri in uris or ("rtsp://camera/1",))  # type: ignore[arg-type]
    config = StreamConfig(Path("/srv/net.bundle"), sources, **changes)  # type: ignore[arg-type]
    return unit_text(Path("/etc/edgefold/cameras.toml"), config, executable=executable, gpu=gpu, **options)  # type: ignore[arg-type]


def values(text: str, key: str) -> list[str]:
    return re.findall(rf"^{key}=(.*)$", text, re.M)


def test_the_unit_starts_watches_and_restarts_the_app() -> None:
    text = unit(environment_file=Path("/etc/edgefold/secrets"), memory_max="2G")
    assert values(text, "Type") == ["notify"]
    assert values(text, "ExecStart") == ["/bin/true stream --config /etc/edgefold/cameras.toml --headless"]
    assert values(text, "ExecReload") == ["kill -HUP $MAINPID"]
    assert values(text, "WatchdogSec") == ["30"]
    assert values(text, "Restart") == ["on-failure"]
    assert values(text, "RestartForceExitStatus") == ["6"]
    assert values(text, "RestartPreventExitStatus") == ["2 4 5"]
    assert values(text, "EnvironmentFile") == ["/etc/edgefold/secrets"]
    assert values(text, "DynamicUser") == ["yes"]
    assert values(text, "MemoryMax") == ["2G"]
    for hardening in ("NoNewPrivileges", "PrivateTmp"):
        assert values(text, hardening) == ["yes"]
    assert values(text, "ProtectSystem") == ["strict"]
    assert not values(text, "MemoryDenyWriteExecute"), "engines compile kernels at run time"


def test_devices_are_those_that_the_configuration_uses() -> None:
    network = unit("rtsp://camera/1")
    assert values(network, "PrivateDevices") == ["yes"]
    assert not values(network, "DeviceAllow")
    local = unit("/dev/video0")
    assert values(local, "DeviceAllow") == ["char-video4linux rw", "char-media rw"]
    assert values(local, "SupplementaryGroups") == ["video"]
    assert not values(local, "PrivateDevices")
    gpu = unit("rtsp://camera/1", gpu=True)
    assert "char-nvidia* rw" in values(gpu, "DeviceAllow")
    assert "char-video4linux rw" not in values(gpu, "DeviceAllow")
    csi = unit("csi:0", gpu=True)
    assert values(csi, "BindPaths") == ["-/tmp/argus_socket"]
    assert "nvargus-daemon.service" in values(csi, "After")[0]


def test_only_what_the_configuration_writes_can_be_written() -> None:
    text = unit(
        record=RecordConfig(Path("/data/rec/gate.mp4")),
        predictions=Path("/data/p/predictions"),
        events=EventConfig(log="/var/lib/edgefold/events.jsonl"),
    )
    assert values(text, "ReadWritePaths") == ["/data/p", "/data/rec"]
    assert values(text, "StateDirectory") == ["edgefold"]


def test_a_port_below_1024_needs_the_right_to_it() -> None:
    assert values(unit(serve=ServeConfig(port=443)), "AmbientCapabilities") == ["CAP_NET_BIND_SERVICE"]
    assert values(unit(serve=ServeConfig(port=8080)), "AmbientCapabilities") == [""]


def test_what_lies_at_home_stays_readable() -> None:
    assert values(unit(), "ProtectHome") == ["yes"]
    assert values(unit(executable=Path("/home/me/.venv/bin/edgefold")), "ProtectHome") == ["read-only"]
    assert values(unit("/home/me/film.mp4"), "ProtectHome") == ["read-only"]


def test_paths_are_quoted_as_systemd_reads_them() -> None:
    text = unit(
        executable=Path('/opt/my "tools"/100%/$HOME/edgefold'), record=RecordConfig(Path("/data/a b"))
    )
    assert values(text, "ExecStart")[0].startswith(
        r'"/opt/my \"tools\"/100%%/$$HOME/edgefold" stream --config '
    )
    assert values(text, "ReadWritePaths") == ['"/data/a b"']


@pytest.mark.parametrize(
    ("option", "value"),
    [
        ("user", "root\nExecStart=/bin/sh"),
        ("user", "a b"),
        ("memory_max", "lots"),
        ("name", "../evil"),
        ("name", "a\n[Service]"),
        ("environment_file", Path("relative")),
        ("environment_file", Path("/a\nExecStart=/bin/sh")),
    ],
)
def test_nothing_can_be_slipped_into_the_unit(option: str, value: object) -> None:
    with pytest.raises(UsageError, match="cannot stand in a unit"):
        unit(**{option: value})


@needs_systemd
@pytest.mark.parametrize("uris", [("rtsp://camera/1",), ("/dev/video0", "csi:0")])
def test_systemd_accepts_it_without_a_word(tmp_path: Path, uris: tuple[str, ...]) -> None:
    file = tmp_path / "edgefold.service"
    file.write_text(
        unit(
            *uris,
            gpu="csi:0" in uris,
            memory_max="60%",
            environment_file=Path("/dev/null"),
            record=RecordConfig(Path("/data/a b")),
        )
    )
    done = subprocess.run(
        [str(SYSTEMD_ANALYZE), "verify", "--man=no", str(file)], capture_output=True, text=True, check=False
    )
    complaints = [line for line in done.stderr.splitlines() if "edgefold.service" in line]
    assert complaints == []
    assert done.returncode == 0, done.stderr


@needs_systemd
@pytest.mark.parametrize(("uri", "gpu"), [("rtsp://camera/1", False), ("csi:0", True)])
def test_its_exposure_is_low(tmp_path: Path, uri: str, gpu: bool) -> None:
    file = tmp_path / "edgefold.service"
    file.write_text(unit(uri, gpu=gpu))
    command = [str(SYSTEMD_ANALYZE), "security", "--offline=yes", "--no-pager", str(file)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    found = re.search(r"Overall exposure level for edgefold\.service: ([\d.]+)", done.stdout)
    assert found, done.stdout + done.stderr
    assert float(found[1]) <= UNIT_EXPOSURE, done.stdout
    # The measure can fail: a unit without any of it is found to be unsafe.
    file.write_text("[Service]\nType=notify\nExecStart=/bin/true\n")
    bare = subprocess.run(command, capture_output=True, text=True, check=False)
    assert "UNSAFE" in bare.stdout


def test_the_command_prints_the_unit_of_a_configuration(
    tmp_path: Path, make_bundle: Callable[..., Path], capsys: pytest.CaptureFixture[str]
) -> None:
    make_bundle(tmp_path / "net.bundle")
    config = tmp_path / "cameras.toml"
    config.write_text(
        'bundle = "net.bundle"\n[[source]]\nuri = "rtsp://u:${PASSWORD_OF_GATE}@camera/1"\n', encoding="utf-8"
    )
    with pytest.raises(SystemExit) as stop:
        main(["service", "--config", str(config), "--name", "gate"])
    assert stop.value.code == 0
    printed = capsys.readouterr()
    assert f"stream --config {config} --headless" in printed.out
    assert "/etc/systemd/system/gate.service" in printed.out
    assert "the service will need PASSWORD_OF_GATE: give --environment FILE" in printed.err
    assert "set-in-the-service" not in printed.out

    config.write_text("bundle = 'nothing'\n[[source]]\nuri = 'synthetic:1'\n", encoding="utf-8")
    with pytest.raises(SystemExit) as stop:
        main(["service", "--config", str(config)])
    assert stop.value.code == 2
    assert capsys.readouterr().out == ""


def test_the_configuration_of_a_person_is_not_repeated_in_the_unit() -> None:
    """Credentials stay where they are: a unit can be read by every user."""
    text = unit("rtsp://me:hunter2@camera/1")
    assert "hunter2" not in text
