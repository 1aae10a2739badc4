"""R2KD's losses: correlation of class probabilities, and of the ranks of classes; torch alone."""

from __future__ import annotations

from torch import Tensor

from era.losses import logits_to_compare

VALUE_GUARD = 1e-8  # the source's, added to products of norms
RANK_GUARD = 1e-3  # of a product of norms of centred ranks, which are whole numbers in the source


def value_loss(student_logits: Tensor, teacher_logits: Tensor, temperature: float) -> Tensor:
    """``tau^2 (1 - mean over rows of |cos(p_S, p_T)| + 1 - mean over columns of |cos(p_S, p_T)|)``.

    ``value_loss`` of the official ``mdistiller/distillers/R2KD.py``, without its weight. p is softmax(z / tau), a
    matrix of R proposals by C classes. The cosine is of the numbers as they are, not of their differences from their
    mean as Pearson's correlation is; p is not negative, so the absolute value changes nothing and is left out. The
    guard is the source's: a class that no proposal is likely to be, whose column is 0, counts 1 without gradient.

    Args:
        student_logits, teacher_logits: z, (R, C), rows aligned. The teacher's are treated as constants.
        temperature: tau > 0.

    Returns:
        Scalar from 0 to 2 tau^2, float32 or wider; 0, connected to the graph, of no row.
    """
    own, other = (
        (x / temperature).softmax(1) for x in logits_to_compare(student_logits, teacher_logits)
    )
    if len(own) == 0:
        return own.sum()
    rows, columns = cosine(own, other, VALUE_GUARD), cosine(own.T, other.T, VALUE_GUARD)
    return temperature**2 * (2 - rows.mean() - columns.mean())


def rank_loss(student_logits: Tensor, teacher_logits: Tensor, temperature: float) -> Tensor:
    """``1 - mean over rows of Spearman's correlation`` of the classes, with :func:`soft_ranks`.

    The published ``rank_loss``, without its weight, takes ranks by a double argsort, which sends no gradient: in
    training that term is a constant. Soft ranks of both models stand for it here, so that equal logits give 0, and it
    tends to the published value as the temperature goes to 0. Their variance can be near 0, that of whole numbers
    cannot, hence the wider guard. Of two classes a correlation is 1 or -1, and sends no gradient either.

    Args:
        student_logits, teacher_logits: (R, C), rows aligned. The teacher's are treated as constants.
        temperature: epsilon > 0 of the ranks, in logits.

    Returns:
        Scalar from 0 to 2, float32 or wider; 0, connected to the graph, of no row.
    """
    own, other = (
        soft_ranks(x, temperature) for x in logits_to_compare(student_logits, teacher_logits)
    )
    if len(own) == 0:
        return own.sum()
    own, other = (x - x.mean(1, keepdim=True) for x in (own, other))
    return 1 - cosine(own, other, RANK_GUARD).mean()


def soft_ranks(values: Tensor, temperature: float) -> Tensor:
    """Ranks in each row, lowest first, that send a gradient: ``1 + sum over j != i of sigmoid((x_i - x_j) / epsilon)``.

    Of logits and epsilon = 1 each part is the probability that softmax has for class i if it must be i or j. As
    epsilon goes to 0 they become the ranks 1 to C; classes that are equal share theirs. Takes memory for R C C
    numbers.

    Args:
        values: x, (R, C).
        temperature: epsilon > 0.
    """
    over = ((values[:, :, None] - values[:, None, :]) / temperature).sigmoid()
    return over.sum(2) + 0.5  # a class counts 1/2 over itself


def cosine(a: Tensor, b: Tensor, guard: float) -> Tensor:
    """Of each row, (n, m) and (n, m) to (n,); ``guard`` is added to the product of the norms."""
    return (a * b).sum(1) / (a.norm(dim=1) * b.norm(dim=1) + guard)
