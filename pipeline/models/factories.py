"""``path/to/file.py:factory``: a user's own model, built by a function of their own file."""

from __future__ import annotations

import contextlib
import hashlib
import importlib.util
import inspect
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Any

from torch import nn

from pipeline.errors import ModelSpecError

__all__ = ["Factory", "load_factory"]


@dataclass(frozen=True, slots=True)
class Factory:
    """A function that builds a module, and the file it is in."""

    path: Path
    name: str
    file: ModuleType
    function: Callable[..., Any]
    accepts_num_classes: bool
    requires_num_classes: bool

    def build(self, num_classes: int | None) -> nn.Module:
        """Calls the factory; with ``num_classes`` only where it is known and accepted.

        Raises:
            ModelSpecError: the factory raised, needs a class count, or did not return a module.
        """
        if num_classes is None and self.requires_num_classes:
            raise ModelSpecError(f"{self.path}:{self.name} requires num_classes: give --num-classes N")
        arguments = (
            {"num_classes": num_classes} if num_classes is not None and self.accepts_num_classes else {}
        )
        try:
            with _folder_on_path(self.path):
                module = self.function(**arguments)
        except Exception as error:
            raise ModelSpecError(f"{self.path}:{self.name} raised {_described(error)}") from error
        if not isinstance(module, nn.Module):
            raise ModelSpecError(
                f"{self.path}:{self.name} returned {type(module).__name__}; it must return an nn.Module"
            )
        return module

    def declared(self, module: nn.Module, attribute: str) -> Any:
        """``attribute`` of the module or, failing that, of the file; ``None`` where neither has it."""
        return getattr(module, attribute, getattr(self.file, attribute, None))


def load_factory(path: Path, name: str) -> Factory:
    """Runs the file and finds the factory in it.

    Raises:
        ModelSpecError: no such file or function, the file raises, or the function needs arguments
            other than ``num_classes``.
    """
    file = _run_file(path)
    function = getattr(file, name, None)
    if not callable(function) or isinstance(function, nn.Module):
        own = [
            key
            for key, value in vars(file).items()
            if key[0] != "_" and callable(value) and getattr(value, "__module__", None) == file.__name__
        ]
        what = "is not in the file" if function is None else f"is a {type(function).__name__}, not a function"
        raise ModelSpecError(
            f"{path}:{name}: {name!r} {what}; a factory takes nothing, or num_classes, and returns an "
            f"nn.Module. Functions and classes in the file: {', '.join(own) or 'none'}"
        )
    parameters = inspect.signature(function).parameters.values()
    required = [
        parameter.name
        for parameter in parameters
        if parameter.default is parameter.empty
        and parameter.kind not in (parameter.VAR_KEYWORD, parameter.VAR_POSITIONAL)
    ]
    others = [parameter for parameter in required if parameter != "num_classes"]
    if others:
        raise ModelSpecError(
            f"{path}:{name} requires {', '.join(others)}, but a factory is called with nothing or num_classes: "
            "wrap it in a function that fills in the rest"
        )
    accepts = any(p.name == "num_classes" or p.kind is p.VAR_KEYWORD for p in parameters)
    return Factory(path, name, file, function, accepts, "num_classes" in required)


def _run_file(path: Path) -> ModuleType:
    """The file as a module under a name of its own, its folder importable while it runs."""
    if not path.is_file():
        raise ModelSpecError(f"no such file: {path}")
    resolved = path.resolve()
    # It stays in sys.modules: dataclasses, pickle and torch.export look its classes up there.
    name = f"edgefold_factory_{hashlib.sha256(str(resolved).encode()).hexdigest()[:12]}"
    spec = importlib.util.spec_from_file_location(name, resolved)
    if spec is None or spec.loader is None:
        raise ModelSpecError(f"{path} cannot be loaded as a Python module")
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module
    try:
        with _folder_on_path(resolved):
            spec.loader.exec_module(module)
    except Exception as error:
        del sys.modules[name]
        raise ModelSpecError(f"running {path} raised {_described(error)}") from error
    return module


def _described(error: Exception) -> str:
    """The error with the line of user code it came from."""
    traceback = error.__traceback__
    while traceback is not None and traceback.tb_next is not None:
        traceback = traceback.tb_next
    place = ""
    if traceback is not None:
        place = f" ({Path(traceback.tb_frame.f_code.co_filename).name}, line {traceback.tb_lineno})"
    return f"{type(error).__name__}: {error}{place}"


@contextlib.contextmanager
def _folder_on_path(path: Path) -> Iterator[None]:
    folder = str(path.resolve().parent)
    sys.path.insert(0, folder)
    try:
        yield
    finally:
        sys.path.remove(folder)
