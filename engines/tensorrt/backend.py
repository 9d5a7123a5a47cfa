"""TensorRT and TensorRT-RTX as engine families.

Building takes the strongly typed ONNX of the TensorRT placement and leaves a plan, its inspector's JSON
where it could be read, and a record of the build. TensorRT-RTX builds without a GPU for the compute
capabilities named; TensorRT builds on the GPU it is to run on. Loading checks in this order, each
step before the next one trusts the bytes: the digest, the header against the manifest, the library and
the GPU against both, a trial load in a process that may die of it, and only then the load here.
"""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from pathlib import Path

from pydantic import TypeAdapter

from engines.base import check_options, fixed_batch_message
from engines.tensorrt.api import Flavour, TensorRtApi, load_api
from engines.tensorrt.builder import build_plan, probe_plan
from engines.tensorrt.device import device_identity
from engines.tensorrt.options import BatchProfile, TensorRtOptions
from engines.tensorrt.plan import BuiltPlan, identify_plan
from engines.tensorrt.plan_file import PLAN_NAMES, read_plan
from engines.tensorrt.runner import TensorRtRunner
from pipeline.artifacts import EngineArtifact, EngineOptions, Fingerprint, ModelArtifact
from pipeline.contracts import EngineBackend, Progress, Runner
from pipeline.errors import EngineError, IntegrityError, UnsupportedError

__all__ = [
    "BACKEND",
    "BUILD_RECORD_NAME",
    "INSPECTOR_NAME",
    "KERNEL_LOG_NAME",
    "PLAN_SIDE_FILES",
    "RTX_BACKEND",
    "TensorRtBackend",
    "read_build_record",
]

BUILD_RECORD_NAME = "plan.json"
INSPECTOR_NAME = "plan.inspector.json"
KERNEL_LOG_NAME = "plan.kernels.log"
PLAN_SIDE_FILES = (BUILD_RECORD_NAME, INSPECTOR_NAME, KERNEL_LOG_NAME)
"""What `TensorRtBackend.build` may write beside a plan."""
_AHEAD_OF_TIME = "ahead of time"
_VERSION_COMPATIBLE = "version_compatible"
_RECORD: TypeAdapter[BuiltPlan] = TypeAdapter(BuiltPlan)


def _silent(what: str, done: int, total: int | None) -> None:
    """A `pipeline.contracts.Progress` that nobody watches."""


@dataclass(frozen=True, slots=True)
class TensorRtBackend:
    """`pipeline.contracts.EngineBackend` for one flavour, with what it builds for.

    ``dataclasses.replace(backend, build_options=…, progress=…)`` gives another one.
    """

    flavour: Flavour
    build_options: TensorRtOptions = field(default_factory=TensorRtOptions)
    progress: Progress = _silent

    @property
    def name(self) -> str:
        """Its key in the registry."""
        return self.flavour

    def build(self, model: ModelArtifact, out_dir: Path, options: EngineOptions) -> EngineArtifact:
        """Build the plan, and write it with its record and its inspector's JSON into `out_dir`.

        Args:
            model: strongly typed ONNX of the TensorRT placement.
            out_dir: gets the plan, `BUILD_RECORD_NAME`, and what there is of `PLAN_SIDE_FILES`.
            options: ``batch`` builds for that batch alone, instead of ``build_options.profiles``.

        Raises:
            UnsupportedError: the library, an SM or an option is not available here.
            EngineError: TensorRT refuses the model, crashed, or ran out of memory.
            IntegrityError: the model file is not the one described.
        """
        api = load_api(self.flavour)
        check_options(options)
        build_options = self.build_options
        if options.batch is not None:
            _refuse_other_batch(model, options.batch)
            only = BatchProfile(options.batch, options.batch, options.batch)
            build_options = replace(build_options, profiles=(only,))
        built = build_plan(api, model, out_dir / PLAN_NAMES[self.flavour], build_options, self.progress)
        if built.inspector is not None:
            (out_dir / INSPECTOR_NAME).write_text(built.inspector, encoding="utf-8")
        if built.kernel_log is not None:
            (out_dir / KERNEL_LOG_NAME).write_text(built.kernel_log, encoding="utf-8")
        record = replace(
            built, path=Path(built.path.name), timing_cache=None, inspector=None, kernel_log=None
        )
        (out_dir / BUILD_RECORD_NAME).write_bytes(_RECORD.dump_json(record, indent=2))
        return EngineArtifact(
            path=built.path,
            sha256=built.sha256,
            model_sha256=model.sha256,
            backend=self.name,
            fingerprint=_plan_fingerprint(built, build_options),
            portable=False,
        )

    def load(self, artifact: EngineArtifact, options: EngineOptions) -> Runner:
        """Load a plan for this GPU.

        Raises:
            IntegrityError: the file is not the plan described; nothing was deserialized.
            UnsupportedError: another version or GPU than the plan's, or what runs it is missing; names both.
            EngineError: the artifact is another backend's, or TensorRT cannot load the plan.
        """
        if artifact.backend != self.name:
            raise EngineError(f"this engine was built for {artifact.backend!r}, not for {self.name!r}")
        check_options(options)
        plan = _read_plan(artifact)
        api = load_api(self.flavour)
        _check_version(artifact, api)
        device = device_identity()
        _check_device(artifact, device.name, device.sm)
        probe_plan(api, artifact.path, artifact.sha256)
        return TensorRtRunner(plan, api, options, path=artifact.path)

    def fingerprint(self) -> Fingerprint:
        """This library and this machine's GPU.

        Raises:
            UnsupportedError: no GPU, driver or binding; says which.
        """
        api = load_api(self.flavour)
        device = device_identity()
        capabilities = (f"sm_{device.sm}", f"driver {device.driver}", f"CUDA {device.cuda}")
        return Fingerprint(self.name, api.version_text, device.name, capabilities)


