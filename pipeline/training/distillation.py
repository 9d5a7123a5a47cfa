"""Learning from a larger network's answers: knowledge distillation (Hinton et al., arXiv 1503.02531).

The teacher has seen each image once, as it is and mirrored, before training begins; what it said is kept.
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
"""Divides both networks' logits, so that what the teacher holds for unlikely shows."""

TEACHER_SHARE = 0.9
"""Of the loss; the labels have the rest."""


@dataclass(frozen=True, slots=True)
class Teacher:
    """``log_probabilities``: float32 [2, n, classes], of every image as it is and mirrored.

    ``sha256`` is that of the engine that gave them.
    """

    name: str
    sha256: str
    log_probabilities: NDArray[np.float32]

    def answers(self, indices: NDArray[np.int64], mirrored: NDArray[np.bool_]) -> Tensor:
        """Float32 [len(indices), classes]: of the images at `indices`, some of them `mirrored`."""
        return torch.from_numpy(self.log_probabilities[mirrored.astype(np.int64), indices])

    def card(self) -> dict[str, object]:
        """What a model card says of it."""
        return {
            "bundle": self.name,
            "engine_sha256": self.sha256,
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
