"""What a planned run believes: that there are N ranks, a card, and no need of values."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, nullcontext
from typing import Any

import torch
from lightning.fabric.plugins.environments.cluster_environment import ClusterEnvironment
from torch import Tensor, distributed, nn
from torch._subclasses.fake_tensor import FakeTensor
from torch.distributed.fsdp._fully_shard._fsdp_param_group import FSDPParamGroup
from torch.distributed.tensor import DTensor
from torch.distributed.tensor._sharding_prop import ShardingPropagator
from torch.distributed.tensor.debug import _clear_sharding_prop_cache
from torch.nn.functional import rms_norm
from torch.optim import optimizer as torch_optimizer
from torch.testing._internal.distributed.fake_pg import FakeStore
from torch.utils import _foreach_utils
from torch.utils._python_dispatch import _disable_current_modes
from transformers import DynamicCache, PreTrainedModel, masking_utils

from lit_align.functional import logprobs
from lit_align.models import backbone, policy
from lit_align.models.generation import prefill
from lit_align.models.generation.static_cache import FixedContext
from lit_align.models.kernels import rms_norm as norms
from lit_align.models.kernels import varlen_attention as packing
from lit_align.models.parallel import sharding
from lit_align.models.parallel.offload import Sleeper, stays
from lit_align.models.policy import Policy
from lit_align.plan.architectures import empty_weights
from lit_align.plan.decode_steps import last_tokens, read_ends
from lit_align.plan.dispatch_mode import making
from lit_align.plan.gpu_kernels import attention, norm
from lit_align.plan.memory_tracker import Kind, Ledger, Place
from lit_align.rewards import reward_model as learned

compare_norms = norms.says_the_same  # as it is outside of a plan


class OneOfMany(ClusterEnvironment):
    """The first of N ranks, of which nobody starts the others.

    Args:
        ranks: N.
        per_node: Ranks of a node.
    """

    def __init__(self, ranks: int, per_node: int):
        super().__init__()
        self.ranks, self.per_node = ranks, per_node

    creates_processes_externally = True
    main_address, main_port = "127.0.0.1", 0

    @staticmethod
    def detect() -> bool:
        """Is never found, only given."""
        return False

    def world_size(self) -> int:
        """N."""
        return self.ranks

    def set_world_size(self, size: int) -> None:
        """It is known already."""

    def global_rank(self) -> int:
        """The first, which has the largest share."""
        return 0

    def set_global_rank(self, rank: int) -> None:
        """It is known already."""

    def local_rank(self) -> int:
        """The first."""
        return 0

    def node_rank(self) -> int:
        """The first."""
        return 0


@contextmanager
def group_of(ranks: int) -> Iterator[None]:
    """A process group of so many ranks in which nobody answers."""
    distributed.init_process_group("fake", rank=0, world_size=ranks, store=FakeStore())
    try:
        yield
    finally:
        distributed.destroy_process_group()
        _clear_sharding_prop_cache()  # equal meshes share its answers, which are of this rank


@contextmanager
def replaced(owner: Any, **others: Any) -> Iterator[None]:
    """Other attributes for a while."""
    before = {name: getattr(owner, name) for name in others}
    for name, other in others.items():
        setattr(owner, name, other)
    try:
        yield
    finally:
        for name, old in before.items():
            setattr(owner, name, old)


@contextmanager
def told(ledger: Ledger) -> Iterator[None]:
    """Caches, collectives and storages that change their size say so to the ledger."""
    resize = torch.UntypedStorage.resize_
    shape_of = ShardingPropagator._propagate_tensor_meta_non_cached

    def resized(storage: torch.UntypedStorage, size: int) -> torch.UntypedStorage:
        resize(storage, size)
        ledger.resized(storage)
        return storage

    def unseen(*args: Any) -> Any:  # tensors of whole shapes without memory
        with ledger.unseen():
            return shape_of(*args)

    with ExitStack() as stack:
        stack.enter_context(replaced(ShardingPropagator, _propagate_tensor_meta_non_cached=unseen))
        stack.enter_context(replaced(torch.UntypedStorage, resize_=resized))
        stack.enter_context(replaced(FSDPParamGroup, **collectives(ledger)))
        cached = of_kind(ledger, Kind.CACHE, DynamicCache, "update", "batch_select_indices")
        stack.enter_context(replaced(DynamicCache, **cached))
        stack.enter_context(replaced(prefill, **of_kind(ledger, Kind.CACHE, prefill, "joined")))
        fixed = of_kind(ledger, Kind.CACHE, FixedContext, "fix")
        stack.enter_context(replaced(FixedContext, **fixed))
        yield


def of_kind(ledger: Ledger, kind: Kind, owner: Any, *names: str) -> dict[str, Callable[..., Any]]:
    """Methods of a class or functions of a module, by name, that fill one category."""

    def marked(method: Callable[..., Any]) -> Callable[..., Any]:
        def inside(*args: Any, **kwargs: Any) -> Any:
            with making(ledger, kind, Place.DEVICE):
                return method(*args, **kwargs)

        return inside

    return {name: marked(getattr(owner, name)) for name in names}


def collectives(ledger: Ledger) -> dict[str, Callable[..., Any]]:
    """FSDP2's, by name: what they gather, and the gradients that they leave."""
    names = ("unshard", "wait_for_unshard", "post_backward")
    marked = of_kind(ledger, Kind.GATHERED, FSDPParamGroup, *names)
    reduce = marked["post_backward"]

    def post_backward(group: FSDPParamGroup, *unused: Any) -> None:
        reduce(group, *unused)
        for param in group.fsdp_params:
            whole = getattr(param, "unsharded_accumulated_grad", None)
            for gradient in (param.sharded_param.grad, whole):
                if gradient is not None:
                    ledger.tell(gradient, Kind.GRADIENTS)

    return {**marked, "post_backward": post_backward}