def read_build_record(folder: Path) -> BuiltPlan:
    """What `TensorRtBackend.build` wrote into `folder` about the plan.

    Raises:
        IntegrityError: there is no such record, or it is damaged.
    """
    try:
        return _RECORD.validate_json((folder / BUILD_RECORD_NAME).read_bytes())
    except (OSError, ValueError) as error:
        raise IntegrityError(
            f"{folder / BUILD_RECORD_NAME} is no record of a plan ({error}); build it again"
        ) from error


BACKEND: EngineBackend = TensorRtBackend("tensorrt")
RTX_BACKEND: EngineBackend = TensorRtBackend("tensorrt_rtx")


def _plan_fingerprint(built: BuiltPlan, options: TensorRtOptions) -> Fingerprint:
    """What the plan is bound to: kept in the manifest and checked on load."""
    capabilities = [f"sm_{sm}" for sm in built.compute_capabilities]
    if options.version_compatible:
        capabilities.append(_VERSION_COMPATIBLE)
    if options.hardware_compatibility != "none":
        capabilities.append(options.hardware_compatibility)
    return Fingerprint(built.flavour, built.version, built.device or _AHEAD_OF_TIME, tuple(capabilities))


def _refuse_other_batch(model: ModelArtifact, batch: int) -> None:
    for spec in model.inputs:
        fixed = spec.shape[0]
        if isinstance(fixed, int) and fixed != batch:
            raise EngineError(fixed_batch_message(model.path, fixed, batch))


def _read_plan(artifact: EngineArtifact) -> bytes:
    """The plan's bytes, proved to be the ones that were built, for the flavour and the SMs it is sold as."""
    plan = read_plan(artifact.path, artifact.sha256)
    header = identify_plan(plan)
    if header.flavour != artifact.backend:
        raise IntegrityError(
            f"plan {artifact.path} is one of {header.flavour!r}, the manifest says {artifact.backend!r}; "
            "it was not loaded. Build it again"
        )
    described = _sms(artifact.fingerprint)
    if header.sms is not None and header.sms != described:
        raise IntegrityError(
            f"plan {artifact.path} holds code for SM {_words(header.sms)}, the manifest says "
            f"{_words(described)}; it was not loaded. Build it again"
        )
    return plan


def _check_version(artifact: EngineArtifact, api: TensorRtApi) -> None:
    """A plan loads in the very version that built it, or in a later one where it was built for that.

    Both manuals say so (TensorRT 11.1 and TensorRT-RTX, "Engine Compatibility").
    """
    built, here = artifact.fingerprint.version, api.version_text
    later_ok = _VERSION_COMPATIBLE in artifact.fingerprint.capabilities
    if built == here or (later_ok and _numbers(built) <= api.version):
        return
    raise UnsupportedError(
        f"plan {artifact.path} was built by {artifact.backend} {built}, {here} is installed here, and a plan only "
        "loads in the version that built it; build it again here (edgefold finish), or install that version"
    )


def _check_device(artifact: EngineArtifact, name: str, sm: int) -> None:
    sms = _sms(artifact.fingerprint)
    ampere_plus = "ampere_plus" in artifact.fingerprint.capabilities
    if sm in sms or (ampere_plus and sm >= 80):
        return
    raise UnsupportedError(
        f"plan {artifact.path} was built for SM {_words(sms)} ({artifact.fingerprint.device}), this GPU is "
        f"{name}, SM {sm}; build it again here (edgefold finish)"
    )


def _sms(fingerprint: Fingerprint) -> tuple[int, ...]:
    return tuple(int(text[3:]) for text in fingerprint.capabilities if text.startswith("sm_"))


def _words(sms: tuple[int, ...]) -> str:
    return ", ".join(map(str, sms)) or "none"


def _numbers(version: str) -> tuple[int, ...]:
    return tuple(int(part) for part in version.split(".") if part.isdigit())
