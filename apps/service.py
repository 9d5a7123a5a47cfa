"""``edgefold service``: the systemd unit for a configuration of the camera app."""

from __future__ import annotations

import os
import shutil
import sys
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Annotated

import typer

__all__ = ["service_command"]


def service_command(
    config: Annotated[Path, typer.Option(help="The TOML file of edgefold stream.", show_default=False)],
    name: Annotated[str, typer.Option(help="Name of the unit.")] = "edgefold",
    user: Annotated[
        str | None,
        typer.Option(
            help="Account to run as; by default one that lives as long as the service.", show_default=False
        ),
    ] = None,
    environment: Annotated[
        Path | None,
        typer.Option(
            help="File of NAME=VALUE lines for the ${NAME} of the configuration; only root need read it.",
            show_default=False,
        ),
    ] = None,
    memory_max: Annotated[
        str | None,
        typer.Option(help="Start the service again beyond this much memory: 2G, 60%.", show_default=False),
    ] = None,
) -> None:
    """Print a systemd unit that runs the configuration: watchdog, restarts, and no more rights than it needs."""
    from apps.console import console
    from apps.streaming.config_file import read_config
    from apps.streaming.unit import unit_text
    from pipeline.bundle import open_bundle

    def warn(text: str) -> None:
        console.print(f"warning: {text}", style="yellow", markup=False, soft_wrap=True)

    variables = _Variables()
    read = read_config(config, environ=variables, on_warning=warn)
    if variables.wanted and environment is None:
        warn(f"the service will need {', '.join(sorted(variables.wanted))}: give --environment FILE")
    bundle = open_bundle(read.bundle)
    if bundle.manifest.engine is None:
        warn(f"the bundle {read.bundle} has no engine yet: run edgefold finish before the service starts")
    text = unit_text(
        config.absolute(),
        read,
        executable=_executable(),
        gpu=bundle.manifest.deployment is not None,
        name=name,
        user=user,
        environment_file=None if environment is None else environment.absolute(),
        memory_max=memory_max,
    )
    sys.stdout.write(text)


class _Variables(Mapping[str, str]):
    """The environment, where every variable has a value: the service will have those that are not set here."""

    def __init__(self) -> None:
        self.wanted: set[str] = set()

    def __getitem__(self, name: str) -> str:
        self.wanted.add(name)
        return os.environ.get(name, "set-in-the-service")

    def __iter__(self) -> Iterator[str]:
        return iter(os.environ)

    def __len__(self) -> int:
        return len(os.environ)


def _executable() -> Path:
    """The command this process was started by, else the one beside the interpreter."""
    started = shutil.which(sys.argv[0])
    if started is not None and Path(started).name == "edgefold":
        return Path(started).absolute()
    return Path(sys.executable).parent / "edgefold"
