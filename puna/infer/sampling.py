"""From logits to the next id."""

import torch
from torch import Tensor


def sample(logits: Tensor, temperature: float, top_p: float, generators: list[torch.Generator]) -> Tensor:
    """One id a row: (B, V) -> (B,) int64.

    Args:
        temperature: 0 takes the most likely id.
        top_p: keeps the most likely ids up to and including the one that crosses this probability (Llama 2's rule).
        generators: one a row, so that a row's text does not depend on the rows beside it.
    """
    if temperature < 1e-4:  # dividing by less overflows
        return logits.argmax(-1)
    probabilities = (logits.float() / temperature).softmax(-1)
    if top_p < 1:
        ordered, index = probabilities.sort(descending=True)
        ordered[ordered.cumsum(-1) - ordered > top_p] = 0
        probabilities = torch.zeros_like(probabilities).scatter_(-1, index, ordered)
    # By the inverse of the distribution function: multinomial draws a random number for every id of the vocabulary.
    total = probabilities.cumsum(-1)
    drawn = torch.cat([torch.rand(1, generator=g, device=logits.device) for g in generators])[:, None]
    below = (drawn * total[:, -1:]).minimum(total[:, -1:] * (1 - 2**-23))  # rounding must not reach past the last id
    return torch.searchsorted(total, below, right=True).squeeze(-1)
