"""The terms of SSKD as pure functions (Xu et al., arXiv 2006.07114; forms as in ``xuguodong03/SSKD``, ``student.py``)."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

from era.losses import at_least_float32, kd_loss

LEAST_NORM = 1e-6  # shorter vectors are divided by this


def cosine_similarities(rows: Tensor, columns: Tensor) -> Tensor:
    """``s_ij = <a_i, b_j> / (|a_i| |b_j|)``.

    Args:
        rows: a, (R, D). columns: b, (C, D).

    Returns:
        (R, C), float32 or wider, also under autocast.
    """
    rows, columns = at_least_float32(rows), at_least_float32(columns)
    with torch.autocast(rows.device.type, enabled=False):
        return F.normalize(rows, eps=LEAST_NORM) @ F.normalize(columns, eps=LEAST_NORM).T


def contrastive_loss(similarities: Tensor) -> Tensor:
    """``-(1/R) sum_i log softmax_j(s_ij)_i``: each row is to find its own instance, column i, among all.

    As in the code the cosines are the logits, without a temperature, so that the loss of C columns is at least
    ``log(1 + (C - 1) e^-2)``.

    Args:
        similarities: (R, C), C >= R.

    Returns:
        Scalar; of one column 0, of no row 0, connected to the graph.
    """
    if len(similarities) == 0:
        return similarities.sum()
    own = torch.arange(len(similarities), device=similarities.device)
    return F.cross_entropy(similarities, own)


def chosen_rows(scores: Tensor, right: Tensor, share: float) -> Tensor:
    """Rows on which the teacher is right, and of the others the ``share`` in which it errs least.

    The error's rank is how many columns score higher than the right one, 0 where the teacher is right. The number of
    wrong rows is rounded down, as in the code; equal ranks keep the rows' order, and an equal score is no error (there
    the sort decides).

    Args:
        scores: of the teacher, (R, C). right: (R,), long, the right column of each row. share: 0 to 1.

    Returns:
        (R',), long, sorted.
    """
    own = scores.gather(1, right[:, None])
    rank = (scores > own).sum(1)
    wrong = int((rank > 0).sum())
    kept = len(rank) - wrong + int(wrong * share)
    return rank.argsort(stable=True)[:kept].sort().values


def selected_kd_loss(
    student: Tensor, teacher: Tensor, right: Tensor, temperature: float, share: float
) -> Tensor:
    """``tau^2 KL(teacher || student)`` of row softmaxes, mean over :func:`chosen_rows`.

    Args:
        student, teacher: logits or similarities, (R, C), aligned. The teacher's are treated as constants.
        right: (R,), the right column of each row.
        temperature: tau. share: of the rows in which the teacher errs.

    Returns:
        Scalar >= 0; 0, connected to ``student``, where no row is chosen.
    """
    rows = chosen_rows(at_least_float32(teacher.detach()), right, share)
    return kd_loss(student[rows], teacher[rows], temperature)
