"""State that a run adapts and saves: the KL coefficient, the score scale and the score bounds."""

from collections.abc import Callable

import torch
from torch import Tensor, nn

from lit_align.errors import UserError


class Float64State(nn.Module):
    """Base of modules whose buffers stay float64, since bf16 would round small changes away.

    Float64 also makes the result independent of the number of ranks.
    """

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> nn.Module:
        # Private: `Module.to` and `Module.bfloat16` both call it. Only the device is taken from
        # the result. Checked with torch 2.13.
        for name, state in self.named_buffers(recurse=False):
            setattr(self, name, state.to(fn(state).device))
        return self


class KLController(Float64State):
    """KL coefficient that follows a target KL, arXiv:1909.08593 section 2.2.

    Args:
        coef: Start of the coefficient: reward subtracted per nat.
        target: KL to keep, in nats per response. Default: the coefficient is constant.
        horizon: Responses in which the coefficient can change by 20 %.

    Example:
        >>> controller = KLController(0.5, target=4.0, horizon=100)
        >>> controller.update(torch.tensor(6.0), torch.tensor(100.0))  # 20 % up at most
        >>> round(controller.coef.item(), 6)
        0.6
    """

    coef: Tensor  # [] reward per nat

    def __init__(self, coef: float, target: float | None = None, horizon: int = 10_000):
        super().__init__()
        if target is not None and not target > 0:
            raise UserError(
                f"kl_target must be above 0 nats per response, found {target}. "
                f"Set --model.kl_target, or null for a constant kl_coef."
            )
        if horizon < 1:
            raise UserError(
                f"kl_horizon must be at least 1 response, found {horizon}. Set --model.kl_horizon."
            )
        self.target, self.horizon = target, horizon
        start = torch.tensor(coef, dtype=torch.float64)
        self.register_buffer("coef", start, persistent=target is not None)

    def update(self, kl: Tensor, num_responses: Tensor) -> None:
        """Raise the coefficient if the KL was above the target, lower it if below.

        Args:
            kl: [] nats per response, mean over all ranks.
            num_responses: [] responses of all ranks.
        """
        if self.target is not None:
            # Clipped to 20 %: one rollout with a large KL must not set the coefficient.
            error = (kl / self.target - 1).clamp(-0.2, 0.2)
            self.coef *= 1 + error * (num_responses / self.horizon).clamp(max=1.0)


class RunningMeanStd(Float64State):
    """Mean and standard deviation of all scores of the run, by the update of Chan et al., 1979.

    Example:
        >>> scale = RunningMeanStd()
        >>> scale.update_from_moments(torch.tensor(2.0), torch.tensor(5.0), torch.tensor(4.0))
        >>> scale.normalize(torch.tensor([5.0, 9.0])).tolist()[0]
        0.0
        >>> round(scale.normalize(torch.tensor([9.0])).item(), 3)
        2.0
    """

    moments: Tensor  # [3] number, mean, sum of squared distances from the mean

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("moments", torch.zeros(3, dtype=torch.float64))

    def update_from_moments(self, number: Tensor, mean: Tensor, variance: Tensor) -> None:
        """Add the scores of one rollout of all ranks.

        Args:
            number: [] count of the scores.
            mean: [] mean of the scores.
            variance: [] unbiased variance of the scores.
        """
        old_count, old_mean, squares = self.moments.unbind()
        total, delta = (old_count + number).clamp(min=1), mean - old_mean
        # Squares about the joint mean. A sum of x^2 would cancel if the mean is large.
        between = delta.square() * old_count * number / total
        squares = squares + variance * (number - 1).clamp(min=0) + between
        self.moments = torch.stack([old_count + number, old_mean + delta * number / total, squares])

    def normalize(self, scores: Tensor) -> Tensor:
        """Return scores [N] minus the running mean, divided by the running standard deviation."""
        number, mean, squares = self.moments.unbind()
        # The first rollout is already in the moments, so a single score is normalized to 0.
        return (scores - mean) / (squares / (number - 1).clamp(min=1) + 1e-8).sqrt()


class RunningBounds(Float64State):
    """Smallest and largest score: constant, or the extremes of the run so far.

    Args:
        min_score: Smallest possible score. Not used if `running`.
        max_score: Largest possible score. Not used if `running`.
        running: Use the extremes of the scores seen so far.

    Example:
        >>> bounds = RunningBounds(0.0, 1.0, running=True)
        >>> bounds.update(torch.tensor([-2.0, 7.0]))  # scores from 2 to 7
        >>> bounds.bounds.tolist()
        [2.0, 7.0]
    """

    bounds: Tensor  # [2] smallest and largest score

    def __init__(self, min_score: float, max_score: float, running: bool):
        super().__init__()
        start = [torch.inf, -torch.inf] if running else [min_score, max_score]
        bounds = torch.tensor(start, dtype=torch.float64)
        self.register_buffer("bounds", bounds, persistent=running)

    def update(self, extremes: Tensor) -> None:
        """Widen the bounds to the scores of one rollout of all ranks.

        Args:
            extremes: [2] the negated smallest score, and the largest score. One maximum over the
                ranks then gives both.
        """
        least, largest = extremes.double().unbind()
        self.bounds = torch.stack([self.bounds[0].minimum(-least), self.bounds[1].maximum(largest)])
