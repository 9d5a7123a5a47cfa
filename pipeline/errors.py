"""One exception tree; the exit code of the command is the class's.

::

    EdgefoldError                    1  anything that went wrong and is not named below
    ├── UsageError                   2  what the user asked for cannot be asked
    │   ├── ModelSpecError           2  no such model, factory or file
    │   ├── WeightsError             2  weights that do not belong to the model
    │   └── DataError                2  images or labels that cannot be used
    ├── ExportError                  1  PyTorch could not be exported, or the export disagrees with it
    ├── PassError                    1  a graph pass changed what the model computes
    ├── CalibrationError             1  ranges that cannot be quantized (NaN, Inf, no data)
    ├── EngineError                  1  an engine could not be built, loaded or run
    ├── AccuracyGateError            3  the accuracy drop is past the budget; nothing was published
    ├── UnsupportedError             4  this target or environment cannot do it
    ├── IntegrityError               5  a file is not the one the manifest describes
    └── DeviceFaultError             6  the device failed under a running engine
        └── SourceLostError          6  a camera or stream cannot be opened, or stopped

A message names the thing, the measured value, the limit and the remedy.
"""

from __future__ import annotations

from typing import Literal

__all__ = [
    "AccuracyGateError",
    "CalibrationError",
    "DataError",
    "DeviceFaultError",
    "EdgefoldError",
    "EngineError",
    "ExportError",
    "IntegrityError",
    "ModelSpecError",
    "PassError",
    "Retry",
    "SourceLostError",
    "UnsupportedError",
    "UsageError",
    "WeightsError",
]

Retry = Literal["soon", "seldom", "never"]


class EdgefoldError(Exception):
    """Root of every error this product raises on purpose."""

    exit_code = 1


class UsageError(EdgefoldError):
    """The request itself is wrong; nothing was started."""

    exit_code = 2


class ModelSpecError(UsageError):
    """The model spec names nothing that can be loaded."""


class WeightsError(UsageError):
    """The weights file cannot be read, or its tensors are not this model's."""


class DataError(UsageError):
    """The images or labels given cannot be used as asked."""


class ExportError(EdgefoldError):
    """`torch.onnx` failed, or the exported graph disagrees with the module."""


class PassError(EdgefoldError):
    """A graph pass failed or did not preserve what the model computes.

    Attributes:
        pass_name: the pass that was running.
        step: what was being done: ``rewrite``, ``check``, ``shapes``, ``interface``, ``numerics``.
    """

    def __init__(self, pass_name: str, step: str, message: str) -> None:
        super().__init__(f"pass {pass_name!r} failed at {step}: {message}")
        self.pass_name = pass_name
        self.step = step


class CalibrationError(EdgefoldError):
    """The statistics do not give a usable range."""


class EngineError(EdgefoldError):
    """An engine could not be built, loaded or run."""


class AccuracyGateError(EdgefoldError):
    """The accuracy drop is past the budget the user stated."""

    exit_code = 3


class UnsupportedError(EdgefoldError):
    """The target, or something this machine lacks, makes the request impossible."""

    exit_code = 4


class IntegrityError(EdgefoldError):
    """A file differs from what its manifest or digest promises."""

    exit_code = 5


class DeviceFaultError(EdgefoldError):
    """The device failed while an engine was running; the process must be restarted."""

    exit_code = 6


class SourceLostError(DeviceFaultError):
    """A camera or stream cannot be opened, or gave no frames any more.

    Attributes:
        retry: whether to try it again helps: ``soon`` (it may be starting up, or the network is down),
            ``seldom`` (somebody must change something there: a password, a path, a certificate, a
            daemon), ``never`` (what answers is no source of pictures).
    """

    def __init__(self, message: str, retry: Retry = "soon") -> None:
        super().__init__(message)
        self.retry: Retry = retry

    def __reduce__(self) -> tuple[type[SourceLostError], tuple[str, Retry]]:
        # By default pickling repeats the message only, and a capture process hands its error over.
        return type(self), (str(self), self.retry)
