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
    """T tokens: keeps its inputs and one fp32 number per token, log of the softmax's sum."""

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
            odds = logits.exp()
            total = odds.sum(-1)
            normaliser[rows] = total.log()
            chosen = logits.gather(-1, tokens[rows].unsqueeze(-1)).squeeze(-1)
            logprobs[rows] = chosen - normaliser[rows]
            odds *= logits.clamp_(min=torch.finfo(logits.dtype).min)  # 0 times -inf would be nan
            entropy[rows] = normaliser[rows] - odds.sum(-1) / total
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
            # d logprob / d logits = (one-hot of the token - softmax) / temperature
            grad = grad_logprobs[rows].unsqueeze(-1).to(normaliser.dtype) / ctx.temperature
            logits = _logits(hidden[rows], head, bias, ctx.temperature)
            grad_logits = logits.sub_(normaliser[rows].unsqueeze(-1)).exp_().mul_(-grad)
            grad_logits.scatter_add_(-1, tokens[rows].unsqueeze(-1), grad)
            if grad_bias is not None:
                grad_bias += grad_logits.sum(0)
            if grad_hidden is not None:
                grad_hidden[rows] = _matmul(grad_logits, head)
            if grad_weight is not None:
                _add_matmul(grad_weight, grad_logits.T, hidden[rows].to(head.dtype))
            del logits, grad_logits  # before the next chunk's are made
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
    return _logits(hidden, head, bias, temperature)


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
    """[n, H] x [V, H] -> [n, V], over the temperature, the largest of a row moved to 0."""
    logits = _matmul(hidden, head.T)
    if bias is not None:
        logits += bias
    if temperature != 1:
        logits /= temperature
    return logits.sub_(logits.amax(-1, keepdim=True))


def _matmul(left: Tensor, right: Tensor) -> Tensor:
    """[n, m] x [m, k] -> [n, k]: factors in the dtype of `right`, sums in fp32, no autocast."""
    left = left.to(right.dtype)
    with torch.autocast(left.device.type, enabled=False):
        if right.dtype in (torch.float32, torch.float64):
            return left @ right
        return torch.mm(left, right, out_dtype=torch.float32)


def _add_matmul(total: Tensor, left: Tensor, right: Tensor) -> None:
    """Adds left @ right to `total`, block by block: no second tensor of its size."""
    pairs = zip(total.split(BLOCK_SIZE), left.split(BLOCK_SIZE), strict=True)
    for block, rows in pairs:
        block += _matmul(rows, right)
