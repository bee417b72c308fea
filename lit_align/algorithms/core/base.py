"""Base of all algorithms: losses per token in, one optimizer step out."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager
from typing import Any, TypeVar

import torch
from lightning.pytorch import LightningModule
from lightning.pytorch.cli import OptimizerCallable
from lightning.pytorch.core.optimizer import LightningOptimizer
from torch import Tensor, nn
from torch.optim import AdamW, Optimizer

from lit_align.algorithms.core import checkpoints
from lit_align.algorithms.core.metrics import Means, MetricAccumulator
from lit_align.algorithms.core.microbatches import (
    Compute,
    FiniteRows,
    join_microbatches,
    split_on_all_ranks,
    sync_gradients,
)
from lit_align.algorithms.core.optimizer_groups import build_optimizer, clip_by_role, role_group
from lit_align.algorithms.core.phases import PhaseListener, run_phase
from lit_align.algorithms.core.reference_model import ReferenceModel
from lit_align.algorithms.core.schedule import lr_fraction
from lit_align.algorithms.core.trainer_settings import check_trainer, enable_unused_weights
from lit_align.batches import AnyBatch, microbatch_indices
from lit_align.models.backbone import Backbone
from lit_align.models.parallel.fsdp2 import FSDP2
from lit_align.models.parallel.sharding import ShardingConfig, reshard
from lit_align.models.policy import Policy
from lit_align.models.roles import Role, single_head_role

Network = TypeVar("Network", bound=Backbone)


class Algorithm(LightningModule):
    """One or more trained networks and the losses that they are trained on.

    One Lightning batch is one step of the learning rate schedule and, offline, one optimizer
    step. The result depends neither on the micro-batches nor on the number of ranks.

    Args:
        optimizer: Optimizer class and settings.
        warmup_ratio: Fraction of the run over which the learning rate rises from 0.
        final_lr_ratio: Final learning rate divided by `lr`, reached by cosine decay. 1: no decay.
        microbatch_tokens: Padded tokens per forward pass. Changes the memory, never the result.
        max_grad_norm: Gradient norm of each role to which a larger gradient is scaled down.
    """

    has_multiple_losses: bool = False  # DDP must look for weights without a gradient
    trained_roles: tuple[str, ...] = ("policy",)  # each is the name of an attribute, a network
    build_policy: Callable[[], Policy]
    reference_model: ReferenceModel | None = None  # set by algorithms that measure a KL

    def __init__(
        self,
        optimizer: OptimizerCallable = lambda params: AdamW(
            params, lr=1e-6, betas=(0.9, 0.95), weight_decay=0.0, fused=True
        ),
        warmup_ratio: float = 0.0,
        final_lr_ratio: float = 1.0,
        microbatch_tokens: int = 8192,
        max_grad_norm: float = 1.0,
    ):
        super().__init__()
        self.automatic_optimization = False  # Lightning would step once per batch, on one loss
        self.strict_loading = False  # frozen weights are not in a checkpoint
        self.build_optimizer = optimizer
        self.warmup_ratio, self.final_lr_ratio = warmup_ratio, final_lr_ratio
        self.microbatch_tokens, self.max_grad_norm = microbatch_tokens, max_grad_norm
        self.to_verify: list[Backbone] = []  # networks whose weights were read after building
        self.role_lr: dict[str, float] = {}  # learning rates other than the optimizer's, by role
        self.metrics = MetricAccumulator()
        self.phase_listeners: list[PhaseListener] = []
        self.finite_rows: list[FiniteRows] = []  # one per micro-batch of the optimizer step
        self.grad_norms: dict[str, Tensor] = {}  # [] before clipping, by role
        self.iteration = 0  # Lightning batches trained on, over all fits of this run

    # Methods that an algorithm overrides --------------------------------------------------------

    def build(self) -> dict[str, Backbone]:
        """Return the unsharded networks by role: the policy and, if there is one, the reference."""
        policy = self.build_policy()
        reference = {} if self.reference_model is None else self.reference_model.build(policy)
        return {"policy": policy, **reference}

    @property
    def roles(self) -> dict[str, Backbone]:
        """The networks that train, by role. Each has its own optimizer group and gradient norm."""
        return {role: getattr(self, role) for role in self.trained_roles}

    @abstractmethod
    def losses(self, batch: Any) -> Iterator[Tensor]:
        """Yield one loss tensor per role, [n, R] per token or [n] per row. Do not average.

        `update` runs backward on each loss before it requests the next, which frees its memory.
        """

    def prepare(self, batch: Any) -> Any:
        """Add constants of the update to the batch, such as the reference's log-probs."""
        return batch

    def loss_denominator(self, batch: AnyBatch) -> Tensor:
        """Return the divisor [] of the summed loss on this rank. Default: response tokens."""
        return batch.loss_mask.sum()

    def trainable_weights(self, role: str) -> list[nn.Parameter]:
        """Return the weights that train in a role."""
        return [weight for weight in self.roles[role].parameters() if weight.requires_grad]

    def all_roles(self) -> list[Role]:
        """Return all roles with the frozen ones, for the table at the start of a run."""
        roles = [single_head_role(role, network) for role, network in self.roles.items()]
        return roles if self.reference_model is None else [*roles, self.reference_model.role()]

    # The optimizer step -------------------------------------------------------------------------

    def training_step(self, batch: Any, batch_idx: int) -> None:
        """Prepare a batch and take one optimizer step on it."""
        with torch.no_grad(), self.phase("prepare"):
            batch = self.prepare(batch)
        with self.phase("update"):
            metrics = self.update(batch)
        self.end_iteration(metrics)

    def update(self, batch: AnyBatch) -> dict[str, Tensor]:
        """Take one optimizer step on the summed losses, divided once by the loss denominator.

        Args:
            batch: The rows of the step on this rank.

        Returns:
            The loss [] over all ranks, and the gradient norms [] before clipping.
        """
        world_size = self.trainer.world_size
        denominator = self.sum_over_ranks(self.loss_denominator(batch).float()).clamp(min=1.0)
        loss_scale = world_size / denominator  # DDP and FSDP2 average gradients over the ranks
        # Sums are linear: micro-batches of any size add up to the gradient of the batch.
        row_groups = self.split_microbatches(batch)
        total_loss, self.finite_rows = loss_scale.new_zeros(()), []
        for number, rows in enumerate(row_groups, start=1):
            microbatch = batch.rows(rows).trim_padding()
            self.set_gradient_sync(number == len(row_groups))
            for loss in self.losses(microbatch):
                # A row is in the loss if one of its tokens is.
                mask = microbatch.loss_mask
                loss_mask = mask if loss.ndim == mask.ndim else mask.any(-1)
                # `where`, since a product with the mask would keep a NaN of padding.
                token_losses = torch.where(loss_mask, loss, 0.0)
                self.record_finite_rows(microbatch, rows, token_losses)
                microbatch_loss = token_losses.sum() * loss_scale
                self.manual_backward(microbatch_loss)
                total_loss += microbatch_loss.detach()
        return {"loss": self.sum_over_ranks(total_loss) / world_size, **self.step()}

    def step(self) -> dict[str, Tensor]:
        """Clip each role's gradient and take one optimizer step.

        Return the norms [] before clipping.
        """
        optimizer = self.optimizers()
        assert isinstance(optimizer, LightningOptimizer)  # one, with a group per role
        self.grad_norms = clip_by_role(optimizer.param_groups, self.max_grad_norm)
        optimizer.step()
        optimizer.zero_grad()
        return self.grad_norms

    def sum_over_ranks(self, value: Tensor) -> Tensor:
        """Return the sum of `value` over all ranks, in its shape."""
        return self.trainer.strategy.reduce(value, reduce_op="sum")

    def phase(self, name: str) -> AbstractContextManager[None]:
        """Return a context that reports the phase `name` to the listeners."""
        return run_phase(name, self.phase_listeners)

    def record_finite_rows(self, batch: AnyBatch, rows: list[int], losses: Tensor) -> None:
        """Record which `rows` of the step have finite losses [n, r] or [n].

        This does not wait for the device.
        """
        finite = losses.detach().isfinite().view(len(rows), -1).all(-1)
        self.finite_rows.append(FiniteRows(rows, batch.columns, finite))

    def set_gradient_sync(self, is_last: bool) -> None:
        """Average gradients over the ranks in the last backward of a step, not before."""
        sync_gradients(self.roles.values(), self.trainer.strategy.model, is_last)

    def split_microbatches(self, batch: AnyBatch) -> list[list[int]]:
        """Return the rows of each micro-batch. All ranks have the same number of micro-batches."""
        if self.trainer.world_size == 1:
            return microbatch_indices(batch.lengths, self.microbatch_tokens)
        return split_on_all_ranks(batch.lengths, self.microbatch_tokens, self.trainer.strategy)

    def map_microbatches(self, batch: AnyBatch, compute: Compute) -> list[Tensor]:
        """Return the results [N, R] or [N] of `compute`, run on each micro-batch.

        Args:
            batch: N rows.
            compute: Function of a micro-batch that returns tensors [n, r] or [n].
        """
        row_groups, width = self.split_microbatches(batch), batch.loss_mask.shape[-1]
        results_by_microbatch = [compute(batch.rows(rows).trim_padding()) for rows in row_groups]
        return [
            join_microbatches(results, row_groups, width)
            for results in zip(*results_by_microbatch, strict=True)
        ]

    def end_iteration(self, metrics: Mapping[str, Tensor]) -> None:
        """Log the last step's metrics and the means of the iteration, and count the iteration."""
        self.log_dict(dict(metrics))
        self.metrics.log_train(self)
        self.iteration += 1

    # Lightning's hooks --------------------------------------------------------------------------

    def setup(self, stage: str) -> None:
        """Refuse unsupported trainer settings, and let DDP accept losses that skip weights."""
        check_trainer(self.trainer)
        if self.has_multiple_losses:
            enable_unused_weights(self.trainer.strategy)

    def configure_model(self) -> None:
        """Build, shard and register the networks once. Lightning calls this before every run."""
        if hasattr(self, self.trained_roles[0]):  # a validation before this fit has built them
            return
        with self.phase("load"):
            built = self.build()
            networks = {role: self.shard_for_strategy(built[role]) for role in built}
            for role, network in networks.items():
                setattr(self, role, network)
            if self.reference_model is not None:
                self.reference_model.register(networks, trained=self.roles)

    def shard_for_strategy(self, network: Network) -> Network:
        """Shard a network over the ranks if the strategy has a device mesh, and return it."""
        if self.device_mesh is None:
            return network
        strategy = self.trainer.strategy
        if network.shard_state.weight_files is not None:  # read after the split, shard by shard
            self.to_verify.append(network)
        sharding = strategy.sharding if isinstance(strategy, FSDP2) else ShardingConfig()
        network.shard(self.device_mesh, sharding)
        return network

    def configure_optimizers(self) -> Optimizer:
        """Build one optimizer with a group per role."""
        for network in self.roles.values():
            reshard(network)  # a validation before this may have left weights unsharded
        limit = self.max_grad_norm
        groups = [
            role_group(role, network, self.trainable_weights(role), limit, self.role_lr)
            for role, network in self.roles.items()
        ]
        optimizer = build_optimizer(self.build_optimizer, groups)
        # The configured rates. The schedule overwrites those of the groups, also in a checkpoint.
        self.learning_rates = {group["role"]: group["lr"] for group in optimizer.param_groups}
        return optimizer

    def on_fit_start(self) -> None:
        """Check the networks whose weights were loaded after the sharding."""
        while self.to_verify:
            network = self.to_verify.pop()
            with self.trainer.precision_plugin.forward_context():
                network.verify_weights()
            reshard(network)

    on_validation_start = on_test_start = on_predict_start = on_fit_start

    def on_train_start(self) -> None:
        """Offload the frozen networks. Lightning has moved all networks to the device."""
        if self.reference_model is not None:
            self.reference_model.offload()

    def on_train_batch_start(self, batch: Any, batch_idx: int) -> None:
        """Set the learning rates of this iteration (`schedule.py`)."""
        optimizer = self.optimizers()
        assert isinstance(optimizer, LightningOptimizer)  # one, with a group per role
        factor = self.lr_factor(self.iteration)
        for group in optimizer.param_groups:
            group["lr"] = self.learning_rates[group["role"]] * factor
        self.log("lr", optimizer.param_groups[0]["lr"])

    def lr_factor(self, step: int) -> float:
        """Return the learning rate at a Lightning batch as a fraction of the configured one."""
        steps = self.trainer.estimated_stepping_batches
        return lr_fraction(step, steps, self.warmup_ratio, self.final_lr_ratio)

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
        """Return the trained weights and the buffers."""
        return checkpoints.drop_frozen_weights(self, super().state_dict(*args, **kwargs))

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Add the version, the algorithm's name and the iteration."""
        checkpoint |= checkpoints.checkpoint_header(self, self.iteration, self.reference_model)

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Restore the iteration, and check that the checkpoint has exactly the trained weights."""
        self.iteration = checkpoint["iteration"]  # sampling continues from it
        checkpoints.check_checkpoint(checkpoint, self, self.reference_model, self.trainer.training)
