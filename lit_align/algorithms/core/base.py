"""What every algorithm shares: losses in, one optimizer step out."""

from __future__ import annotations

import math
from abc import abstractmethod
from collections.abc import Callable, Iterator, Mapping
from typing import Any, TypeVar

import torch
from lightning.pytorch.cli import OptimizerCallable
from lightning.pytorch.core.optimizer import LightningOptimizer
from lightning.pytorch.strategies import DDPStrategy, FSDPStrategy, ModelParallelStrategy
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from torch.nn.parallel import DistributedDataParallel
from torch.optim import AdamW, Optimizer

from lit_align.algorithms.core.metrics import Measuring
from lit_align.batches import AnyBatch, microbatches
from lit_align.models.backbone import Backbone
from lit_align.models.parallel.fsdp2 import FSDP2
from lit_align.models.parallel.sharding import Sharding, reshard, synchronise
from lit_align.models.roles import Role, whole
from lit_align.models.weights.state_dict_check import check_fit, shapes

Network = TypeVar("Network", bound=Backbone)


class Algorithm(Measuring):
    """A role or more to train, and the losses they learn from.

    One Lightning batch is one step of the schedule. `update` owns the optimizer step, so that
    results depend neither on micro-batches nor on the number of ranks.

    Args:
        optimizer: Optimizer class and settings.
        warmup: Share of the run over which the learning rate rises from 0.
        final_lr: Share of the learning rate left at the end of its cosine decay, 1 for no decay.
        microbatch_tokens: Padded tokens per forward pass. Changes memory, never the result.
        max_grad_norm: Longest gradient of a role that is not scaled down.
    """

    several_losses: bool = False  # `losses` yields more than once: DDP must look for idle weights

    def __init__(
        self,
        optimizer: OptimizerCallable = lambda params: AdamW(
            params, lr=1e-6, betas=(0.9, 0.95), weight_decay=0.0, fused=True
        ),
        warmup: float = 0.0,
        final_lr: float = 1.0,
        microbatch_tokens: int = 8192,
        max_grad_norm: float = 1.0,
    ):
        super().__init__()
        self.automatic_optimization = False
        self.strict_loading = False  # frozen weights are not in a checkpoint
        self.build_optimizer = optimizer
        self.warmup, self.final_lr = warmup, final_lr
        self.microbatch_tokens, self.max_grad_norm = microbatch_tokens, max_grad_norm
        self.unverified: list[Backbone] = []  # networks whose weights came after they were built
        self.own_lr: dict[str, float] = {}  # learning rates other than the optimizer's, by role
        self.iteration = 0  # Lightning batches trained on, over all fits of this run

    # What an algorithm says ---------------------------------------------------------------------

    @property
    @abstractmethod
    def roles(self) -> dict[str, Backbone]:
        """The networks that train, by role; each is an optimizer group and clipped by itself."""

    @abstractmethod
    def losses(self, batch: Any) -> Iterator[Tensor]:
        """Losses [n, R] per token or [n] per row, one role at a time, never a mean.

        `update` runs backward on each before it asks for the next.
        """

    def count(self, batch: Any) -> Tensor:
        """What the summed loss is divided by, on this rank: response tokens by default."""
        count: Tensor = batch.scored.sum()
        return count

    def trained_in(self, role: str) -> list[nn.Parameter]:
        """What trains in a role; roles on one network share it out by name."""
        return [weight for weight in self.roles[role].parameters() if weight.requires_grad]

    def cast(self) -> list[Role]:
        """Every role, frozen ones too, for the table at the start."""
        return [whole(role, network) for role, network in self.roles.items()]

    # What the base does -------------------------------------------------------------------------

    def placed(self, network: Network) -> Network:
        """A role's network as the strategy has it: split over the ranks, or as it is."""
        if self.device_mesh is None:
            return network
        strategy = self.trainer.strategy
        if network.shard_state.weight_files is not None:
            self.unverified.append(network)
        how = strategy.sharding if isinstance(strategy, FSDP2) else Sharding()
        network.shard(self.device_mesh, how)
        return network

    def update(self, batch: AnyBatch) -> dict[str, Tensor]:
        """One optimizer step on the summed loss over the count of all ranks and micro-batches.

        Returns:
            Metrics of the step: the loss, and each role's gradient norm before clipping.
        """
        world = self.trainer.world_size
        share = world / self.over_ranks(self.count(batch).float()).clamp(min=1.0)
        plan = self.plan(batch)
        summed, self.judged = share.new_zeros(()), []
        for number, rows in enumerate(plan, start=1):
            part = batch.rows(rows).trim()
            self.synchronise(number == len(plan))
            for loss in self.losses(part):
                scored = part.scored if loss.ndim == part.scored.ndim else part.scored.any(-1)
                each = torch.where(scored, loss, 0.0)
                self.judge(part, rows, each)
                total = each.sum() * share
                self.manual_backward(total)
                summed += total.detach()
        return {"loss": self.over_ranks(summed) / world, **self.step()}

    def synchronise(self, last: bool) -> None:
        """Whether the next backward averages gradients over the ranks, or only adds them up."""
        for role in self.roles.values():
            synchronise(role, role.shard_state, last)
        replica = self.trainer.strategy.model
        if isinstance(replica, DistributedDataParallel):
            replica.require_backward_grad_sync = last

    def step(self) -> dict[str, Tensor]:
        """Clips each role, steps once; the gradient norms before clipping."""
        optimizer = self.optimizers()
        assert isinstance(optimizer, LightningOptimizer)  # one, with a group per role
        self.norms = norms = {}
        for group in optimizer.param_groups:
            norm = nn.utils.clip_grad_norm_(group["params"], self.max_grad_norm)
            name = "grad_norm" if len(self.roles) == 1 else f"grad_norm/{group['role']}"
            norms[name] = norm.full_tensor() if isinstance(norm, DTensor) else norm
        optimizer.step()
        optimizer.zero_grad()
        return norms

    def plan(self, batch: AnyBatch) -> list[list[int]]:
        """Rows of each micro-batch; every rank makes the same number of passes."""
        rows = microbatches(batch.lengths, self.microbatch_tokens)
        if self.trainer.world_size > 1:
            most = self.trainer.strategy.reduce(
                torch.tensor(len(rows), device=self.device), reduce_op="max"
            )
            rows = microbatches(batch.lengths, self.microbatch_tokens, at_least=int(most))
        return rows

    def in_parts(
        self, batch: AnyBatch, compute: Callable[[Any], tuple[Tensor, ...]]
    ) -> list[Tensor]:
        """What `compute` says of each micro-batch, back in the batch's order and width.

        Args:
            batch: N rows.
            compute: From a micro-batch to tensors [n, r] or [n].
        """
        plan, width = self.plan(batch), batch.scored.shape[-1]
        parts = [compute(batch.rows(rows).trim()) for rows in plan]
        order = [row for rows in plan for row in rows]
        back = torch.tensor(sorted(range(len(order)), key=order.__getitem__)).to(self.device)
        results = []
        for column in zip(*parts, strict=True):
            whole = [
                nn.functional.pad(part, (0, width - part.shape[1])) if part.ndim > 1 else part
                for part in column
            ]
            results.append(torch.cat(whole)[back])
        return results

    # Lightning's hooks --------------------------------------------------------------------------

    def on_fit_start(self) -> None:
        """Verifies what had no weights when it was built."""
        while self.unverified:
            with self.trainer.precision_plugin.forward_context():
                network = self.unverified.pop()
                network.verify()
            reshard(network)

    on_validation_start = on_test_start = on_predict_start = on_fit_start

    def setup(self, stage: str) -> None:
        """Refuses what cannot serve a step of ours; tells DDP of weights that a loss leaves out."""
        if self.trainer.precision == "16-mixed":
            raise ValueError("16-mixed scales losses, and clipping would not: take bf16-mixed.")
        strategy = self.trainer.strategy
        if isinstance(strategy, FSDPStrategy):
            raise ValueError(
                "FSDPStrategy wraps the whole step and cannot serve one that generates: take "
                "--trainer.strategy fsdp2, which shards the same way."
            )
        if isinstance(strategy, ModelParallelStrategy) and not isinstance(strategy, FSDP2):
            width = strategy.device_mesh["tensor_parallel"].size()
            if width > 1:
                raise ValueError(
                    f"ModelParallelStrategy splits tensors over {width} ranks, which would see "
                    f"different rows: take --trainer.strategy fsdp2, which splits none."
                )
        if self.several_losses and isinstance(strategy, DDPStrategy):
            strategy._ddp_kwargs.setdefault("find_unused_parameters", True)

    def configure_optimizers(self) -> Optimizer:
        """One optimizer with a group per role."""
        groups = []
        for role, network in self.roles.items():
            reshard(network)  # a validation before may have left weights whole
            names = {weight: name for name, weight in network.named_parameters()}
            weights = [(names[weight], weight) for weight in self.trained_in(role)]
            own = {"lr": self.own_lr[role]} if role in self.own_lr else {}
            groups.append(
                {"params": weights, "role": role, "max_grad_norm": self.max_grad_norm, **own}
            )
        optimizer = self.build_optimizer(groups)
        self.learning_rates = {group["role"]: group["lr"] for group in optimizer.param_groups}
        return optimizer

    def on_train_batch_start(self, batch: Any, batch_idx: int) -> None:
        """Sets the learning rates: a function of the iteration, so that no state is to be kept.

        A learning rate changed on the command line holds after a resume, too. (Lightning's
        schedulers would ask for the run's length before the data's position is restored.)
        """
        optimizer = self.optimizers()
        assert isinstance(optimizer, LightningOptimizer)  # one, with a group per role
        share = self.lr_share(self.iteration)
        for group in optimizer.param_groups:
            group["lr"] = self.learning_rates[group["role"]] * share
        self.log("lr", optimizer.param_groups[0]["lr"])

    def lr_share(self, step: int) -> float:
        """The learning rate at a Lightning batch, as a share of the configured one."""
        steps = self.trainer.estimated_stepping_batches
        if math.isinf(steps):
            return 1.0
        rise = self.warmup * steps
        if step < rise:
            return (step + 1) / (rise + 1)
        progress = min((step - rise) / max(steps - rise, 1), 1.0)
        return self.final_lr + (1 - self.final_lr) * (1 + math.cos(math.pi * progress)) / 2

    def end_iteration(self, metrics: Mapping[str, Tensor]) -> None:
        """Logs the last step's metrics and what was noted, and counts the iteration."""
        self.log_dict(dict(metrics))
        self.log_notes()
        self.iteration += 1

    def state_dict(self, *args: Any, **kwargs: Any) -> dict[str, Any]:
        """What trains; frozen weights come from their path again."""
        weights = self.named_parameters(remove_duplicate=False)  # tied ones under each name
        frozen = {name for name, weight in weights if not weight.requires_grad}
        state = super().state_dict(*args, **kwargs)
        return {name: value for name, value in state.items() if name not in frozen}

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Adds the iteration, from which sampling and shuffling draw their noise."""
        checkpoint["iteration"] = self.iteration
        checkpoint["algorithm"] = type(self).__name__

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Checks that the checkpoint holds exactly what trains here."""
        self.iteration, name = checkpoint["iteration"], type(self).__name__
        if self.trainer.training and checkpoint["algorithm"] != name:
            raise ValueError(
                f"The checkpoint is of a {checkpoint['algorithm']} run and cannot go on as {name}; "
                f"to start from its weights, give the path of its exported `hf` folder."
            )
        if checkpoint.get("state_dict"):  # `FSDP2` looks at a sharded checkpoint's itself
            check_fit(self, shapes(checkpoint["state_dict"]))
