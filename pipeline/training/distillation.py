"""Learning from other networks' answers: knowledge distillation (Hinton et al., arXiv 1503.02531).

The teachers have seen each image once, before training begins; what they said together is kept.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor

__all__ = ["TEACHER_SHARE", "TEMPERATURE", "Teacher", "taught_loss"]

TEMPERATURE = 2.0
"""Divides both networks' logits, so that what a teacher holds for unlikely shows."""

TEACHER_SHARE = 0.9
"""Of the loss; the labels have the rest."""


@dataclass(frozen=True, slots=True)
class Teacher:
    """What one network says, or several together.

    Attributes:
        engines: of each the name of its bundle, and its SHA-256.
        log_probabilities: float32 [n, classes], of every image; up to a constant each.
    """

    engines: tuple[tuple[str, str], ...]
    log_probabilities: NDArray[np.float32]

    def answers(self, indices: NDArray[np.int64]) -> Tensor:
        """Float32 [len(indices), classes]: of the images at `indices`."""
        return torch.from_numpy(self.log_probabilities[indices])

    def card(self) -> dict[str, object]:
        """What a model card says of it."""
        return {
            "engines": [{"bundle": name, "sha256": sha256} for name, sha256 in self.engines],
            "temperature": TEMPERATURE,
            "share_of_the_loss": TEACHER_SHARE,
        }


def taught_loss(label_loss: Tensor, logits: Tensor, answers: Tensor) -> Tensor:
    """`label_loss` and the divergence from the teacher's answers, weighted.

    The divergence is multiplied by the temperature's square, which keeps its gradients at the size of the
    labels' (section 2 of the paper).

    Args:
        label_loss: mean cross-entropy with the labels, a scalar.
        logits: float32 [batch, classes], the student's.
        answers: float32 [batch, classes], the teacher's logits or log-probabilities.
    """
    divergence = F.kl_div(
        F.log_softmax(logits / TEMPERATURE, 1),
        F.log_softmax(answers / TEMPERATURE, 1),
        reduction="batchmean",
        log_target=True,
    )
    return (1 - TEACHER_SHARE) * label_loss + TEACHER_SHARE * TEMPERATURE**2 * divergence
