"""Log-probs of chosen tokens, computed so that only one chunk of logits is in memory.

T tokens, V vocabulary, H hidden size.
"""

from typing import Protocol

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

CHUNK_SIZE = 512  # tokens; with one temporary of equal size 1,024 x V numbers exist at once
BLOCK_SIZE = 16384  # rows of the weight whose gradient is added at once


def chosen_logprobs(
    hidden: Tensor,
    weight: Tensor,
    tokens: Tensor,
    *,
    bias: Tensor | None = None,
    temperature: float = 1.0,
) -> tuple[Tensor, Tensor]:
    """Return the log-prob of each token and the entropy of its distribution, [..] fp32 in nats.

    The distribution is softmax(logits / temperature), logits = hidden weight^T + bias. At most
    1,024 x V logits exist at once; backward computes them again. Gradients reach hidden, weight
    and bias through the log-probs. The entropy is detached.

    Args:
        hidden: [.., H] input of the head at the position before each token.
        weight: [V, H] weight of the head.
        tokens: [..] token ids, below V.
        bias: [V] bias of the head. None means that it has none.
        temperature: Divisor of the logits.

    Example:
        >>> hidden, weight = torch.tensor([[3.0]]).log(), torch.tensor([[0.0], [1.0]])
        >>> logprobs, _ = chosen_logprobs(hidden, weight, torch.tensor([1]))
        >>> logprobs.exp()  # logits 0 and log 3
        tensor([0.7500])
    """
    logprobs, entropy = _ChosenLogprobs.apply(
        hidden.reshape(-1, hidden.shape[-1]), weight, bias, tokens.reshape(-1), temperature
    )
    return logprobs.view(tokens.shape), entropy.view(tokens.shape)


class _AutogradContext(Protocol):
    """Type of the `ctx` argument of an autograd function."""

    temperature: float
    saved_tensors: tuple[Tensor, ...]
    needs_input_grad: tuple[bool, ...]

    def save_for_backward(self, *tensors: Tensor | None) -> None: ...
    def mark_non_differentiable(self, *tensors: Tensor) -> None: ...


class _ChosenLogprobs(torch.autograd.Function):
    """Log-probs and entropy [T]; saves its inputs and one log-sum-exp per token for backward."""

    @staticmethod
    def forward(
        ctx: _AutogradContext,
        hidden: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        tokens: Tensor,
        temperature: float,
    ) -> tuple[Tensor, Tensor]:
        logprobs = hidden.new_empty(len(tokens), dtype=torch.float32)
        entropy = torch.empty_like(logprobs)
        log_normalizer = logprobs.new_empty(len(tokens), dtype=_sum_dtype(hidden))
        head = weight.to(_matmul_dtype(hidden))
        for rows in _chunk_slices(len(tokens)):
            logits = _logits(hidden[rows], head, bias, temperature)
            row_max = _subtract_row_max(logits)
            exp_logits = logits.exp()
            total = exp_logits.sum(-1)
            log_total = total.log()
            log_normalizer[rows] = row_max + log_total
            chosen = logits.gather(-1, tokens[rows].unsqueeze(-1)).squeeze(-1)
            logprobs[rows] = chosen - log_total
            # a token with logit -inf has probability 0, and 0 x -inf would be NaN
            exp_logits *= logits.clamp_(min=torch.finfo(logits.dtype).min)
            entropy[rows] = log_total - exp_logits.sum(-1) / total
            del logits, exp_logits  # else the next chunk would be a third tensor of their size
        ctx.save_for_backward(hidden, weight, bias, tokens, log_normalizer)
        ctx.temperature = temperature
        ctx.mark_non_differentiable(entropy)
        return logprobs, entropy

    @staticmethod
    @once_differentiable
    def backward(
        ctx: _AutogradContext, grad_logprobs: Tensor, _: Tensor
    ) -> tuple[Tensor | None, Tensor | None, Tensor | None, None, None]:
        hidden, weight, bias, tokens, log_normalizer = ctx.saved_tensors
        needs_hidden, needs_weight, needs_bias, *_rest = ctx.needs_input_grad
        grad_hidden = torch.empty_like(hidden) if needs_hidden else None
        grad_weight = torch.zeros_like(weight, dtype=_sum_dtype(hidden)) if needs_weight else None
        grad_bias = torch.zeros_like(bias, dtype=_sum_dtype(hidden)) if needs_bias else None
        head = weight.to(_matmul_dtype(hidden))
        for rows in _chunk_slices(len(tokens)):
            # -d logprob / d logits = (softmax - one-hot of the token) / temperature
            error = _logits(hidden[rows], head, bias, ctx.temperature)
            error.sub_(log_normalizer[rows].unsqueeze(-1)).exp_()
            error.scatter_add_(-1, tokens[rows].unsqueeze(-1), -torch.ones_like(error[:, :1]))
            # `scale` multiplies the small side of each product, not the [chunk, V] error
            scale = grad_logprobs[rows].unsqueeze(-1).to(error.dtype) / -ctx.temperature
            if grad_bias is not None:
                grad_bias += _matmul(error.T, scale).squeeze(-1)
            error = error.to(head.dtype)
            if grad_hidden is not None:
                grad_hidden[rows] = _matmul(error, head).mul_(scale)
            if grad_weight is not None:
                _add_matmul(grad_weight, error.T, (hidden[rows] * scale).to(head.dtype))
            del error  # else two chunks would exist at once
        return grad_hidden, _cast_like(grad_weight, weight), _cast_like(grad_bias, bias), None, None


