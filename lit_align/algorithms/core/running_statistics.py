"""Numbers that a run adapts as it goes: a coefficient, a scale. They are saved with it."""

from collections.abc import Callable

import torch
from torch import Tensor, nn

from lit_align.errors import UserError


class Float64State(nn.Module):
    """State in float64 whatever the weights' data type: bf16 would lose each small change.

    Nor shall its rounding tell how many ranks have summed what it follows.
    """

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> nn.Module:
        for name, state in self.named_buffers(recurse=False):
            setattr(self, name, state.to(fn(state).device))
        return self


class KLController(Float64State):
    """A coefficient that keeps the KL to the reference near a target, arXiv:1909.08593 2.2.

    Args:
        coef: Reward lost per nat, to begin with.
        target: Nats per response to keep to; without one the coefficient stays.
        horizon: Responses in which the coefficient can change by 20 %.
    """

    coef: Tensor  # [] reward per nat

    def __init__(self, coef: float, target: float | None = None, horizon: int = 10_000):
        super().__init__()
        if target is not None and not target > 0:
            raise UserError(f"kl_target is in nats per response and above 0, found {target}.")
        if horizon < 1:
            raise UserError(f"kl_horizon must be at least 1 response, found {horizon}.")
        self.target, self.horizon = target, horizon
        start = torch.tensor(coef, dtype=torch.float64)
        self.register_buffer("coef", start, persistent=target is not None)

    def update(self, kl: Tensor, num_responses: Tensor) -> None:
        """Raises the coefficient where the KL was above the target, lowers it where below.

        Args:
            kl: [] nats per response, mean over all ranks.
            num_responses: [] responses of all ranks.
        """
        if self.target is not None:
            error = (kl / self.target - 1).clamp(-0.2, 0.2)
            self.coef *= 1 + error * (num_responses / self.horizon).clamp(max=1.0)


class RunningMeanStd(Float64State):
    """Mean and standard deviation of all scores seen so far (Chan et al., 1979)."""

    moments: Tensor  # [3] number, mean, sum of squared distances from the mean

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("moments", torch.zeros(3, dtype=torch.float64))

    def update_from_moments(self, number: Tensor, mean: Tensor, variance: Tensor) -> None:
        """Adds one rollout of all ranks.

        Args:
            number: [] scores.
            mean: [] of them.
            variance: [] unbiased, of them.
        """
        old_count, old_mean, squares = self.moments.unbind()
        total, delta = (old_count + number).clamp(min=1), mean - old_mean
        between = delta.square() * old_count * number / total
        squares = squares + variance * (number - 1).clamp(min=0) + between
        self.moments = torch.stack([old_count + number, old_mean + delta * number / total, squares])

    def normalize(self, scores: Tensor) -> Tensor:
        """Scores [N] less the mean, over the standard deviation."""
        number, mean, squares = self.moments.unbind()
        return (scores - mean) / (squares / (number - 1).clamp(min=1) + 1e-8).sqrt()


class RunningBounds(Float64State):
    """The least and the largest score: given, or seen so far.

    Args:
        min_score: Least possible score.
        max_score: Largest possible score.
        running: Start with none, and take those that are seen.
    """

    bounds: Tensor  # [2] least and largest

    def __init__(self, min_score: float, max_score: float, running: bool):
        super().__init__()
        start = [torch.inf, -torch.inf] if running else [min_score, max_score]
        bounds = torch.tensor(start, dtype=torch.float64)
        self.register_buffer("bounds", bounds, persistent=running)

    def update(self, extremes: Tensor) -> None:
        """Takes in a rollout of all ranks.

        Args:
            extremes: [2] the least score with its sign changed, and the largest.
        """
        least, largest = extremes.double().unbind()
        self.bounds = torch.stack([self.bounds[0].minimum(-least), self.bounds[1].maximum(largest)])
