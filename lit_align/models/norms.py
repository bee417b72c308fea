"""Root mean square norms by torch's own function: on a GPU one kernel, in transformers six."""

from __future__ import annotations

import inspect

import torch
from torch import Tensor, nn
from torch.func import functional_call
from torch.nn.functional import rms_norm
from transformers import PreTrainedModel


class RMSNorm(nn.RMSNorm):
    """x / root of (mean of x^2 + eps), times the weight (arXiv:1910.07467), under the same name.

    Args:
        norm: A network's own, whose weight it takes over.
        eps: Of that.
    """

    weight: nn.Parameter

    def __init__(self, norm: nn.Module, eps: float):
        assert isinstance(norm.weight, nn.Parameter)
        super().__init__(len(norm.weight), eps, elementwise_affine=False)
        self.weight = norm.weight

    def forward(self, x: Tensor) -> Tensor:
        """[.., H] -> [.., H]; of the weight's type where that is the wider one."""
        if torch.promote_types(x.dtype, self.weight.dtype) is x.dtype:
            return rms_norm(x, self.normalized_shape, self.weight.to(x.dtype), self.eps)
        return rms_norm(x, self.normalized_shape, None, self.eps) * self.weight


def replace_norms(network: PreTrainedModel) -> None:
    """Puts torch's function in the place of each norm that says the same.

    Args:
        network: Its weights may still be in their files.
    """
    found = [(module, *each) for module in network.modules() for each in module.named_children()]
    for parent, name, norm in found:
        eps = epsilon(norm)
        if eps is not None and says_the_same(norm, RMSNorm(norm, eps)):
            setattr(parent, name, RMSNorm(norm, eps))


def epsilon(norm: nn.Module) -> float | None:
    """What a norm of one weight and one input adds to the mean; None: it is none."""
    names = [name for name, _ in norm.named_parameters()]
    inputs = len(inspect.signature(norm.forward).parameters)
    if not type(norm).__name__.endswith("RMSNorm") or names != ["weight"] or inputs != 1:
        return None
    eps: float | None = getattr(norm, "variance_epsilon", getattr(norm, "eps", None))
    return eps


@torch.no_grad()
def says_the_same(norm: nn.Module, other: nn.Module) -> bool:
    """Whether two norms agree on numbers, with a weight that is not theirs: they may have none.

    Gemma's, which multiplies by 1 + weight, does not.
    """
    size = norm.weight.shape
    assert isinstance(size, torch.Size)
    weight = torch.linspace(-1, 2, size[0], device="cpu")
    x = torch.linspace(-3, 1, 2 * size[0], device="cpu").view(2, -1)
    one, two = (functional_call(each, {"weight": weight}, (x,)) for each in (norm, other))
    return torch.allclose(one, two, rtol=1e-5, atol=1e-6)
