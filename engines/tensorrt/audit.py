"""What an audit of a TensorRT engine says: its kernels, what is not as it should be, and the edit that mends it.

Two audits give the same report: `engines.tensorrt.predict`, from the graph alone (source ``predicted``),
and `engines.tensorrt.inspector`, from what TensorRT tells about the engine it built (``inspector``).
`check_int8` turns a report into a verdict.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

from pydantic import TypeAdapter, ValidationError

from engines.tensorrt.layers import Kind, Precision
from pipeline.errors import EngineError, IntegrityError

__all__ = [
    "COMPUTING",
    "AuditReport",
    "AuditedLayer",
    "Edit",
    "Finding",
    "FindingKind",
    "Tally",
    "check_int8",
    "report_from_json",
    "report_to_json",
    "require_int8",
]

_STRICT: dict[str, Any] = {"extra": "forbid"}

FindingKind = Literal[
    "unfused_add",
    "float_add",
    "concat_requantized",
    "concat_float",
    "concat_copied",
    "half_quantized",
    "float_layer",
    "fp32_island",
    "asymmetric",
    "requantization",
    "reformat",
    "split_layer",
    "not_int8",
]
"""``docs/audit.md`` describes each with its remedy."""

COMPUTING: frozenset[Kind] = frozenset({"conv", "fc", "pool", "reduce", "elementwise", "softmax", "other"})
"""Kinds that compute something; the others only move or rewrite memory."""


@dataclass(frozen=True, slots=True)
class Edit:
    """A change of the graph or of its Q/DQ that would mend a finding.

    ``insert_qdq`` puts Q/DQ on ``tensors`` for the readers ``nodes``; ``remove_qdq`` takes them away;
    ``share_scale`` gives ``tensors`` one scale; ``fold`` puts the constants of ``nodes`` into the layer
    before; ``lower`` runs ``nodes`` in fp16 or bf16.
    """

    __pydantic_config__: ClassVar[dict[str, Any]] = _STRICT

    action: Literal["insert_qdq", "remove_qdq", "share_scale", "fold", "lower"]
    tensors: tuple[str, ...] = ()
    nodes: tuple[str, ...] = ()

    def __str__(self) -> str:
        words = {"insert_qdq": "insert Q/DQ", "remove_qdq": "remove Q/DQ", "share_scale": "share one scale"}
        on = f" on {', '.join(self.tensors)}" if self.tensors else ""
        at = f" at {', '.join(self.nodes)}" if self.nodes else ""
        return f"{words.get(self.action, self.action)}{on}{at}"


@dataclass(frozen=True, slots=True)
class Finding:
    """One thing that costs time, where it is, and what to do. ``edit`` is ``None`` where no edit helps."""

    __pydantic_config__: ClassVar[dict[str, Any]] = _STRICT

    kind: FindingKind
    layer: str
    """The kernel, by the name the report's layer has."""
    detail: str
    remedy: str
    edit: Edit | None = None


@dataclass(frozen=True, slots=True)
class AuditedLayer:
    """One kernel. ``nodes`` are the ONNX nodes in it; one that is spread over kernels is in each."""

    __pydantic_config__: ClassVar[dict[str, Any]] = _STRICT

    name: str
    kind: Kind
    precision: Precision
    nodes: tuple[str, ...]
    reason: str


@dataclass(frozen=True, slots=True)
class Tally:
    """How many there are, and how many of them are as they should be."""

    __pydantic_config__: ClassVar[dict[str, Any]] = _STRICT

    total: int
    clean: int


@dataclass(frozen=True, slots=True)
class AuditReport:
    """What was found. Every residual add and every concatenation is clean or in a finding."""

    __pydantic_config__: ClassVar[dict[str, Any]] = _STRICT

    source: Literal["predicted", "inspector"]
    layers: tuple[AuditedLayer, ...]
    findings: tuple[Finding, ...]
    adds: Tally
    """Sums of two activations; clean: in a convolution's kernel, which writes what its readers want."""
    concats: Tally
    """Clean: no kernel of its own, no part requantized."""

    @property
    def precisions(self) -> dict[Precision, int]:
        """Computing kernels by precision."""
        counts = Counter(layer.precision for layer in self.layers if layer.kind in COMPUTING)
        return dict(counts.most_common())

    @property
    def kinds(self) -> dict[Kind, int]:
        """Kernels by kind, without what is none."""
        counts = Counter(layer.kind for layer in self.layers if layer.kind != "noop")
        return dict(counts.most_common())

    def of(self, *kinds: FindingKind) -> tuple[Finding, ...]:
        """The findings of these kinds."""
        return tuple(finding for finding in self.findings if finding.kind in kinds)


_REPORT = TypeAdapter(AuditReport)


def report_to_json(report: AuditReport) -> bytes:
    """The report as a bundle keeps it; the same report gives the same bytes."""
    return _REPORT.dump_json(report, indent=2) + b"\n"


def report_from_json(data: bytes) -> AuditReport:
    """Read what `report_to_json` wrote.

    Raises:
        IntegrityError: it is no audit report; says where it deviates.
    """
    try:
        return _REPORT.validate_json(data)
    except ValidationError as error:
        problem = error.errors(include_url=False, include_input=False)[0]
        place = ".".join(map(str, problem["loc"])) or "the document"
        raise IntegrityError(f"not an audit report: {place}: {problem['msg']}") from error


def check_int8(
    report: AuditReport, *, int8_ms: float | None = None, fp16_ms: float | None = None
) -> tuple[str, ...]:
    """What speaks against an engine that was to be int8; nothing: an empty tuple.

    Args:
        report: of the engine that was built, not a prediction.
        int8_ms: median latency of that engine on this device, milliseconds.
        fp16_ms: of the fp16 engine of the same network, measured beside it.
    """
    problems = []
    not_int8 = report.of("not_int8")
    if not_int8:
        layers = "; ".join(finding.detail for finding in not_int8[:3])
        more = f"; and {len(not_int8) - 3} more" if len(not_int8) > 3 else ""
        problems.append(f"{len(not_int8)} layers that the graph quantizes are not int8: {layers}{more}")
    if int8_ms is not None and fp16_ms is not None and int8_ms >= fp16_ms:
        problems.append(
            f"int8 takes {int8_ms:.3f} ms and fp16 {fp16_ms:.3f} ms on this device: ship the fp16 engine, or mend "
            "the reformats and unfused adds that the audit lists"
        )
    return tuple(problems)


def require_int8(problems: Sequence[str]) -> None:
    """Refuse an engine that `check_int8` found problems with.

    Raises:
        EngineError: names each problem.
    """
    if problems:
        raise EngineError(
            "the engine is not the int8 engine that was asked for: " + "; ".join(problems) + ". "
            "A layer falls back where no int8 kernel exists for its shape or the engine was built without strong "
            "typing: quantize what the audit names, ask for fp16, or keep the fastest plan all the same with "
            "--on-fallback warn"
        )
