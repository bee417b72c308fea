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


class _AutogradContext(Protocol):
    """The thread from the forward to the backward pass."""

    temperature: float
    saved_tensors: tuple[Tensor, ...]
    needs_input_grad: tuple[bool, ...]

    def save_for_backward(self, *tensors: Tensor | None) -> None: ...
    def mark_non_differentiable(self, *tensors: Tensor) -> None: ...


class _ChosenLogprobs(torch.autograd.Function):
    """T tokens: keeps its inputs and one fp32 number per token, its log-sum-exp."""

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
            exp_logits *= logits.clamp_(min=torch.finfo(logits.dtype).min)  # 0 x -inf
            entropy[rows] = log_total - exp_logits.sum(-1) / total
            del logits, exp_logits  # before the next chunk's are made
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
            scale = grad_logprobs[rows].unsqueeze(-1).to(error.dtype) / -ctx.temperature
            if grad_bias is not None:
                grad_bias += _matmul(error.T, scale).squeeze(-1)
            error = error.to(head.dtype)
            if grad_hidden is not None:
                grad_hidden[rows] = _matmul(error, head).mul_(scale)
            if grad_weight is not None:
                _add_matmul(grad_weight, error.T, (hidden[rows] * scale).to(head.dtype))
            del error  # before the next chunk's is made
        return grad_hidden, _cast_like(grad_weight, weight), _cast_like(grad_bias, bias), None, None


def head_logits(hidden: Tensor, head: Tensor, bias: Tensor | None, temperature: float) -> Tensor:
    """[n, V] logits / temperature of single tokens, the largest of a row moved to 0.

    The same arithmetic as in `chosen_logprobs`, for whoever samples.

    Args:
        hidden: [n, H] what the model's head sees.
        head: [V, H] of `head_matmul_weight`.
        bias: [V] of the head.
        temperature: Divides the logits.
    """
    logits = _logits(hidden, head, bias, temperature)
    _subtract_row_max(logits)
    return logits


def head_matmul_weight(weight: Tensor) -> Tensor:
    """[V, H] the head's weight as the products take it; fp32 unless a GPU sums halves in fp32."""
    return weight.to(_matmul_dtype(weight))


def _chunk_slices(num_tokens: int) -> list[slice]:
    return [slice(start, start + CHUNK_SIZE) for start in range(0, num_tokens, CHUNK_SIZE)]


def _cast_like(grad: Tensor | None, like: Tensor) -> Tensor | None:
    return None if grad is None else grad.to(like.dtype)


def _matmul_dtype(hidden: Tensor) -> torch.dtype:
    """At least fp32; half-precision factors with fp32 sums exist on a GPU only."""
    half = _has_fp32_accumulation(hidden.device) and hidden.dtype in (torch.bfloat16, torch.float16)
    return hidden.dtype if half else _sum_dtype(hidden)


def _has_fp32_accumulation(device: torch.device) -> bool:
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


def _subtract_row_max(logits: Tensor) -> Tensor:
    """Moves the largest of each row of [n, V] to 0; what it was, [n]."""
    row_max = logits.amax(-1, keepdim=True)
    logits.sub_(row_max)
    return row_max.squeeze(-1)


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
