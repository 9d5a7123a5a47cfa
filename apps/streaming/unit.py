"""The systemd unit that runs a configuration of the camera app, with no more rights than that configuration needs."""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path

from apps.streaming.config import StreamConfig
from pipeline.errors import UsageError

__all__ = ["STATE_DIRECTORY", "unit_text"]

STATE_DIRECTORY = Path("/var/lib/edgefold")
"""Writable for the service in any case; systemd makes it."""

_WATCHDOG_S = 30
_NO_USE_IN_TRYING = (2, 4, 5)
"""Exit codes after which another start ends the same way: usage, unsupported, integrity."""
_LOCAL_CAMERA = re.compile(r"^(/dev/|csi:|gst:)")
_CSI = re.compile(r"^csi:|nvarguscamerasrc")
_PRIVILEGED_PORTS = 1024

_HEADER = """\
# Written by `edgefold service`. Install:
#   sudo cp THIS /etc/systemd/system/{name}.service
#   sudo systemctl daemon-reload && sudo systemctl enable --now {name}
# Reload the bundle, without a gap in the stream: sudo systemctl reload {name}
"""


def unit_text(
    config_path: Path,
    config: StreamConfig,
    *,
    executable: Path,
    gpu: bool,
    name: str = "edgefold",
    user: str | None = None,
    environment_file: Path | None = None,
    memory_max: str | None = None,
) -> str:
    """The unit as text.

    Type ``notify``: "started" means that the engine is loaded. The watchdog ends a process whose runtime hangs. A device
    fault (exit 6) starts it again, a wrong configuration or bundle (2, 4, 5) does not.

    Hardening, by what the configuration uses: only the devices of local cameras and of the GPU, no write access but to
    its own state and the folders it records to, no new privileges, the calls of ``@system-service``. Memory that is
    writable and executable stays allowed: OpenVINO and TensorRT compile kernels at run time.

    Args:
        config_path: the TOML file.
        config: what it says.
        executable: the ``edgefold`` command.
        gpu: whether the bundle's engine runs on an NVIDIA GPU.
        name: of the unit, in its comments.
        user: an account that exists; by default one that lives as long as the service (DynamicUser).
        environment_file: NAME=VALUE lines for the ``${NAME}`` of the configuration; only root needs to read it.
        memory_max: what systemd's MemoryMax takes; beyond it the service is ended and started again.

    Raises:
        UsageError: a path that a unit cannot hold, or a user, size or name that is none.
    """
    _check_word("--name", name, r"[A-Za-z0-9:_.@-]+")
    if user is not None:
        _check_word("--user", user, r"[A-Za-z_][A-Za-z0-9_-]*")
    if memory_max is not None:
        _check_word("--memory-max", memory_max, r"\d+[KMGT]?|\d{1,2}%|infinity")
    csi = any(_CSI.search(source.uri) for source in config.sources)
    sections = {
        "Unit": _unit(csi),
        "Service": [
            *_process(config_path, executable, environment_file),
            *_account(user),
            *_files(config_path, config, executable),
            *_devices(config, gpu, csi),
            *_limits(config, memory_max),
        ],
        "Install": ["WantedBy=multi-user.target"],
    }
    text = "\n\n".join("\n".join([f"[{title}]", *lines]) for title, lines in sections.items())
    return f"{_HEADER.format(name=name)}\n{text}\n"


def _unit(csi: bool) -> Iterator[str]:
    yield "Description=Edgefold camera classifier"
    yield "Documentation=man:systemd.service(5)"
    yield "Wants=network-online.target"
    yield f"After=network-online.target{' nvargus-daemon.service' if csi else ''}"
    yield "StartLimitIntervalSec=600"
    yield "StartLimitBurst=10"


def _process(config_path: Path, executable: Path, environment_file: Path | None) -> Iterator[str]:
    yield "Type=notify"
    yield "NotifyAccess=main"
    if environment_file is not None:
        yield f"EnvironmentFile={_path(environment_file)}"
    yield "Environment=EDGEFOLD_CACHE=%C/edgefold PYTHONUNBUFFERED=1"
    yield f"ExecStart={_argument(executable)} stream --config {_argument(config_path)} --headless"
    yield "ExecReload=kill -HUP $MAINPID"
    yield f"WatchdogSec={_WATCHDOG_S}"
    yield "# An engine that is compiled at the first start takes minutes on a small CPU."
    yield "TimeoutStartSec=600"
    yield "# SIGTERM completes recordings within 5 s; what still runs then is killed, capture processes too."
    yield "TimeoutStopSec=10"
    yield "KillMode=mixed"
    yield "Restart=on-failure"
    yield "RestartSec=5"
    yield "RestartForceExitStatus=6"
    yield f"RestartPreventExitStatus={' '.join(map(str, _NO_USE_IN_TRYING))}"


