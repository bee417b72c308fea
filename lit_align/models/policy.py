"""The policy: a causal language model that samples responses and scores their tokens."""

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
    """A causal language model with the distribution softmax(logits / temperature) everywhere.

    Args:
        path: Hub id or folder of the weights. Default: random weights from `config`.
        temperature: Divisor of the logits, in sampling and in scoring.
        static_kv_cache: Allocate the KV cache for responses of full length at once, and decode
            by a recorded CUDA graph. Default: true on a GPU if all layers have full attention.

    Example:
        >>> sizes = {"hidden_size": 8, "intermediate_size": 8, "num_attention_heads": 1}
        >>> config = {"model_type": "llama", "vocab_size": 32, "num_hidden_layers": 1, **sizes}
        >>> policy = Policy(config=config)
        >>> policy.head.weight.shape, len(policy.blocks)
        (torch.Size([32, 8]), 1)
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
                f"static_kv_cache requires sdpa full attention in every layer; {self.name} uses "
                f"something else. Remove static_kv_cache."
            )
        self.static_kv_cache = static_kv_cache
        self.set_temperature(temperature)
        if self.shard_state.weight_files is None:  # otherwise the weights have no values yet
            with torch.device("cpu"):  # the default may be meta, see `Backbone`
                self.verify_weights()

    def set_temperature(self, temperature: float) -> None:
        """Set the divisor of the logits, in sampling and in scoring.

        Args:
            temperature: Number above 0.
        """
        if temperature <= 0:
            raise UserError(
                f"temperature must be above 0, found {temperature}. Set --model.policy.temperature."
            )
        self.temperature = temperature

    @property
    def head(self) -> nn.Linear:
        """Return the layer from hidden states [.., H] to logits [.., V]."""
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
        """Generate a response to each of N prompts, greedy and sampled rows in the same pass.

        Args:
            prompts: N rows, of which only the prompts are read.
            noise: [N, R] uniform numbers in [0, 1), one per token, so that a row's tokens do not
                depend on the other rows.
            is_greedy: [N] True in rows that take the most likely token.
            stop_ids: Token ids that end a response.
            pad_id: Token id after the end of a response.
            sampling: Settings of top-k and top-p.
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
        """Return True if decoding uses a static KV cache.

        Args:
            device: Device of the prompts.
        """
        is_enabled = self.static_kv_cache
        if is_enabled is None:
            is_enabled = self.uses_packing and device.type == "cuda"
        # a recorded step cannot include FSDP2's gathering of each layer
        return is_enabled and bool(self.shard_state.gather_for_generation)

    def logprobs(self, batch: Experience | TextBatch) -> Tensor:
        """Return the log-prob (nats) of each scored token in its context, [N, R]; 0 elsewhere.

        Padding is 0 because its log-ratio could overflow in exp, and 0 * inf is nan.

        Args:
            batch: N rows with R tokens that can be scored.
        """
        return self.logprobs_and_entropy(batch)[0]

    def logprobs_and_entropy(self, batch: Experience | TextBatch) -> tuple[Tensor, Tensor]:
        """Return log-probs and the policy's entropy (nats) at each scored token, both [N, R].

        Args:
            batch: N rows with R tokens that can be scored.
        """
        result: tuple[Tensor, Tensor] = self(self._logprobs_and_entropy, batch)
        return result

    def _logprobs_and_entropy(self, batch: Experience | TextBatch) -> tuple[Tensor, Tensor]:
        state_index, token_index = scored_positions(batch)
        return self.token_logprobs(self.hidden_states_at(batch, state_index), token_index, batch)

    def token_logprobs(
        self, hidden: Tensor, token_index: Tensor, batch: Experience | TextBatch
    ) -> tuple[Tensor, Tensor]:
        """Return log-prob and entropy (nats) at each scored token, both [N, R]; 0 elsewhere.

        Args:
            hidden: [n, H] hidden states from which n tokens are predicted.
            token_index: [n] positions of these tokens in [N * R].
            batch: N rows with R tokens that can be scored.
        """
        tokens = batch.responses.flatten()
        logprobs, entropy = (
            value.new_zeros(len(tokens)).index_copy(0, token_index, value).view_as(batch.loss_mask)
            for value in self.head_logprobs(hidden, tokens.index_select(0, token_index))
        )
        return logprobs.where(batch.loss_mask, 0.0), entropy.where(batch.loss_mask, 0.0)

    def head_logprobs(self, hidden: Tensor, tokens: Tensor) -> tuple[Tensor, Tensor]:
        """Return log-prob and entropy (nats) of tokens given hidden states, both [n].

        Args:
            hidden: [n, H] hidden states.
            tokens: [n] token ids that follow them.
        """
        return chosen_logprobs(
            hidden, self.head.weight, tokens, bias=self.head.bias, temperature=self.temperature
        )

    @torch.no_grad()
    def top1_correct(self, batch: Experience | TextBatch) -> Tensor:
        """Return True where a token is the most likely one, [N, R] bool. Used for accuracy.

        Args:
            batch: N rows with R tokens that can be scored.
        """
        top1_correct: Tensor = self(self._top1_correct, batch)
        return top1_correct

    def _top1_correct(self, batch: Experience | TextBatch) -> Tensor:
        hidden = self.hidden_states(batch)[:, batch.num_context_tokens - 1 : -1]
        parts = hidden.flatten(0, 1).split(1024)  # at most 1,024 x V logits in memory
        best = torch.cat([self.head(part).argmax(-1) for part in parts])
        return best.view_as(batch.responses) == batch.responses

    @torch.no_grad()
    def verify_weights(self) -> None:
        """Raise a `UserError` if the logits are not the head times the hidden states.

        Soft caps and logit scales are applied after the head, so scoring would miss them.
        """
        with torch.compiler.set_stance("force_eager"):
            difference, tolerance, is_last = self(self._head_difference)
        if not difference <= tolerance or not is_last:
            raise UserError(
                f"{self.name} changes its logits after the output head (log-probs differ by "
                f"{difference:.2g} nats): soft-capped or scaled logits are not supported. "
                f"Use another model."
            )

    def _head_difference(self) -> tuple[float, float, bool]:
        """Return the difference of log-probs and its tolerance (nats), and `is_head_last`."""
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
        # bf16 logits differ by tenths of a nat, so the tolerance is larger
        return difference, 1e-3 if exact else 0.25, self.is_head_last(tokens)

    def is_head_last(self, tokens: Tensor) -> bool:
        """Return True if logits of size 30 equal the head's output. A soft cap would shrink them.

        Args:
            tokens: [1, T] token ids.
        """
        hidden = self.network.base_model(input_ids=tokens).last_hidden_state
        gain = 30 / float(self.head(hidden).abs().max().clamp(min=1e-6))
        hook = self.head.register_forward_hook(lambda layer, inputs, logits: logits * gain)
        difference = (self.network(input_ids=tokens).logits - self.head(hidden)).abs().max()
        hook.remove()
        return bool(difference < 1.0)
