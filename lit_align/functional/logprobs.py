"""Log-probabilities of chosen tokens without ever holding the logits of a whole batch."""

from typing import Protocol

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

CHUNK_SIZE = 512  # tokens; with one temporary of equal size 1,024 x V exist at once
BLOCK_SIZE = 16384  # rows of the weight whose gradient is added at once


def chosen_logprobs(
    hidden: Tensor,
    weight: Tensor,
    tokens: Tensor,
    *,
    bias: Tensor | None = None,
    temperature: float = 1.0,
) -> tuple[Tensor, Tensor]:
    """Log-probability of each token and entropy of the distribution it was chosen from.

    The distribution is softmax(logits / temperature) with logits = hidden weight^T + bias, over
    the whole vocabulary. At most 1,024 tokens x V logits exist at once: the backward pass computes
    them again instead of keeping them.

    Args:
        hidden: [.., H] what the model's head sees at the position before each token.
        weight: [V, H] of the head.
        tokens: [..] ids, below V.
        bias: [V] of the head.
        temperature: Divides the logits.

    Returns:
        logprobs [..] and entropy [..], both fp32 and in nats. Gradients reach hidden, weight and
        bias through logprobs; entropy is detached.
    """
    logprobs, entropy = _ChosenLogprobs.apply(
        hidden.reshape(-1, hidden.shape[-1]), weight, bias, tokens.reshape(-1), temperature
    )
    return logprobs.view(tokens.shape), entropy.view(tokens.shape)


class _Context(Protocol):
    """The thread from the forward to the backward pass."""

    temperature: float
    saved_tensors: tuple[Tensor, ...]
    needs_input_grad: tuple[bool, ...]

    def save_for_backward(self, *tensors: Tensor | None) -> None: ...
    def mark_non_differentiable(self, *tensors: Tensor) -> None: ...


class _ChosenLogprobs(torch.autograd.Function):
    """T tokens: keeps its inputs and one fp32 number per token, the log of its sum of odds."""

    @staticmethod
    def forward(
        ctx: _Context,
        hidden: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        tokens: Tensor,
        temperature: float,
    ) -> tuple[Tensor, Tensor]:
        logprobs = hidden.new_empty(len(tokens), dtype=torch.float32)
        entropy = torch.empty_like(logprobs)
        normaliser = logprobs.new_empty(len(tokens), dtype=_sum_dtype(hidden))
        head = weight.to(_factor_dtype(hidden))
        for rows in _chunks(len(tokens)):
            logits = _logits(hidden[rows], head, bias, temperature)
            most = _move_to_zero(logits)
            odds = logits.exp()
            total = odds.sum(-1)
            rest = total.log()
            normaliser[rows] = most + rest
            chosen = logits.gather(-1, tokens[rows].unsqueeze(-1)).squeeze(-1)
            logprobs[rows] = chosen - rest
            odds *= logits.clamp_(min=torch.finfo(logits.dtype).min)  # 0 times -inf would be nan
            entropy[rows] = rest - odds.sum(-1) / total
            del logits, odds  # before the next chunk's are made
        ctx.save_for_backward(hidden, weight, bias, tokens, normaliser)
        ctx.temperature = temperature
        ctx.mark_non_differentiable(entropy)
        return logprobs, entropy

    @staticmethod
    @once_differentiable
    def backward(
        ctx: _Context, grad_logprobs: Tensor, _: Tensor
    ) -> tuple[Tensor | None, Tensor | None, Tensor | None, None, None]:
        hidden, weight, bias, tokens, normaliser = ctx.saved_tensors
        for_hidden, for_weight, for_bias, *_rest = ctx.needs_input_grad
        grad_hidden = torch.empty_like(hidden) if for_hidden else None
        grad_weight = torch.zeros_like(weight, dtype=_sum_dtype(hidden)) if for_weight else None
        grad_bias = torch.zeros_like(bias, dtype=_sum_dtype(hidden)) if for_bias else None
        head = weight.to(_factor_dtype(hidden))
        for rows in _chunks(len(tokens)):
            # -d logprob / d logits = (softmax - one-hot of the token) / temperature
            away = _logits(hidden[rows], head, bias, ctx.temperature)
            away.sub_(normaliser[rows].unsqueeze(-1)).exp_()
            away.scatter_add_(-1, tokens[rows].unsqueeze(-1), -torch.ones_like(away[:, :1]))
            slope = grad_logprobs[rows].unsqueeze(-1).to(away.dtype) / -ctx.temperature
            if grad_bias is not None:
                grad_bias += _matmul(away.T, slope).squeeze(-1)
            away = away.to(head.dtype)
            if grad_hidden is not None:
                grad_hidden[rows] = _matmul(away, head).mul_(slope)
            if grad_weight is not None:
                _add_matmul(grad_weight, away.T, (hidden[rows] * slope).to(head.dtype))
            del away  # before the next chunk's is made
        return grad_hidden, _to(grad_weight, weight), _to(grad_bias, bias), None, None


