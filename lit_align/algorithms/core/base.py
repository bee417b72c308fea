"""What every algorithm shares: losses in, one optimizer step out."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager
from typing import Any

import torch
from lightning.pytorch import LightningModule
from lightning.pytorch.cli import OptimizerCallable
from lightning.pytorch.core.optimizer import LightningOptimizer
from lightning.pytorch.strategies import DDPStrategy
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from torch.nn.parallel import DistributedDataParallel
from torch.optim import AdamW, Optimizer

from lit_align.algorithms.core.finite_rows import FiniteRows
from lit_align.algorithms.core.metrics import Means, MetricAccumulator
from lit_align.algorithms.core.microbatches import join_microbatches
from lit_align.algorithms.core.phases import PhaseListener, run_phase
from lit_align.algorithms.core.schedule import lr_fraction
from lit_align.algorithms.core.trainer_checks import check_trainer
from lit_align.batches import AnyBatch, microbatches
from lit_align.models.backbone import Backbone
from lit_align.models.parallel.fsdp2 import FSDP2
from lit_align.models.parallel.sharding import Model, reshard, shard, synchronise
from lit_align.models.roles import Role, whole
from lit_align.models.weights.state_dict_check import check_fit, shapes


class Algorithm(LightningModule):
    """One or more trained networks and the losses that they are trained on.

    One Lightning batch is one step of the learning rate schedule. An offline algorithm takes one
    optimizer step on it, an `OnlineAlgorithm` a few. `update` owns the optimizer step, so results
    depend neither on the micro-batches nor on the number of ranks.

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
        self.metrics = MetricAccumulator()
        self.phase_listeners: list[PhaseListener] = []
        self.finite_rows: list[FiniteRows] = []  # one per micro-batch of the optimizer step
        self.norms: dict[str, Tensor] = {}  # gradient norms before clipping, by role
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

    def prepare(self, batch: Any) -> Any:
        """Add what is constant during the update, such as a reference's log-probs."""
        return batch

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

    def placed(self, network: Model) -> Model:
        """A role's network as the strategy has it: split over the ranks, or as it is."""
        if self.device_mesh is None:
            return network
        strategy = self.trainer.strategy
        how = strategy.sharding if isinstance(strategy, FSDP2) else None
        if network.files is not None:
            self.unverified.append(network)
        return shard(network, self.device_mesh, how)

    def training_step(self, batch: Any, batch_idx: int) -> None:
        """Prepare a batch and take one optimizer step on it."""
        with torch.no_grad(), self.phase("prepare"):
            batch = self.prepare(batch)
        with self.phase("update"):
            metrics = self.update(batch)
        self.end_iteration(metrics)

    def update(self, batch: AnyBatch) -> dict[str, Tensor]:
        """One optimizer step on the summed loss over the count of all ranks and micro-batches.

        Returns:
            Metrics of the step: the loss, and each role's gradient norm before clipping.
        """
        world = self.trainer.world_size
        share = world / self.over_ranks(self.count(batch).float()).clamp(min=1.0)
        plan = self.plan(batch)
        summed, self.finite_rows = share.new_zeros(()), []
        for number, rows in enumerate(plan, start=1):
            part = batch.rows(rows).trim()
            self.synchronise(number == len(plan))
            for loss in self.losses(part):
                scored = part.scored if loss.ndim == part.scored.ndim else part.scored.any(-1)
                each = torch.where(scored, loss, 0.0)
                self.record_finite_rows(part, rows, each)
                total = each.sum() * share
                self.manual_backward(total)
                summed += total.detach()
        return {"loss": self.over_ranks(summed) / world, **self.step()}

    def over_ranks(self, value: Tensor) -> Tensor:
        """Return the sum of `value` over all ranks."""
        return self.trainer.strategy.reduce(value, reduce_op="sum")

    def phase(self, name: str) -> AbstractContextManager[None]:
        """Return a context in which listeners know that the phase `name` is running."""
        return run_phase(name, self.phase_listeners)

    def record_finite_rows(self, batch: AnyBatch, rows: list[int], losses: Tensor) -> None:
        """Record which `rows` of the step have finite losses [n, r] or [n], reading no value."""
        finite = losses.detach().isfinite().view(len(rows), -1).all(-1)
        self.finite_rows.append(FiniteRows(rows, batch.columns, finite))

    def synchronise(self, last: bool) -> None:
        """Whether the next backward averages gradients over the ranks, or only adds them up."""
        for role in self.roles.values():
            synchronise(role, last)
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
        """Return the results of `compute` for each micro-batch, in the batch's order and width.

        Args:
            batch: N rows.
            compute: Function of a micro-batch that returns tensors [n, r] or [n].
        """
        plan, width = self.plan(batch), batch.scored.shape[-1]
        parts = [compute(batch.rows(rows).trim()) for rows in plan]
        return [join_microbatches(results, plan, width) for results in zip(*parts, strict=True)]

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
        """Refuse unsupported trainer settings, and tell DDP of losses that skip some weights."""
        check_trainer(self.trainer)
        strategy = self.trainer.strategy
        if self.several_losses and isinstance(strategy, DDPStrategy):
            # Private, but the only way after construction: the keyword arguments of torch's DDP.
            # Checked with Lightning 2.6.6. `DDPStrategy(find_unused_parameters=...)` sets the same.
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
        return lr_fraction(step, steps, self.warmup, self.final_lr)

    def end_iteration(self, metrics: Mapping[str, Tensor]) -> None:
        """Log the last step's metrics and the means of the iteration, and count the iteration."""
        self.log_dict(dict(metrics))
        self.metrics.log_train(self)
        self.iteration += 1

    def derived_eval_metrics(self, means: Means) -> Means:
        """Return evaluation metrics that are computed from the means of the evaluated rows."""
        return {}

    def on_validation_epoch_end(self) -> None:
        """Log the means of the validation."""
        self.metrics.log_eval(self, "val", self.derived_eval_metrics)

    def on_test_epoch_end(self) -> None:
        """Log the means of the test."""
        self.metrics.log_eval(self, "test", self.derived_eval_metrics)

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
