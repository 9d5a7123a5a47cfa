"""``edgefold build --meet-budget``: the search for the precision of each layer, on real engines and images."""

from __future__ import annotations

import dataclasses
import hashlib
import statistics as order_statistics
import tempfile
import time
from collections.abc import Iterator, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from apps.budget_images import BATCH, BudgetImages
from apps.cache import cache_dir
from apps.console import console
from apps.validating import Reference, Subject, load_judge, subject_of_models
from calibration.budget import Budget
from calibration.quantizer import Corrected, StaticQuantizer, apply_table
from calibration.search import Plan, SearchResult, SearchState, search_precision
from calibration.sensitivity import LayerSensitivity, measure_sensitivity
from calibration.table import table_sha256
from engines.measure import make_inputs, run_alternating, time_infer, worker_command
from pipeline.artifacts import EngineArtifact, EngineOptions, ModelArtifact, StageRecord
from pipeline.compile import QUANTIZED_NAME, Compiled
from pipeline.contracts import Batches, Dataset, EngineBackend, Progress
from pipeline.errors import DataError
from pipeline.preprocess import preprocess_sha256
from pipeline.validation_state import ResumeFile

if TYPE_CHECKING:
    from apps.publishing import BuildRequest
    from pipeline.models.resolve import ResolvedModel

__all__ = ["Searched", "budget_of", "meet_budget", "print_search"]

_TIMING_ROUNDS = 5
_TIMING_SECONDS = 0.3
_CONFIRM_ROUNDS = 3
_CONFIRM_SECONDS = 2.0


@dataclass(frozen=True, slots=True)
class Searched:
    """What the search made of a build, and what it found on the way."""

    compiled: Compiled
    result: SearchResult
    sensitivity: tuple[LayerSensitivity, ...]
    confirmed_ms: dict[str, float]
    """Median latencies in processes of their own: ``int8``, ``plan``, ``fp32`` (the folded graph)."""


def budget_of(request: BuildRequest) -> Budget | None:
    """The budget that a request states."""
    if request.max_drop_points is not None:
        return Budget.of_drop(request.max_drop_points)
    if request.min_agreement_percent is not None:
        return Budget.of_agreement(request.min_agreement_percent)
    return None


def meet_budget(
    request: BuildRequest,
    budget: Budget,
    model: ResolvedModel,
    compiled: Compiled,
    evaluation: Dataset,
    quantizer: StaticQuantizer,
    passes: Batches,
    backend: EngineBackend,
    work_dir: Path,
    progress: Progress,
) -> Searched:
    """Replace the int8 graph of a build by the fastest mixed one within the budget.

    Args:
        request: as given.
        budget: what it states.
        model: what is built.
        compiled: the build with everything in int8.
        evaluation: the images of the budget.
        quantizer: what calibrated and corrected it; it keeps what it made.
        passes: over the calibration images.
        backend: runs and times the plans.
        work_dir: for files that do not ship.
        progress: told of every image and judgement.

    Raises:
        AccuracyGateError: fp32 itself is past the budget, or float throughout is.
        DataError: the images are too few, of one class, or without the labels a drop needs.
    """
    began_s = time.perf_counter()
    folded, table = compiled.folded, compiled.table
    assert table is not None, "a search starts from a calibrated build"
    subject = subject_of_models(
        folded, folded, backend, precision=request.precision, num_classes=model.num_classes
    )
    images = BudgetImages(work_dir, evaluation, subject, budget)
    with ExitStack() as stack:
        images.ask_reference(stack, backend, Reference(model), progress)
    budget.require_images(images.n)
    corrected = quantizer.correct(folded, passes, table.dataset_sha256, progress)
    ranking = measure_sensitivity(
        corrected.original,
        table,
        corrected.statistics,
        passes,
        quantizer.runner_factory,
        progress,
        corrected=corrected.model,
    )
    plans = _Plans(folded, corrected, subject, backend, images, work_dir)
    resume = _resume_file(budget, corrected, evaluation, backend)
    kept = resume.load(SearchState)
    result = search_precision(
        ranking,
        budget,
        images.n,
        plans.judge,
        plans.time,
        state=None if kept is None else kept.tally,
        keep=lambda state: resume.save(state, ()),
        progress=progress,
    )
    final, record = plans.write(result.plan, compiled.final.path.with_name(QUANTIZED_NAME))
    confirmed = plans.confirm(result.plan, final)
    resume.remove()
    engine = backend.build(final, final.path.parent, EngineOptions())
    searched = StageRecord(
        "search",
        inputs=(compiled.engine.sha256, evaluation.sha256),
        outputs=(final.sha256,),
        seconds=round(time.perf_counter() - began_s, 3),
        checks={
            **result.to_json(),
            "n_quantized_layers": record.checks["n_quantized_layers"],
            "confirmed_ms": confirmed,
            "sensitivity": [entry.to_json() for entry in ranking],
        },
    )
    built = dataclasses.replace(compiled.final.history[-1], inputs=(final.sha256,), outputs=(engine.sha256,))
    final = dataclasses.replace(final, history=(*compiled.final.history[:-1], searched, built))
    return Searched(dataclasses.replace(compiled, final=final, engine=engine), result, ranking, confirmed)