def head_logits(hidden: Tensor, head: Tensor, bias: Tensor | None, temperature: float) -> Tensor:
    """[n, V] logits / temperature of single tokens, the largest of a row moved to 0.

    The same arithmetic as in `chosen_logprobs`, for whoever samples.

    Args:
        hidden: [n, H] what the model's head sees.
        head: [V, H] of `head_factor`.
        bias: [V] of the head.
        temperature: Divides the logits.
    """
    logits = _logits(hidden, head, bias, temperature)
    _move_to_zero(logits)
    return logits


def head_factor(weight: Tensor) -> Tensor:
    """[V, H] the head's weight as the products take it; fp32 unless a GPU sums halves in fp32."""
    return weight.to(_factor_dtype(weight))


def _chunks(num_tokens: int) -> list[slice]:
    return [slice(start, start + CHUNK_SIZE) for start in range(0, num_tokens, CHUNK_SIZE)]


def _to(grad: Tensor | None, like: Tensor) -> Tensor | None:
    return None if grad is None else grad.to(like.dtype)


def _factor_dtype(hidden: Tensor) -> torch.dtype:
    """At least fp32; half-precision factors with fp32 sums exist on a GPU only."""
    half = _sums_halves(hidden.device) and hidden.dtype in (torch.bfloat16, torch.float16)
    return hidden.dtype if half else _sum_dtype(hidden)


def _sums_halves(device: torch.device) -> bool:
    """Whether a device multiplies halves with sums in fp32."""
    return device.type == "cuda"


def _sum_dtype(hidden: Tensor) -> torch.dtype:
    """What sums are kept in: fp32, or float64 where the network is."""
    return torch.float64 if hidden.dtype == torch.float64 else torch.float32


def _logits(hidden: Tensor, head: Tensor, bias: Tensor | None, temperature: float) -> Tensor:
    """[n, H] x [V, H] -> [n, V], over the temperature."""
    logits = _matmul(hidden, head.T)
    if bias is not None:
        logits += bias
    if temperature != 1:
        logits /= temperature
    return logits


def _move_to_zero(logits: Tensor) -> Tensor:
    """Moves the largest of each row of [n, V] to 0; what it was, [n]."""
    most = logits.amax(-1, keepdim=True)
    logits.sub_(most)
    return most.squeeze(-1)


def _matmul(left: Tensor, right: Tensor) -> Tensor:
    """[n, m] x [m, k] -> [n, k]: factors in the dtype of `right`, sums in fp32, no autocast."""
    left = left.to(right.dtype)
    with torch.autocast(left.device.type, enabled=False):
        if right.dtype in (torch.float32, torch.float64):
            return left @ right
        return torch.mm(left, right, out_dtype=torch.float32)


def _add_matmul(total: Tensor, left: Tensor, right: Tensor) -> None:
    """Adds left @ right to `total`, with no second tensor of its size."""
    if right.dtype == total.dtype:
        with torch.autocast(left.device.type, enabled=False):
            total.addmm_(left, right)
        return
    pairs = zip(total.split(BLOCK_SIZE), left.split(BLOCK_SIZE), strict=True)
    for block, rows in pairs:
        block += _matmul(rows, right)
