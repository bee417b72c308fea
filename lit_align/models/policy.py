"""The model that answers, and knows how likely its answers are."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AutoModelForCausalLM

from lit_align.batches import Experience, TextBatch
from lit_align.errors import UserError
from lit_align.functional.logprobs import chosen_logprobs
from lit_align.models.backbone import Backbone
from lit_align.models.generation.decode import DecodeState, Responses, SamplingParams, decode
from lit_align.models.generation.static_cache import StaticDecodeState
from lit_align.models.kernels.packing import scored_positions
from lit_align.models.parallel.sharding import all_reduce_and, all_reduce_max


class Policy(Backbone):
    """A causal language model; its policy is softmax(logits / temperature), everywhere.

    Args:
        path: Hub id or folder of the weights.
        temperature: Divides the logits when sampling and when scoring.
        static_kv_cache: Keys and values in fixed places, so that a GPU replays a recorded
            step instead of launching its kernels one by one. Takes the memory of answers of full
            length at once. By default on a GPU, where all layers have full attention.
    """

    auto_class = AutoModelForCausalLM
    task_type = "CAUSAL_LM"
    head_name = "language"

    def __init__(
        self,
        path: str | None = None,
        temperature: float = 1.0,
        static_kv_cache: bool | None = None,
        **kwargs: Any,
    ):
        super().__init__(path, **kwargs)
        if static_kv_cache and not self.uses_packing:
            raise UserError(
                f"static_kv_cache needs full attention in every layer by sdpa, and {self.name} has "
                f"another one: leave out static_kv_cache."
            )
        self.static_kv_cache = static_kv_cache
        self.set_temperature(temperature)
        if self.shard_state.weight_files is None:  # otherwise the weights have no values yet
            with torch.device("cpu"):  # the default may be meta, see `Backbone`
                self.verify_weights()

    def set_temperature(self, temperature: float) -> None:
        """Set what divides the logits, in sampling and in scoring.

        Args:
            temperature: Above 0.
        """
        if temperature <= 0:
            raise UserError(f"temperature must be above 0, found {temperature}.")
        self.temperature = temperature

    @property
    def head(self) -> nn.Linear:
        """The layer from hidden states to logits."""
        head: nn.Linear = self.network.get_output_embeddings()
        return head

    @torch.no_grad()
    def generate(
        self,
        prompts: Experience,
        noise: Tensor,
        is_greedy: Sequence[bool],
        stop_ids: Sequence[int],
        pad_id: int,
        sampling: SamplingParams,
    ) -> Responses:
        """Answers N prompts; greedy and sampled rows in the same pass.

        Args:
            prompts: N rows; only their prompts are read.
            noise: [N, R] uniform in [0, 1): one number decides one token.
            is_greedy: [N] rows that take the likeliest token instead.
            stop_ids: Token ids that end an answer.
            pad_id: Token id that stands behind the end.
            sampling: What may be chosen.
        """
        device = prompts.prompts.device
        greedy_rows = torch.tensor(list(is_greedy), device=device)
        stops = torch.tensor(list(stop_ids), dtype=torch.long, device=device)
        options = (prompts, noise, greedy_rows, stops, pad_id, self.temperature, sampling)
        is_gathered = self.shard_state.gather_for_generation
        all_ranks_done, max_over_ranks = (
            (bool, int) if is_gathered else (all_reduce_and, all_reduce_max)
        )

        def generate_rows() -> Responses:
            state = DecodeState(self.network, prompts, max_over_ranks)
            if self.uses_static_cache(device):
                state = StaticDecodeState(state, noise.shape[1], self.is_compiled)
            return decode(state, *options, all_ranks_done)

        responses: Responses = self(generate_rows)
        return responses

    def uses_static_cache(self, device: torch.device) -> bool:
        """Whether keys and values have fixed places: never where each layer gathers its weights."""
        wanted = self.static_kv_cache
        if wanted is None:
            wanted = self.uses_packing and device.type == "cuda"
        return wanted and bool(self.shard_state.gather_for_generation)

    def logprobs(self, batch: Experience | TextBatch) -> Tensor:
        """[N, R] nats, log-probability of each scored token in its context; 0 elsewhere.

        A padding token can be so unlikely that the exponential of its log-ratio overflows.
        """
        return self.logprobs_and_entropy(batch)[0]

    def logprobs_and_entropy(self, batch: Experience | TextBatch) -> tuple[Tensor, Tensor]:
        """([N, R], [N, R]) nats: `logprobs`, and the entropy of the policy at each token."""
        result: tuple[Tensor, Tensor] = self(self._logprobs_and_entropy, batch)
        return result

    def _logprobs_and_entropy(self, batch: Experience | TextBatch) -> tuple[Tensor, Tensor]:
        state_index, token_index = scored_positions(batch)
        return self.token_logprobs(self.hidden_states_at(batch, state_index), token_index, batch)

    def token_logprobs(
        self, hidden: Tensor, token_index: Tensor, batch: Experience | TextBatch
    ) -> tuple[Tensor, Tensor]:
        """([N, R], [N, R]) nats: log-prob and entropy at each scored token; 0 elsewhere.

        Args:
            hidden: [n, H], the hidden states in which tokens are chosen.
            token_index: [n] of these tokens in [N * R].
            batch: The N texts.
        """
        tokens = batch.responses.flatten()
        logprobs, entropy = (
            value.new_zeros(len(tokens)).index_copy(0, token_index, value).view_as(batch.loss_mask)
            for value in self.head_logprobs(hidden, tokens.index_select(0, token_index))
        )
        return logprobs.where(batch.loss_mask, 0.0), entropy.where(batch.loss_mask, 0.0)

    def head_logprobs(self, hidden: Tensor, tokens: Tensor) -> tuple[Tensor, Tensor]:
        """([n], [n]) nats: log-prob and entropy of tokens [n] after hidden states [n, H]."""
        return chosen_logprobs(
            hidden, self.head.weight, tokens, bias=self.head.bias, temperature=self.temperature
        )

    @torch.no_grad()
    def top1_correct(self, batch: Experience | TextBatch) -> Tensor:
        """[N, R] bool: the token is the likeliest one. For accuracy; 1,024 x V at once."""
        top1_correct: Tensor = self(self._top1_correct, batch)
        return top1_correct

    def _top1_correct(self, batch: Experience | TextBatch) -> Tensor:
        hidden = self.hidden_states(batch)[:, batch.num_context_tokens - 1 : -1]
        parts = hidden.flatten(0, 1).split(1024)
        best = torch.cat([self.head(part).argmax(-1) for part in parts])
        return best.view_as(batch.responses) == batch.responses

    @torch.no_grad()
    def verify_weights(self) -> None:
        """Refuses a network whose logits are not its head times its hidden states.

        Soft caps and logit scales come after the head, and scoring would not see them.
        """
        with torch.compiler.set_stance("force_eager"):
            difference, tolerance, is_last = self(self._head_difference)
        if not difference <= tolerance or not is_last:
            raise UserError(
                f"{self.name} changes its logits after the output head (log-probs differ by "
                f"{difference:.2g} nats): soft-capped or scaled logits are not supported."
            )

    def _head_difference(self) -> tuple[float, float, bool]:
        """Nats that log-probs differ by, nats that they may, and whether the head comes last."""
        weight = self.head.weight
        tokens = torch.arange(min(8, self.vocab_size), device=weight.device)[None]
        ones = torch.ones_like(tokens, dtype=torch.bool)
        batch = TextBatch(
            tokens=tokens, token_mask=ones, target_mask=ones, lengths=[tokens.shape[1]]
        )
        logits = self.network(input_ids=tokens).logits[:, :-1].float() / self.temperature
        own = logits.log_softmax(-1).gather(-1, batch.responses.unsqueeze(-1)).squeeze(-1)
        difference = float((own - self._logprobs_and_entropy(batch)[0]).abs().max())
        is_full_precision = weight.dtype in (torch.float32, torch.float64)
        exact = is_full_precision and not torch.is_autocast_enabled(weight.device.type)
        return difference, 1e-3 if exact else 0.25, self.is_head_last(tokens)

    def is_head_last(self, tokens: Tensor) -> bool:
        """Whether logits of size 30 still are what the head says: a soft cap bends such ones."""
        hidden = self.network.base_model(input_ids=tokens).last_hidden_state
        gain = 30 / float(self.head(hidden).abs().max().clamp(min=1e-6))
        hook = self.head.register_forward_hook(lambda layer, inputs, logits: logits * gain)
        difference = (self.network(input_ids=tokens).logits - self.head(hidden)).abs().max()
        hook.remove()
        return bool(difference < 1.0)
