"""From the network's scores to what a person or a program reads."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from pipeline.artifacts import Frame
from pipeline.errors import EngineError
from pipeline.metrics import probabilities

__all__ = ["TOP_K", "Prediction", "RankedClass", "predict"]

TOP_K = 3


@dataclass(frozen=True, slots=True)
class RankedClass:
    """A class with the network's confidence in it, in [0, 1]."""

    class_index: int
    label: str
    confidence: float


@dataclass(frozen=True, slots=True)
class Prediction:
    """What the network says about one frame; ``top`` has the most likely class first."""

    source_id: str
    frame_index: int
    timestamp_ns: int
    top: tuple[RankedClass, ...]
    truth: int | None

    @property
    def correct(self) -> bool | None:
        """Whether the first class is the true one; ``None`` where the truth is unknown."""
        return None if self.truth is None else self.top[0].class_index == self.truth

    def to_json(self) -> dict[str, Any]:
        """JSON-compatible; one line of ``--predictions``."""
        line: dict[str, Any] = {
            "source": self.source_id,
            "frame": self.frame_index,
            "timestamp_ns": self.timestamp_ns,
            "top": [
                {"class": c.class_index, "label": c.label, "confidence": round(c.confidence, 6)}
                for c in self.top
            ],
        }
        if self.truth is not None:
            line["truth"] = self.truth
        return line


def predict(scores: NDArray[Any], labels: Sequence[str], frame: Frame) -> Prediction:
    """Ranks the classes of one frame.

    Args:
        scores: (1, C) or (C,) logits, or probabilities where the graph ends in a softmax.
        labels: the C class names.
        frame: what was shown.

    Raises:
        EngineError: a score is NaN or infinite; such a frame has no label.
    """
    values = np.asarray(scores, np.float64).reshape(-1)
    if not np.isfinite(values).all():
        bad = int(np.flatnonzero(~np.isfinite(values))[0])
        raise EngineError(
            f"frame {frame.index} of {frame.source_id}: the engine gave {values[bad]} for class "
            f"{bad} ({labels[bad]!r}); a prediction would be noise. Validate the bundle "
            "(edgefold validate) and rebuild it."
        )
    confidence = probabilities(values[np.newaxis])[0]
    left, top = values.copy(), []
    for _ in range(min(TOP_K, left.size)):
        # Not a sort of a thousand classes for three of them. Among equal scores the lowest index wins, as in validation.
        index = int(left.argmax())
        left[index] = -np.inf
        top.append(RankedClass(index, labels[index], float(confidence[index])))
    return Prediction(frame.source_id, frame.index, frame.timestamp_ns, tuple(top), frame.label)