class _Plans:
    """Judges and times plans on the engine that will run one of them."""

    def __init__(
        self,
        folded: ModelArtifact,
        corrected: Corrected,
        subject: Subject,
        backend: EngineBackend,
        images: BudgetImages,
        work_dir: Path,
    ) -> None:
        self._folded, self._corrected, self._subject = folded, corrected, subject
        self._backend, self._images, self._work_dir = backend, images, work_dir

    def judge(self, plan: Plan) -> Iterator[NDArray[np.int8]]:
        """A `calibration.search.Judge`."""
        with tempfile.TemporaryDirectory(dir=self._work_dir) as folder, ExitStack() as stack:
            artifact = self._made(plan, Path(folder) / "plan.onnx")
            judge = load_judge(stack, self._subject, artifact, self._backend, "plan", "int8", BATCH)
            for rows, pixels in self._images.batches():
                yield self._images.changes(rows, judge.logits((), pixels).argmax(axis=1))

    def time(self, plans: Sequence[Plan]) -> list[float]:
        """A `calibration.search.Timer`: in one process, in turns, every other round backwards."""
        with tempfile.TemporaryDirectory(dir=self._work_dir) as folder, ExitStack() as stack:
            options = EngineOptions(batch=None if self._subject.fixed_batch else 1)
            runners = [
                stack.enter_context(
                    self._backend.load(self._made(plan, Path(folder) / f"plan{i}.onnx"), options)
                )
                for i, plan in enumerate(plans)
            ]
            inputs = make_inputs(runners[0].inputs, 1)
            found: list[list[float]] = [[] for _ in runners]
            for index in range(_TIMING_ROUNDS):
                order = range(len(runners)) if index % 2 == 0 else reversed(range(len(runners)))
                for which in order:
                    found[which].append(time_infer(runners[which], inputs, _TIMING_SECONDS).p50_ms)
            return [order_statistics.median(values) for values in found]

    def confirm(self, plan: Plan, final: ModelArtifact) -> dict[str, float]:
        """The same in processes of their own, which no other engine disturbs."""
        with tempfile.TemporaryDirectory(dir=self._work_dir) as folder:
            int8 = self._made(frozenset(), Path(folder) / "int8.onnx")
            graphs = {"int8": (int8.path, int8.sha256), "fp32": (self._folded.path, self._folded.sha256)}
            if plan:
                graphs["plan"] = (final.path, final.sha256)
            options = EngineOptions(batch=None if self._subject.fixed_batch else 1)
            commands = {
                name: worker_command(path, sha256, self._backend.name, options, _CONFIRM_SECONDS)
                for name, (path, sha256) in graphs.items()
            }
            timed = run_alternating(commands, _CONFIRM_ROUNDS)
        medians = {
            name: round(order_statistics.median(round_["p50_ms"] for round_ in rounds), 3)
            for name, rounds in timed.items()
        }
        medians.setdefault("plan", medians["int8"])
        return medians

    def write(self, plan: Plan, path: Path) -> tuple[ModelArtifact, StageRecord]:
        """The graph of a plan: corrected where it is in int8, as it was where it stays in float."""
        made = self._corrected
        return apply_table(made.original, made.table, "cpu", path, plan, made.model)

    def _made(self, plan: Plan, path: Path) -> EngineArtifact:
        model, _ = self.write(plan, path)
        return EngineArtifact(
            path, model.sha256, model.sha256, self._backend.name, self._backend.fingerprint()
        )


def _resume_file(
    budget: Budget, corrected: Corrected, evaluation: Dataset, backend: EngineBackend
) -> ResumeFile:
    """Where the judgements are kept, under the digest of everything that they depend on."""
    engine = backend.fingerprint()
    key = {
        "budget": f"{budget.kind} {budget.limit!r}",
        "model": corrected.original.sha256,
        "corrected model": corrected.model.sha256,
        "calibration table": table_sha256(corrected.table),
        "images": evaluation.sha256,
        "preprocessing": preprocess_sha256(corrected.original.preprocess),
        "engine": f"{engine.engine} {engine.version} {engine.device} {' '.join(engine.capabilities)}",
    }
    digest = hashlib.sha256("\0".join(key.values()).encode()).hexdigest()
    folder = cache_dir("search")
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise DataError(
            f"the search cannot keep its judgements in {str(folder)!r}: {error.strerror or error}; set EDGEFOLD_CACHE"
        ) from error
    return ResumeFile(folder / f"search-{digest[:32]}.json", key=key)


def print_search(searched: Searched) -> None:
    """The plan for a person: the budget, what it cost, which layers stay high and why."""
    from rich import box
    from rich.table import Table

    result, ms = searched.result, searched.confirmed_ms
    judged, interval = result.judged, result.interval.scaled(100.0)
    word = "top-1 drop" if result.budget.kind == "drop" else "answers changed"
    if result.kept:
        table = Table(title="Layers kept in float", title_justify="left", box=box.SIMPLE_HEAD)
        for column in ("rank", "layer", "logits SQNR", "why"):
            table.add_column(column, justify="right" if column in ("rank", "logits SQNR") else "left")
        for kept in result.kept:
            sqnr = "-" if kept.logits_sqnr_db is None else f"{kept.logits_sqnr_db + 0.0:.1f} dB"
            table.add_row(str(kept.rank), kept.layer, sqnr, kept.reason)
        console.print(table)
    change = 100.0 * (judged.lost - judged.gained) / judged.n_images
    console.print(
        f"budget: {result.budget.describe()}; {word} {change:+.2f}% (95% interval {interval.low:+.2f} to "
        f"{interval.high:+.2f}, {judged.n_images:,} images), {len(result.kept)} of {len(searched.sensitivity)} layers "
        "in float",
        markup=False,
    )
    console.print(
        f"latency: {ms['plan']:.2f} ms; all int8 {ms['int8']:.2f}, fp32 {ms['fp32']:.2f}; given up for the budget "
        f"{ms['plan'] - ms['int8']:+.2f} ms",
        markup=False,
    )
    console.print(
        f"search: {result.n_evaluations} judgements of {result.n_images_judged:,} images in all, "
        f"{result.n_timings} timings",
        markup=False,
    )
    for note in result.notes:
        console.print(f"note: {note}", style="yellow", markup=False)