def _account(user: str | None) -> Iterator[str]:
    if user is None:
        yield "DynamicUser=yes"
    else:
        yield f"User={user}"
    yield f"StateDirectory={STATE_DIRECTORY.name}"
    yield "CacheDirectory=edgefold"
    yield "WorkingDirectory=%S/edgefold"
    yield "UMask=0027"
    yield "NoNewPrivileges=yes"


def _files(config_path: Path, config: StreamConfig, executable: Path) -> Iterator[str]:
    yield "ProtectSystem=strict"
    needed = [config_path, executable, config.bundle, *_read_paths(config)]
    at_home = any(_is_at_home(path) for path in needed)
    yield f"ProtectHome={'read-only' if at_home else 'yes'}"
    yield "PrivateTmp=yes"
    for folder in _written_folders(config):
        yield f"ReadWritePaths={_path(folder)}"


def _devices(config: StreamConfig, gpu: bool, csi: bool) -> Iterator[str]:
    cameras = any(_LOCAL_CAMERA.search(source.uri) for source in config.sources)
    if not cameras and not gpu:
        yield "PrivateDevices=yes"
        return
    yield "DevicePolicy=closed"
    if cameras:
        yield "DeviceAllow=char-video4linux rw"
        yield "DeviceAllow=char-media rw"
    groups = ["video"]
    if gpu or csi:
        yield "# NVIDIA's: discrete GPUs, then those of a Jetson."
        for device in (
            "char-nvidia*",
            "/dev/nvmap",
            "char-nvhost*",
            "char-nvgpu*",
            "/dev/nvsciipc",
            "/dev/v4l2-nvdec",
        ):
            yield f"DeviceAllow={device} rw"
        yield "DeviceAllow=char-drm rw"
        groups.append("render")
    yield f"SupplementaryGroups={' '.join(groups if gpu or csi else groups[:1])}"
    if csi:
        yield "# The camera daemon of a Jetson listens in /tmp, which is private otherwise."
        yield "BindPaths=-/tmp/argus_socket"


def _limits(config: StreamConfig, memory_max: str | None) -> Iterator[str]:
    privileged = config.serve is not None and 0 < config.serve.port < _PRIVILEGED_PORTS
    yield f"CapabilityBoundingSet={'CAP_NET_BIND_SERVICE' if privileged else ''}"
    yield f"AmbientCapabilities={'CAP_NET_BIND_SERVICE' if privileged else ''}"
    for switch in (
        "ProtectClock",
        "ProtectControlGroups",
        "ProtectHostname",
        "ProtectKernelLogs",
        "ProtectKernelModules",
        "ProtectKernelTunables",
        "RestrictNamespaces",
        "RestrictRealtime",
        "RestrictSUIDSGID",
        "LockPersonality",
        "RemoveIPC",
    ):
        yield f"{switch}=yes"
    yield "ProtectProc=invisible"
    yield "RestrictAddressFamilies=AF_UNIX AF_INET AF_INET6 AF_NETLINK"
    yield "SystemCallArchitectures=native"
    yield "SystemCallFilter=@system-service"
    yield "SystemCallFilter=~@privileged"
    yield "SystemCallErrorNumber=EPERM"
    if memory_max is not None:
        yield f"MemoryMax={memory_max}"
    yield "TasksMax=512"


def _read_paths(config: StreamConfig) -> Iterator[Path]:
    for source in config.sources:
        if source.uri.startswith("/") and not source.uri.startswith("/dev/"):
            yield Path(source.uri)


def _written_folders(config: StreamConfig) -> list[Path]:
    """Folders outside the service's own state that the configuration writes to."""
    records = [source.record.path for source in config.sources if source.record is not None]
    folders = {path.parent if path.suffix else path for path in records}
    if config.predictions is not None:
        folders.add(config.predictions.parent)
    if config.events is not None and config.events.log not in (None, "-"):
        folders.add(Path(str(config.events.log)).parent)
    return sorted(folder for folder in folders if not folder.is_relative_to(STATE_DIRECTORY))


def _is_at_home(path: Path) -> bool:
    return any(path.is_relative_to(home) for home in ("/home", "/root", "/run/user"))


def _argument(path: Path) -> str:
    """A word of ExecStart= [systemd.service(5), "Command lines"; systemd.unit(5), "Specifiers"]."""
    return _path(path).replace("$", "$$")


def _path(path: Path) -> str:
    text = str(path)
    if not path.is_absolute() or any(ord(character) < 32 for character in text):
        raise UsageError(f"{text!r} cannot stand in a unit; give an absolute path without control characters")
    text = text.replace("%", "%%")
    if re.fullmatch(r"[^\s\"'\\;]+", text):
        return text
    escaped = text.replace("\\", "\\\\").replace('"', '\\"')
    return f'"{escaped}"'


def _check_word(option: str, value: str, pattern: str) -> None:
    if not re.fullmatch(pattern, value):
        raise UsageError(f"{option} {value!r} cannot stand in a unit; it must match {pattern}")
