"""The Inception score: how sure a classifier is of each image, and how many classes it sees."""

from __future__ import annotations

import torch
from torch import Tensor

from repa_scale.errors import DataError
from repa_scale.metrics.bootstrap import Estimate, by_resampling

SPLIT = 5000  # consecutive images, as the ADM suite splits them


def inception_score(logits: Tensor, split: int = SPLIT, seed: int = 0) -> Estimate:
    """Mean over splits of exp(mean KL(p(y|x) || p(y))) (Salimans et al. 2016), p(y) the mean over the split.

    Args:
        logits: (n, classes), of the classifier without its bias for agreement with the ADM suite.
        split: consecutive images a split; what is left makes a last, smaller one, which counts like the others.

    Raises:
        DataError: fewer images than classes: p(y) could not be flat, however varied they were.
    """
    count, classes = logits.shape
    if count < classes:
        raise DataError(f"the inception score of {count} images over {classes} classes says nothing; give more images")
    scores, influences = [], []
    for part in logits.split(split):
        log_p = part.double().log_softmax(1)
        p = log_p.exp()
        divergence = (p * (log_p - p.mean(0).log())).sum(1)
        score = divergence.mean().exp()
        scores.append(score)
        # Of exp(mean_i sum p_i log p_i - sum q log q): what q itself changes, cancels.
        influences.append((divergence - divergence.mean()) * score / len(part))
    influence = torch.cat(influences) * (count / len(scores))
    return by_resampling(torch.stack(scores).mean().item(), influence, seed)
