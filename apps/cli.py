"""The ``edgefold`` command: subcommands wired together, errors turned into exit codes.

The modules of the subcommands import what they need when they run, so that `edgefold stream` never
pays for what `edgefold build` needs.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Callable, Sequence
from typing import Annotated, NoReturn

import typer

from apps.bench import bench_command
from apps.build import build_command
from apps.console import console
from apps.demo import demo_command
from apps.doctor import doctor_command
from apps.estimate import estimate_command
from apps.finish import finish_command
from apps.inspect import inspect_command
from apps.service import service_command
from apps.stream import stream_command
from apps.targets import targets_command
from apps.train import train_command
from apps.validate import validate_command
from pipeline.errors import DeviceFaultError, EdgefoldError

__all__ = ["app", "build_engine", "main"]

_INTERRUPTED = 130

app = typer.Typer(
    name="edgefold",
    help="From a PyTorch image classifier to an INT8 engine on a camera, with the accuracy drop proved.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    add_completion=False,
    rich_markup_mode="rich",
    epilog="Exit codes: 0 done, 1 failure, 2 usage, 3 accuracy drop past the budget, 4 unsupported target or "
    "environment, 5 a file is not what its manifest says, 6 device fault, 130 interrupted.",
)


@app.callback(invoke_without_command=True)
def _root(
    context: typer.Context,
    version: Annotated[bool, typer.Option("--version", help="Print the version and stop.")] = False,
) -> None:
    if version:
        from importlib.metadata import version as installed_version

        typer.echo(f"edgefold {installed_version('edgefold')}")
        raise typer.Exit


app.command("build")(build_command)
app.command("validate")(validate_command)
app.command("stream")(stream_command)
app.command("service")(service_command)
app.command("finish")(finish_command)
app.command("inspect")(inspect_command)
app.command("bench")(bench_command)
app.command("estimate")(estimate_command)
app.command("train")(train_command)
app.command("targets")(targets_command)
app.command("doctor")(doctor_command)
app.command("demo")(demo_command)

_build_engine = typer.Typer(name="build-engine", pretty_exceptions_enable=False, add_completion=False)
_build_engine.command()(build_command)


def _run(command: Callable[..., object], arguments: Sequence[str] | None) -> int:
    try:
        command(args=arguments, standalone_mode=True)
    except EdgefoldError as error:
        console.print(f"[bold red]error:[/] {_escaped(str(error))}", soft_wrap=True)
        return error.exit_code
    except KeyboardInterrupt:
        console.print("[bold yellow]interrupted[/]; nothing was left half-written")
        return _INTERRUPTED
    except SystemExit as stop:
        return stop.code if isinstance(stop.code, int) else 0 if stop.code is None else 1
    return 0


def _escaped(text: str) -> str:
    from rich.markup import escape

    return escape(text)


def main(arguments: Sequence[str] | None = None) -> None:
    """Entry point of ``edgefold``."""
    _leave(_run(app, arguments))


def build_engine(arguments: Sequence[str] | None = None) -> None:
    """Entry point of ``build-engine``: `edgefold build` under the name people look for."""
    _leave(_run(_build_engine, arguments))


def _leave(code: int) -> NoReturn:
    """End the process with `code`.

    After a fault of the device at once: the libraries on a dead CUDA context fail when they are unloaded, and the
    supervisor would see their exit code (pycuda aborts, 134) instead of this one.
    """
    if code == DeviceFaultError.exit_code:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)
    sys.exit(code)
