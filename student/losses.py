"""The student's losses: small functions of logits and vectors, so that each can be checked by hand."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn.functional import cross_entropy, log_softmax, normalize, softplus


def mixed_cross_entropy(
    logits: Tensor,
    gold: Tensor,
    soft: Tensor,
    mix: Tensor,
    weight: Tensor,
    *,
    temperature: float = 1.0,
    class_weight: Tensor | None = None,
) -> Tensor:
    """Soft cross-entropy with temperature (Hinton et al., arXiv 1503.02531) mixed with the human grade;
    a scalar.

    Row i costs mix_i · CE(gold_i, logits_i) + (1 − mix_i) · T² · CE(softmax(log soft_i / T), logits_i / T); T² keeps the
    size of the gradient independent of T. The mean is over the summed row weights, so a batch of doubtful rows moves the
    model as far as its rows are worth relative to each other.

    Parameters: logits (B, K); gold (B, K), the human grade as a distribution, and soft (B, K), the teacher's: rows sum to
    1, or to 0 where unknown (there mix must be 0 or 1); mix and weight (B,); class_weight (K,) or None.
    """
    # Relative to the likeliest grade, whose power is 1 at any temperature: at a low one all of them would become 0.
    likeliest = soft.max(dim=1, keepdim=True).values.clamp(min=1e-12)
    sharpened = (soft.clamp(min=0) / likeliest) ** (1.0 / temperature)
    sharpened = sharpened / sharpened.sum(dim=1, keepdim=True).clamp(min=1e-12)
    scale = torch.ones_like(logits[0]) if class_weight is None else class_weight
    from_gold = -(scale * gold * log_softmax(logits, dim=1)).sum(dim=1)
    from_teacher = -(scale * sharpened * log_softmax(logits / temperature, dim=1)).sum(dim=1) * temperature**2
    rows = mix * from_gold + (1 - mix) * from_teacher
    return (weight * rows).sum() / weight.sum().clamp(min=1e-12)


def margin_mse(logits: Tensor, target: Tensor, query_id: Tensor, weight: Tensor) -> Tensor:
    """Margin-MSE (Hofstätter et al., arXiv 2010.02666) over all pairs of rows of one query in the batch; a scalar.

    The score is the expected grade, so the margins of teacher and student are on one scale: (s_i − s_j − t_i + t_j)².
    0 when no query has two rows.

    Parameters: logits (B, K); target (B, K) the distribution to follow; query_id int64 (B,); weight (B,).
    """
    student, teacher = _expected_grades(logits, target)
    error = student - teacher
    same = torch.triu(query_id.unsqueeze(0) == query_id.unsqueeze(1), diagonal=1)
    pair_weight = same * (weight.unsqueeze(0) * weight.unsqueeze(1)).sqrt()
    squared = (error.unsqueeze(0) - error.unsqueeze(1)) ** 2
    return (pair_weight * squared).sum() / pair_weight.sum().clamp(min=1e-12)


def listnet(logits: Tensor, target: Tensor, query_id: Tensor, weight: Tensor) -> Tensor:
    """ListNet (Cao et al., ICML 2007) over the rows of each query in the batch; a scalar.

    Expected grades make a distribution over a query's rows, exp(t_i) / Σ exp(t_j); the student's, from its own expected
    grades, costs its cross-entropy against the target's. The mean is over queries of two rows or more, each with the
    weight of its rows; 0 when there is none.

    Parameters: logits (B, K); target (B, K) the distribution to follow; query_id int64 (B,); weight (B,).
    """
    student, teacher = _expected_grades(logits, target)
    same = query_id.unsqueeze(0) == query_id.unsqueeze(1)

    def log_shares(score: Tensor) -> Tensor:
        return score - score.unsqueeze(0).masked_fill(~same, float("-inf")).logsumexp(dim=1)

    share = weight * log_shares(teacher).exp() * (same.sum(dim=1) > 1)
    return -(share * log_shares(student)).sum() / share.sum().clamp(min=1e-12)


def lambda_loss(logits: Tensor, target: Tensor, query_id: Tensor, weight: Tensor) -> Tensor:
    """LambdaLoss, variant NDCG-Loss2 (Wang et al., CIKM 2018), over the rows of each query in the batch; a scalar.

    A pair of rows whose targets differ costs log(1 + exp(s_j − s_i)), s the expected grades and t_i > t_j, with the weight
    |G_i − G_j| · |1/log2(1 + d) − 1/log2(2 + d)|: G = (2^t − 1) / (the query's best DCG), d the distance of the two rows in
    the student's present order. The mean is over these weights; 0 when no query has two rows of different targets.

    Parameters: as in `listnet`.
    """
    student, teacher = _expected_grades(logits, target)
    same = query_id.unsqueeze(0) == query_id.unsqueeze(1)

    def rank(score: Tensor) -> Tensor:
        """1 for the best row of each query; equal rows in the order of the batch."""
        first = torch.triu(torch.ones_like(same), diagonal=1).T
        above = score.unsqueeze(0) - score.unsqueeze(1)
        return 1 + (same & ((above > 0) | ((above == 0) & first))).sum(dim=1)

    with torch.no_grad():
        gain = 2**teacher - 1
        best = same.to(gain) @ (gain / torch.log2(1.0 + rank(teacher)))
        gain = gain / best.clamp(min=1e-12)
        place = rank(student)
        distance = (place.unsqueeze(0) - place.unsqueeze(1)).abs().clamp(min=1)
        discount = 1 / torch.log2(1.0 + distance) - 1 / torch.log2(2.0 + distance)
        above = same & (teacher.unsqueeze(1) > teacher.unsqueeze(0))
        pair = above * discount * (gain.unsqueeze(1) - gain.unsqueeze(0)).abs()
        pair = pair * (weight.unsqueeze(0) * weight.unsqueeze(1)).sqrt()
    cost = softplus(student.unsqueeze(0) - student.unsqueeze(1))
    return (pair * cost).sum() / pair.sum().clamp(min=1e-12)


def _expected_grades(logits: Tensor, target: Tensor) -> tuple[Tensor, Tensor]:
    """Those (B,) of the student and of the target."""
    grades = torch.arange(logits.shape[1], dtype=logits.dtype, device=logits.device)
    return logits.softmax(dim=1) @ grades, target @ grades


def squared_emd(logits: Tensor, target: Tensor, weight: Tensor) -> Tensor:
    """Squared earth mover's distance between grade distributions (Hou et al., arXiv 1611.05916); a scalar.

    Σ_k (P(grade ≤ k) − Q(grade ≤ k))², so that a guess two grades off costs more than one next to the truth, which
    cross-entropy does not know. The mean is over the summed weights.

    Parameters: logits (B, K); target (B, K) the distribution to follow; weight (B,).
    """
    distance = ((logits.softmax(dim=1) - target).cumsum(dim=1) ** 2).sum(dim=1)
    return (weight * distance).sum() / weight.sum().clamp(min=1e-12)


def reasoning_contrast(plain: Tensor, reasoned: Tensor, weight: Tensor, temperature: float) -> Tensor:
    """InfoNCE that draws a pair's vector to what it is when the teacher's reason can be read; a scalar.

    Contrastive reasoning self-distillation (Xia et al., arXiv 2510.11056): one model sees a pair without and with the
    reason; row i of `plain` must find row i of `reasoned` among all rows of the batch, by cosine. The reasoned side is the
    teacher and gets no gradient. 0 for fewer than two rows. The abstract fixes the two views and the loss; that the reasoned
    side is held fixed, and the temperature, are our choices.

    Parameters: plain and reasoned (B, D); weight (B,).
    """
    if len(plain) < 2:
        return plain.sum() * 0
    cosine = normalize(plain, dim=1) @ normalize(reasoned.detach(), dim=1).T
    rows = cross_entropy(cosine / temperature, torch.arange(len(plain), device=plain.device), reduction="none")
    return (weight * rows).sum() / weight.sum().clamp(min=1e-12)


def blended_target(gold: Tensor, soft: Tensor, mix: Tensor) -> Tensor:
    """The one distribution (B, K) that a row teaches: mix · gold + (1 − mix) · soft."""
    return mix.unsqueeze(1) * gold + (1 - mix.unsqueeze(1)) * soft


def class_weights(target: Tensor, weight: Tensor, power: float) -> Tensor | None:
    """Weights (K,) ∝ frequency^−power, with a weighted mean of 1 over the rows; None when `power` is 0.

    A grade that no row has keeps weight 0: nothing can be learned of it.
    """
    if power == 0:
        return None
    frequency = (weight.unsqueeze(1) * target).sum(dim=0) / weight.sum()
    raw = torch.where(frequency > 1e-6, frequency.clamp(min=1e-6) ** -power, torch.zeros_like(frequency))
    return raw / (raw * frequency).sum()
