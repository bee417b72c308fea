"""Learning rate schedule of a run: linear warmup, then cosine decay.

The rate is a function of the iteration and has no state, so a rate changed on the command line
also holds after a resume. Lightning's schedulers would read the run's length before the position
in the data is restored.
"""

import math


def lr_fraction(step: int, num_steps: float, warmup_ratio: float, final_ratio: float) -> float:
    """Return the fraction of the configured learning rate at a step.

    Args:
        step: Index of the Lightning batch, from 0.
        num_steps: Lightning batches of the run. Infinite: the fraction is always 1.
        warmup_ratio: Fraction of the run over which the rate rises from 0.
        final_ratio: Fraction of the rate at the end of the decay. 1: no decay.

    Example:
        >>> [round(lr_fraction(step, 4, 0.5, 0.0), 3) for step in range(5)]
        [0.333, 0.667, 1.0, 0.5, 0.0]
    """
    if math.isinf(num_steps):
        return 1.0
    rise = warmup_ratio * num_steps
    if step < rise:
        return (step + 1) / (rise + 1)  # never 0: a step with rate 0 would be lost
    progress = min((step - rise) / max(num_steps - rise, 1), 1.0)
    return final_ratio + (1 - final_ratio) * (1 + math.cos(math.pi * progress)) / 2
