"""Distillation: the loss of arXiv 1503.02531, and the answer that belongs to each image."""

from __future__ import annotations

import numpy as np
import torch
import torch.nn.functional as F

from pipeline.training.distillation import TEACHER_SHARE, TEMPERATURE, Teacher, taught_loss

LOGITS = np.array([[2.0, -1.0, 0.5], [0.0, 0.3, -2.0]])
ANSWERS = np.array([[3.0, 0.0, -1.0], [-1.0, 2.0, 0.5]])


def softened(logits: np.ndarray) -> np.ndarray:
    exponentials = np.exp(logits / TEMPERATURE)
    return exponentials / exponentials.sum(1, keepdims=True)


def test_the_loss_is_the_papers() -> None:
    student, teacher = softened(LOGITS), softened(ANSWERS)
    divergence = np.sum(teacher * np.log(teacher / student)) / len(LOGITS)
    expected = (1 - TEACHER_SHARE) * 7.0 + TEACHER_SHARE * TEMPERATURE**2 * divergence
    found = taught_loss(torch.tensor(7.0), torch.from_numpy(LOGITS), torch.from_numpy(ANSWERS))
    np.testing.assert_allclose(found.item(), expected, rtol=1e-6)


def test_log_probabilities_teach_what_logits_teach() -> None:
    student, answers, none = torch.from_numpy(LOGITS), torch.from_numpy(ANSWERS), torch.tensor(0.0)
    by_logits = taught_loss(none, student, answers)
    torch.testing.assert_close(taught_loss(none, student, F.log_softmax(answers, 1)), by_logits)


def test_a_student_that_agrees_hears_the_labels_alone() -> None:
    student = torch.from_numpy(ANSWERS + 5.0).requires_grad_()
    loss = taught_loss(torch.tensor(7.0), student, torch.from_numpy(ANSWERS))
    loss.backward()
    np.testing.assert_allclose(loss.item(), (1 - TEACHER_SHARE) * 7.0, rtol=1e-6)
    np.testing.assert_allclose(student.grad, 0.0, atol=1e-12)


def test_each_image_has_its_own_answer() -> None:
    table = np.arange(4 * 3, dtype=np.float32).reshape(4, 3)
    found = Teacher((("t", "0" * 64),), table).answers(np.array([3, 0, 1]))
    np.testing.assert_array_equal(found, table[[3, 0, 1]])