def head_logits(hidden: Tensor, head: Tensor, bias: Tensor | None, temperature: float) -> Tensor:
    """Return logits / temperature [n, V] of single tokens, minus the largest of each row.

    Uses the same dtypes as `chosen_logprobs`, so sampling and scoring give equal log-probs.

    Args:
        hidden: [n, H] input of the head.
        head: [V, H] result of `head_matmul_weight`.
        bias: [V] bias of the head. None means that it has none.
        temperature: Divisor of the logits.

    Example:
        >>> head_logits(torch.tensor([[1.0]]), torch.tensor([[1.0], [3.0]]), None, 2.0).tolist()
        [[-1.0, 0.0]]
    """
    logits = _logits(hidden, head, bias, temperature)
    _subtract_row_max(logits)
    return logits


def head_matmul_weight(weight: Tensor) -> Tensor:
    """Return the weight of the head [V, H] in the dtype of its matrix products.

    Half precision stays on a GPU, which sums its products in fp32. On other devices it becomes
    fp32.

    Args:
        weight: [V, H] weight of the head.

    Example:
        >>> head_matmul_weight(torch.ones(2, 3, dtype=torch.bfloat16)).dtype
        torch.float32
    """
    return weight.to(_matmul_dtype(weight))


def _chunk_slices(num_tokens: int) -> list[slice]:
    return [slice(start, start + CHUNK_SIZE) for start in range(0, num_tokens, CHUNK_SIZE)]


def _cast_like(grad: Tensor | None, like: Tensor) -> Tensor | None:
    return None if grad is None else grad.to(like.dtype)


def _matmul_dtype(hidden: Tensor) -> torch.dtype:
    """Return the dtype of the factors: half precision on a GPU, else at least fp32."""
    half = _has_fp32_accumulation(hidden.device) and hidden.dtype in (torch.bfloat16, torch.float16)
    return hidden.dtype if half else _sum_dtype(hidden)


def _has_fp32_accumulation(device: torch.device) -> bool:
    """Return True if the device multiplies half precision with sums in fp32."""
    return device.type == "cuda"


def _sum_dtype(hidden: Tensor) -> torch.dtype:
    """Return the dtype of sums: float64 for a float64 network, else fp32."""
    return torch.float64 if hidden.dtype == torch.float64 else torch.float32


def _logits(hidden: Tensor, head: Tensor, bias: Tensor | None, temperature: float) -> Tensor:
    """Return the logits over the temperature, [n, H] x [V, H] -> [n, V]."""
    logits = _matmul(hidden, head.T)
    if bias is not None:
        logits += bias
    if temperature != 1:
        logits /= temperature
    return logits


def _subtract_row_max(logits: Tensor) -> Tensor:
    """Subtract the maximum of each row of [n, V] in place and return the maxima [n]."""
    row_max = logits.amax(-1, keepdim=True)
    logits.sub_(row_max)
    return row_max.squeeze(-1)


def _matmul(left: Tensor, right: Tensor) -> Tensor:
    """Return left @ right [n, k] with factors in the dtype of `right` and sums in fp32."""
    left = left.to(right.dtype)
    with torch.autocast(left.device.type, enabled=False):  # it would round the sums
        if right.dtype in (torch.float32, torch.float64):
            return left @ right
        return torch.mm(left, right, out_dtype=torch.float32)


def _add_matmul(total: Tensor, left: Tensor, right: Tensor) -> None:
    """Add left @ right to `total` without a second tensor of its size."""
    if right.dtype == total.dtype:
        with torch.autocast(left.device.type, enabled=False):
            total.addmm_(left, right)
        return
    pairs = zip(total.split(BLOCK_SIZE), left.split(BLOCK_SIZE), strict=True)
    for block, rows in pairs:
        block += _matmul(rows, right)
