"""What every algorithm shares: losses in, one optimizer step out."""

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

from lit_align.algorithms.core.checkpoints import check_algorithm, without_frozen
from lit_align.algorithms.core.finite_rows import FiniteRows
from lit_align.algorithms.core.metrics import Means, MetricAccumulator
from lit_align.algorithms.core.microbatches import (
    Compute,
    join_microbatches,
    split_on_all_ranks,
    sync_gradients,
)
from lit_align.algorithms.core.optimizer_groups import clip_by_role, role_group
from lit_align.algorithms.core.phases import PhaseListener, run_phase
from lit_align.algorithms.core.reference_model import ReferenceModel
from lit_align.algorithms.core.schedule import lr_fraction
from lit_align.algorithms.core.trainer_checks import check_trainer, find_unused_parameters
from lit_align.batches import AnyBatch, microbatch_indices
from lit_align.models.backbone import Backbone
from lit_align.models.parallel.fsdp2 import FSDP2
from lit_align.models.parallel.sharding import ShardingConfig, reshard
from lit_align.models.policy import Policy
from lit_align.models.roles import Role, single_head_role
from lit_align.models.weights.state_dict_check import check_state_dict, weight_shapes

Network = TypeVar("Network", bound=Backbone)


class Algorithm(LightningModule):
    """One or more trained networks and the losses that they are trained on.

    One Lightning batch is one step of the learning rate schedule. An offline algorithm takes one
    optimizer step on it, an `OnlineAlgorithm` a few. `update` owns the optimizer step, so results
    depend neither on the micro-batches nor on the number of ranks.

    Args:
        optimizer: Optimizer class and settings.
        warmup_ratio: Share of the run over which the learning rate rises from 0.
        final_lr_ratio: Share of the learning rate left at the end of its cosine decay, 1 for none.
        microbatch_tokens: Padded tokens per forward pass. Changes memory, never the result.
        max_grad_norm: Longest gradient of a role that is not scaled down.
    """

    has_multiple_losses: bool = False  # DDP must look for unused weights
    trained_roles: tuple[str, ...] = ("policy",)  # networks that train; each is an attribute
    build_policy: Callable[[], Policy]
    reference_model: ReferenceModel | None = None  # of algorithms that stay near a reference

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
        self.automatic_optimization = False
        self.strict_loading = False  # frozen weights are not in a checkpoint
        self.build_optimizer = optimizer
        self.warmup_ratio, self.final_lr_ratio = warmup_ratio, final_lr_ratio
        self.microbatch_tokens, self.max_grad_norm = microbatch_tokens, max_grad_norm
        self.to_verify: list[Backbone] = []  # networks whose weights came after they were built
        self.role_lr: dict[str, float] = {}  # learning rates other than the optimizer's, by role
        self.metrics = MetricAccumulator()
        self.phase_listeners: list[PhaseListener] = []
        self.finite_rows: list[FiniteRows] = []  # one per micro-batch of the optimizer step
        self.grad_norms: dict[str, Tensor] = {}  # gradient norms before clipping, by role
        self.iteration = 0  # Lightning batches trained on, over all fits of this run

    # What an algorithm says ---------------------------------------------------------------------

    def build(self) -> dict[str, Backbone]:
        """Return the unsharded networks by role: the policy and, if there is one, the reference."""
        policy = self.build_policy()
        reference = {} if self.reference_model is None else self.reference_model.build(policy)
        return {"policy": policy, **reference}

    @property
    def roles(self) -> dict[str, Backbone]:
        """The networks that train, by role. Each is an optimizer group and clipped by itself."""
        return {role: getattr(self, role) for role in self.trained_roles}

    @abstractmethod
    def losses(self, batch: Any) -> Iterator[Tensor]:
        """Losses [n, R] per token or [n] per row, one role at a time, never a mean.

        `update` runs backward on each before it asks for the next.
        """

    def prepare(self, batch: Any) -> Any:
        """Add what is constant during the update, such as a reference's log-probs."""
        return batch

    def loss_denominator(self, batch: AnyBatch) -> Tensor:
        """Return what the summed loss is divided by, on this rank: response tokens by default."""
        return batch.loss_mask.sum()

    def trainable_weights(self, role: str) -> list[nn.Parameter]:
        """What trains in a role; roles on one network share it out by name."""
        return [weight for weight in self.roles[role].parameters() if weight.requires_grad]

    def all_roles(self) -> list[Role]:
        """Return all roles, frozen ones too, for the table at the start."""
        roles = [single_head_role(role, network) for role, network in self.roles.items()]
        return roles if self.reference_model is None else [*roles, self.reference_model.role()]

    # What the base does -------------------------------------------------------------------------

    def configure_model(self) -> None:
        """Build, shard and register the networks once: Lightning calls this before every run."""
        if hasattr(self, self.trained_roles[0]):
            return
        with self.phase("load"):
            networks = {
                role: self.shard_for_strategy(network) for role, network in self.build().items()
            }
            for role, network in networks.items():
                setattr(self, role, network)
            if self.reference_model is not None:
                self.reference_model.register(networks, trained=self.roles)

    def shard_for_strategy(self, network: Network) -> Network:
        """A role's network as the strategy has it: split over the ranks, or as it is."""
        if self.device_mesh is None:
            return network
        strategy = self.trainer.strategy
        if network.shard_state.weight_files is not None:
            self.to_verify.append(network)
        sharding = strategy.sharding if isinstance(strategy, FSDP2) else ShardingConfig()
        network.shard(self.device_mesh, sharding)
        return network

    def training_step(self, batch: Any, batch_idx: int) -> None:
        """Prepare a batch and take one optimizer step on it."""
        with torch.no_grad(), self.phase("prepare"):
            batch = self.prepare(batch)
        with self.phase("update"):
            metrics = self.update(batch)
        self.end_iteration(metrics)

    def update(self, batch: AnyBatch) -> dict[str, Tensor]:
        """Take one step on the summed loss over the count; return the loss and gradient norms."""
        world_size = self.trainer.world_size
        loss_scale = world_size / self.sum_over_ranks(self.loss_denominator(batch).float()).clamp(
            min=1.0
        )
        row_groups = self.split_microbatches(batch)
        total_loss, self.finite_rows = loss_scale.new_zeros(()), []
        for number, rows in enumerate(row_groups, start=1):
            microbatch = batch.rows(rows).trim_padding()
            self.set_gradient_sync(number == len(row_groups))
            for loss in self.losses(microbatch):
                loss_mask = (
                    microbatch.loss_mask
                    if loss.ndim == microbatch.loss_mask.ndim
                    else microbatch.loss_mask.any(-1)
                )
                token_losses = torch.where(loss_mask, loss, 0.0)
                self.record_finite_rows(microbatch, rows, token_losses)
                microbatch_loss = token_losses.sum() * loss_scale
                self.manual_backward(microbatch_loss)
                total_loss += microbatch_loss.detach()
        return {"loss": self.sum_over_ranks(total_loss) / world_size, **self.step()}

    def sum_over_ranks(self, value: Tensor) -> Tensor:
        """Return the sum of `value` over all ranks."""
        return self.trainer.strategy.reduce(value, reduce_op="sum")

    def phase(self, name: str) -> AbstractContextManager[None]:
        """Return a context in which listeners know that the phase `name` is running."""
        return run_phase(name, self.phase_listeners)

    def record_finite_rows(self, batch: AnyBatch, rows: list[int], losses: Tensor) -> None:
        """Record which `rows` of the step have finite losses [n, r] or [n], reading no value."""
        finite = losses.detach().isfinite().view(len(rows), -1).all(-1)
        self.finite_rows.append(FiniteRows(rows, batch.columns, finite))

    def set_gradient_sync(self, is_last: bool) -> None:
        """Average gradients over the ranks in the last backward of a step, not before."""
        sync_gradients(self.roles.values(), self.trainer.strategy.model, is_last)

    def step(self) -> dict[str, Tensor]:
        """Clip each role, take one optimizer step, and return the gradient norms before it."""
        optimizer = self.optimizers()
        assert isinstance(optimizer, LightningOptimizer)  # one, with a group per role
        self.grad_norms = clip_by_role(optimizer.param_groups, self.max_grad_norm)
        optimizer.step()
        optimizer.zero_grad()
        return self.grad_norms

    def split_microbatches(self, batch: AnyBatch) -> list[list[int]]:
        """Return the rows of each micro-batch. All ranks have the same number of micro-batches."""
        if self.trainer.world_size == 1:
            return microbatch_indices(batch.lengths, self.microbatch_tokens)
        return split_on_all_ranks(batch.lengths, self.microbatch_tokens, self.trainer.strategy)

    def map_microbatches(self, batch: AnyBatch, compute: Compute) -> list[Tensor]:
        """Return the results of `compute` for each micro-batch, in the batch's order and width.

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

    # Lightning's hooks --------------------------------------------------------------------------

    def on_fit_start(self) -> None:
        """Verify the networks that had no weights when they were built."""
        while self.to_verify:
            network = self.to_verify.pop()
            with self.trainer.precision_plugin.forward_context():
                network.verify_weights()
            reshard(network)

    on_validation_start = on_test_start = on_predict_start = on_fit_start

    def on_train_start(self) -> None:
        """Offload the frozen networks: Lightning has moved all networks to the device."""
        if self.reference_model is not None:
            self.reference_model.offload()

    def setup(self, stage: str) -> None:
        """Refuse unsupported trainer settings, and tell DDP of losses that skip some weights."""
        check_trainer(self.trainer)
        if self.has_multiple_losses:
            find_unused_parameters(self.trainer.strategy)

    def configure_optimizers(self) -> Optimizer:
        """Build one optimizer with a group per role."""
        for network in self.roles.values():
            reshard(network)  # a validation before this may have left weights unsharded
        groups = [
            role_group(
                role, network, self.trainable_weights(role), self.max_grad_norm, self.role_lr
            )
            for role, network in self.roles.items()
        ]
        optimizer = self.build_optimizer(groups)
        self.learning_rates = {group["role"]: group["lr"] for group in optimizer.param_groups}
        return optimizer

    def on_train_batch_start(self, batch: Any, batch_idx: int) -> None:
        """Set the learning rates of this iteration (`schedule.py` says why it is no scheduler)."""
        optimizer = self.optimizers()
        assert isinstance(optimizer, LightningOptimizer)  # one, with a group per role
        factor = self.lr_factor(self.iteration)
        for group in optimizer.param_groups:
            group["lr"] = self.learning_rates[group["role"]] * factor
        self.log("lr", optimizer.param_groups[0]["lr"])

    def lr_factor(self, step: int) -> float:
        """The learning rate at a Lightning batch, as a share of the configured one."""
        steps = self.trainer.estimated_stepping_batches
        return lr_fraction(step, steps, self.warmup_ratio, self.final_lr_ratio)

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
        """Return the trained weights and the buffers."""
        return without_frozen(self, super().state_dict(*args, **kwargs))

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Adds the iteration, from which sampling and shuffling draw their noise."""
        checkpoint["iteration"] = self.iteration
        checkpoint["algorithm"] = type(self).__name__
        if self.reference_model is not None:  # identifies the frozen weights, which are not saved
            checkpoint["frozen_fingerprint"] = self.reference_model.fingerprint

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Checks that the checkpoint holds exactly what trains here."""
        self.iteration = checkpoint["iteration"]
        if self.trainer.training:
            check_algorithm(checkpoint, type(self).__name__)
        if checkpoint.get("state_dict"):  # `FSDP2` looks at a sharded checkpoint's itself
            check_state_dict(self, weight_shapes(checkpoint["state_dict"]))
        if self.trainer.training and self.reference_model is not None:
            self.reference_model.check_fingerprint(checkpoint)