@contextmanager
def without_values(ledger: Ledger, memory: int) -> Iterator[None]:
    """Weights are not compared, answers run to their end, and `memory` bytes are to be had."""

    def fits(model: nn.Module, unsharded_size: int) -> bool:
        free = memory - ledger.total[Place.DEVICE]
        return sharding.room_for(model, unsharded_size, free) >= 0

    def load(*args: Any) -> tuple[PreTrainedModel, list[str], None]:
        # where ranks share weights, each reads its own rows alone, once it knows which
        with ledger.unseen() if args[-1] else nullcontext():
            return empty_weights(*args)

    search = masking_utils.find_packed_sequence_indices

    def no_packed_rows(positions: Tensor) -> None:
        search(positions)

    with ExitStack() as stack:
        stack.enter_context(replaced(FakeTensor, __deepcopy__=copied))
        stack.enter_context(replaced(nn.Module, _apply=applied))
        stack.enter_context(replaced(masking_utils, find_packed_sequence_indices=no_packed_rows))
        stack.enter_context(replaced(backbone, load_network=load))
        stack.enter_context(replaced(learned, load_tokenizer=lambda *given: None))
        stack.enter_context(replaced(policy, decode=last_tokens, largest=int))
        stack.enter_context(replaced(prefill, read_parts=read_ends))
        stack.enter_context(replaced(Policy, verify=verify))
        stack.enter_context(replaced(norms, says_the_same=says_the_same))
        stack.enter_context(replaced(sharding, fits=fits))
        for module in (torch_optimizer, _foreach_utils):  # fake weights are steps' lists, too
            kinds = [*module._foreach_supported_types, FakeTensor]
            stack.enter_context(replaced(module, _foreach_supported_types=kinds))
        yield


@torch.no_grad()
def verify(network: Policy) -> None:
    """`Policy.verify` by what the configuration says."""
    if getattr(network.network.config, "final_logit_softcapping", None):
        raise ValueError(
            f"{network.name} changes its logits after the output head: soft-capped or scaled "
            f"logits are not supported."
        )
    if not network.defers_loading:
        network(network._faithful)


def says_the_same(norm: nn.Module, other: nn.Module, eps: float) -> bool:
    """`norms.says_the_same` of real numbers and by the real function, where a plan has neither."""
    with _disable_current_modes(), replaced(norms, rms_norm=rms_norm):
        return compare_norms(norm, other, eps)


def applied(
    module: nn.Module, change: Callable[[Tensor], Tensor], recurse: bool = True
) -> nn.Module:
    """`Module._apply` for fake weights, which torch's own would swap; most changes are none."""
    for child in module.children() if recurse else ():
        child._apply(change)
    for name, weight in module._parameters.items():
        if weight is not None:
            with torch.no_grad():
                other = change(weight)
            if other is not weight:
                module._parameters[name] = nn.Parameter(other, weight.requires_grad)
    for name, buffer in module._buffers.items():
        if buffer is not None:
            module._buffers[name] = change(buffer)
    return module


def copied(tensor: Tensor, memo: dict[int, Any]) -> Tensor:
    """`deepcopy` of a fake tensor; torch's own would copy the mode that it belongs to."""
    if id(tensor) not in memo:
        copy = tensor.detach().clone()
        is_weight = isinstance(tensor, nn.Parameter)
        memo[id(tensor)] = nn.Parameter(copy, tensor.requires_grad) if is_weight else copy
    found: Tensor = memo[id(tensor)]
    return found


@contextmanager
def as_on_a_card(ledger: Ledger) -> Iterator[None]:
    """Kernels, optimizers and parking as on a GPU, of tensors that are on the CPU."""
    places: dict[Sleeper, dict[Tensor, Tensor]] = {}

    def park(sleeper: Sleeper) -> None:
        own = places.setdefault(sleeper, {})
        for tensor in sleeper.tensors():
            if isinstance(tensor, DTensor) or stays(tensor):
                continue
            if tensor not in own:
                with making(ledger, Kind.PARAMETERS, Place.HOST):
                    own[tensor] = torch.empty_like(tensor)
            ledger.empty(tensor)

    def wake(sleeper: Sleeper) -> None:
        for tensor in places.get(sleeper, {}):
            ledger.fill(tensor)

    def lists() -> list[str]:
        return ["cpu"]

    stay = Policy.stays

    def recorded(policy: Policy, device: torch.device) -> bool:
        return stay(policy, torch.device("cuda"))

    with ExitStack() as stack:
        stack.enter_context(replaced(Sleeper, park=park, wake=wake))
        stack.enter_context(replaced(torch.nn.functional, scaled_dot_product_attention=attention))
        stack.enter_context(replaced(norms, rms_norm=norm))
        stack.enter_context(replaced(Policy, stays=recorded))
        stack.enter_context(replaced(packing, has_kernel=lambda kind: True))
        stack.enter_context(replaced(logprobs, _sums_halves=lambda device: True))
        for module in (torch_optimizer, _foreach_utils):
            stack.enter_context(replaced(module, _get_foreach_kernels_supported_devices=lists))
        yield
