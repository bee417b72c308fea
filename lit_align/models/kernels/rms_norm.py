"""Root mean square norms by torch's own function: on a GPU one kernel, in transformers eight."""

from __future__ import annotations

import inspect

import torch
from torch import Tensor, nn
from torch.func import functional_call
from torch.nn.functional import rms_norm
from transformers import PreTrainedModel

PROBE_SIZE = 16  # numbers in a row suffice to compare two norms of any size
MIXED_DTYPES = ((torch.bfloat16, torch.float32), (torch.float32, torch.bfloat16))


class RMSNorm(nn.Module):
    """x / root of (mean of x^2 + eps), times the weight (arXiv:1910.07467), under the same name.

    Args:
        norm: A network's own, whose weight it takes over.
        eps: Of that.
        casts_back: Whether the result is of the input's type where the weight's is wider.
    """

    weight: nn.Parameter

    def __init__(self, norm: nn.Module, eps: float, casts_back: bool = False):
        super().__init__()
        assert isinstance(norm.weight, nn.Parameter)
        self.weight, self.eps, self.casts_back = norm.weight, eps, casts_back

    def extra_repr(self) -> str:
        """What `print` shows."""
        return f"{len(self.weight)}, eps={self.eps}"

    def forward(self, x: Tensor) -> Tensor:
        """[.., H] -> [.., H]; types meet as in transformers, not as in torch's autocast."""
        weight, shape = self.weight, self.weight.shape
        wide = torch.promote_types(x.dtype, weight.dtype)
        with torch.autocast(x.device.type, enabled=False):
            if wide is x.dtype:
                return rms_norm(x, shape, weight.to(wide), self.eps)
            if self.casts_back:
                return rms_norm(x.to(wide), shape, weight, self.eps).to(x.dtype)
            return rms_norm(x, shape, None, self.eps) * weight


def replace_rms_norms(network: PreTrainedModel) -> None:
    """Puts torch's function in the place of each norm that says the same.

    Args:
        network: Its weights may still be in their files.
    """
    found = [(module, *each) for module in network.modules() for each in module.named_children()]
    for parent, name, norm in found:
        eps = rms_norm_eps(norm)
        if eps is None:
            continue
        for other in (RMSNorm(norm, eps), RMSNorm(norm, eps, casts_back=True)):
            if outputs_match(norm, other, eps):
                setattr(parent, name, other)
                break


def rms_norm_eps(norm: nn.Module) -> float | None:
    """What an RMSNorm of one weight and one input adds to the mean; None: it is none."""
    names = [name for name, _ in norm.named_parameters()]
    inputs = len(inspect.signature(norm.forward).parameters)
    if not type(norm).__name__.endswith("RMSNorm") or names != ["weight"] or inputs != 1:
        return None
    known = vars(norm).get("variance_epsilon", vars(norm).get("eps"))
    return known if isinstance(known, float) else None


@torch.no_grad()
def outputs_match(norm: nn.Module, other: nn.Module, eps: float) -> bool:
    """Whether two norms agree on numbers and types, with a weight that is not theirs.

    They may have none yet. Gemma's, which multiplies by 1 + weight, does not agree.

    Args:
        norm: A network's own.
        other: What might stand in its place.
        eps: Of both.
    """
    weight = torch.linspace(-1, 2, PROBE_SIZE, device="cpu", dtype=torch.float32)
    x = torch.linspace(-3, 1, 2 * PROBE_SIZE, device="cpu", dtype=torch.float32).view(2, -1)
    x = torch.cat([x, x * eps**0.5])  # rows in which eps counts
    both = norm, other
    one, two = (functional_call(each, {"weight": weight}, (x,)) for each in both)
    types = [
        [functional_call(each, {"weight": weight.to(own)}, (x.to(given),)).dtype for each in both]
        for given, own in MIXED_DTYPES
    ]
    dtypes_match = all(mine is its for mine, its in types)
    return dtypes_match and torch.allclose(one, two, rtol=1e-5, atol=1e-6)
