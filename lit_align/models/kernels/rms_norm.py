"""RMSNorm by torch's fused function: one GPU kernel instead of the eight of transformers."""

from __future__ import annotations

import inspect

import torch
from torch import Tensor, nn
from torch.func import functional_call
from torch.nn.functional import rms_norm
from transformers import PreTrainedModel

PROBE_SIZE = 16  # hidden size of the test input: enough to compare two norms of any size
MIXED_DTYPES = ((torch.bfloat16, torch.float32), (torch.float32, torch.bfloat16))  # input, weight


class RMSNorm(nn.Module):
    """RMSNorm: x / sqrt(mean(x^2) + eps) * weight (arXiv:1910.07467, equation 4).

    The weight is shared with the replaced norm and keeps its name in the state dict.

    Args:
        norm: Norm of a network, with one weight [H].
        eps: Number added to the mean of squares.
        casts_back: Return the dtype of the input if the weight has a wider one. Default: return
            the wider dtype.

    Example:
        >>> norm = RMSNorm(nn.RMSNorm(4), eps=0.0)
        >>> norm(torch.tensor([0.0, 0.0, 0.0, 4.0])).tolist()
        [0.0, 0.0, 0.0, 2.0]
    """

    weight: nn.Parameter

    def __init__(self, norm: nn.Module, eps: float, casts_back: bool = False):
        super().__init__()
        assert isinstance(norm.weight, nn.Parameter)
        self.weight, self.eps, self.casts_back = norm.weight, eps, casts_back

    def extra_repr(self) -> str:
        """Return the size and eps for `print(network)`."""
        return f"{len(self.weight)}, eps={self.eps}"

    def forward(self, x: Tensor) -> Tensor:
        """Normalize the last dimension; dtypes are promoted as in transformers.

        Args:
            x: Input [..., H].

        Returns:
            Normalized input [..., H].
        """
        weight, shape = self.weight, self.weight.shape
        wide = torch.promote_types(x.dtype, weight.dtype)
        # torch's autocast would return fp32 on a GPU, also for a half-precision input and weight.
        with torch.autocast(x.device.type, enabled=False):
            if wide is x.dtype:
                return rms_norm(x, shape, weight.to(wide), self.eps)
            if self.casts_back:
                return rms_norm(x.to(wide), shape, weight, self.eps).to(x.dtype)
            # transformers rounds to the input's dtype before it multiplies with the weight.
            return rms_norm(x, shape, None, self.eps) * weight


def replace_rms_norms(network: PreTrainedModel) -> None:
    """Replace each norm of a network that `RMSNorm` reproduces.

    Args:
        network: Network, changed in place. Its weights may be on the meta device.
    """
    found = [(module, *each) for module in network.modules() for each in module.named_children()]
    for parent, name, norm in found:
        eps = rms_norm_eps(norm)
        if eps is None:
            continue
        # A probe instead of a list of classes: transformers has a copy in each architecture.
        for replacement in (RMSNorm(norm, eps), RMSNorm(norm, eps, casts_back=True)):
            if outputs_match(norm, replacement, eps):
                setattr(parent, name, replacement)
                break


def rms_norm_eps(norm: nn.Module) -> float | None:
    """Return the eps of an RMSNorm with one weight and one input; None for any other module.

    Args:
        norm: Module of any class.

    Example:
        >>> rms_norm_eps(nn.RMSNorm(4, eps=0.5))
        0.5
        >>> rms_norm_eps(nn.LayerNorm(4)) is None
        True
    """
    names = [name for name, _ in norm.named_parameters()]
    # A second input is a gate, as in Mamba 2.
    inputs = len(inspect.signature(norm.forward).parameters)
    if not type(norm).__name__.endswith("RMSNorm") or names != ["weight"] or inputs != 1:
        return None
    known = vars(norm).get("variance_epsilon", vars(norm).get("eps"))
    return known if isinstance(known, float) else None


@torch.no_grad()
def outputs_match(norm: nn.Module, other: nn.Module, eps: float) -> bool:
    """Return True if both modules return equal values and dtypes for a test weight.

    Gemma's norm, for example, multiplies by 1 + weight and differs.

    Args:
        norm: Norm of a network.
        other: Candidate replacement.
        eps: Number that both add to the mean of squares.
    """
    # A test weight, because the modules' own weights may still be on the meta device.
    weight = torch.linspace(-1, 2, PROBE_SIZE, device="cpu", dtype=torch.float32)
    x = torch.linspace(-3, 1, 2 * PROBE_SIZE, device="cpu", dtype=torch.float32).view(2, -1)
    x = torch.cat([x, x * eps**0.5])  # the small rows show where eps is added
    both = norm, other
    one, two = (functional_call(each, {"weight": weight}, (x,)) for each in both)
    # Check the output dtype for a wide weight (autocast) and for a wide input (FSDP2).
    types = [
        [functional_call(each, {"weight": weight.to(own)}, (x.to(given),)).dtype for each in both]
        for given, own in MIXED_DTYPES
    ]
    dtypes_match = all(left is right for left, right in types)
    return dtypes_match and torch.allclose(one, two, rtol=1e-5, atol=1e-6)
