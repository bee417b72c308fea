"""The model that answers, and knows how likely its answers are."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AutoModelForCausalLM

from lit_align.batches import Experience, Tokens
from lit_align.functional.logprobs import chosen_logprobs
from lit_align.models.backbone import Backbone
from lit_align.models.generation.decode import Context, Responses, Sampling, decode
from lit_align.models.generation.static_cache import FixedContext
from lit_align.models.kernels.packing import scored_places
from lit_align.models.parallel.sharding import largest, on_all_ranks


class Policy(Backbone):
    """A causal language model; its policy is softmax(logits / temperature), everywhere.

    Args:
        path: Hub id or folder of the weights.
        temperature: Divides the logits when sampling and when scoring.
        fixed_cache: Answer from keys and values in fixed places, so that a GPU replays a recorded
            step instead of launching its kernels one by one. Takes the memory of answers of full
            length at once. By default on a GPU, where all layers have full attention.
    """

    auto = AutoModelForCausalLM
    task = "CAUSAL_LM"
    reads = "language"

    def __init__(
        self,
        path: str | None = None,
        temperature: float = 1.0,
        fixed_cache: bool | None = None,
        **kwargs: Any,
    ):
        super().__init__(path, **kwargs)
        if fixed_cache and not self.packs:
            raise ValueError(
                f"fixed_cache needs full attention in every layer by sdpa, and {self.name} has "
                f"another one: leave out fixed_cache."
            )
        self.fixed_cache = fixed_cache
        self.set_temperature(temperature)
        if self.shard_state.weight_files is None:  # otherwise the weights have no values yet
            with torch.device("cpu"):  # the default may be meta, see `Backbone`
                self.verify()

    def set_temperature(self, temperature: float) -> None:
        """Set what divides the logits, in sampling and in scoring.

        Args:
            temperature: Above 0.
        """
        if temperature <= 0:
            raise ValueError(f"temperature must be above 0, found {temperature}.")
        self.temperature = temperature

    @property
    def head(self) -> nn.Linear:
        """The layer from hidden states to logits."""
        head: nn.Linear = self.network.get_output_embeddings()
        return head

    @torch.no_grad()
    def respond(
        self,
        prompts: Experience,
        noise: Tensor,
        greedy: Sequence[bool],
        stops: Sequence[int],
        pad: int,
        sampling: Sampling,
    ) -> Responses:
        """Answers N prompts; greedy and sampled rows in the same pass.

        Args:
            prompts: N rows; only their prompts are read.
            noise: [N, R] uniform in [0, 1): one number decides one token.
            greedy: [N] rows that take the likeliest token instead.
            stops: Token ids that end an answer.
            pad: Token id that stands behind the end.
            sampling: What may be chosen.
        """
        device = prompts.prompts.device
        rows = torch.tensor(list(greedy), device=device)
        ends = torch.tensor(list(stops), dtype=torch.long, device=device)
        given = (prompts, noise, rows, ends, pad, self.temperature, sampling)
        is_gathered = self.shard_state.gather_for_generation
        over, alike = (bool, int) if is_gathered else (on_all_ranks, largest)

        def answers() -> Responses:
            context = Context(self.network, prompts, alike)
            if self.stays(device):
                context = FixedContext(context, noise.shape[1], self.compiles)
            return decode(context, *given, over)

        responses: Responses = self(answers)
        return responses

    def stays(self, device: torch.device) -> bool:
        """Whether keys and values have fixed places: never where each layer gathers its weights."""
        wanted = self.fixed_cache
        if wanted is None:
            wanted = self.packs and device.type == "cuda"
        return wanted and bool(self.shard_state.gather_for_generation)

    def logprobs(self, batch: Experience | Tokens) -> Tensor:
        """[N, R] nats, log-probability of each scored token in its context; 0 elsewhere.

        A padding token can be so unlikely that the exponential of its log-ratio overflows.
        """
        return self.score(batch)[0]

    def score(self, batch: Experience | Tokens) -> tuple[Tensor, Tensor]:
        """([N, R], [N, R]) nats: `logprobs`, and the entropy of the policy at each token."""
        scored: tuple[Tensor, Tensor] = self(self._score, batch)
        return scored

    def _score(self, batch: Experience | Tokens) -> tuple[Tensor, Tensor]:
        states, places = scored_places(batch)
        return self.chosen(self.hidden_at(batch, states), places, batch)

    def chosen(
        self, before: Tensor, places: Tensor, batch: Experience | Tokens
    ) -> tuple[Tensor, Tensor]:
        """([N, R], [N, R]) nats: log-prob and entropy at each scored token; 0 elsewhere.

        Args:
            before: [n, H], the hidden states in which tokens are chosen.
            places: [n] of these tokens in [N * R].
            batch: The N texts.
        """
        tokens = batch.responses.flatten()
        logprobs, entropy = (
            value.new_zeros(len(tokens)).index_copy(0, places, value).view_as(batch.scored)
            for value in self.read_head(before, tokens.index_select(0, places))
        )
        return logprobs.where(batch.scored, 0.0), entropy.where(batch.scored, 0.0)

    def read_head(self, hidden: Tensor, tokens: Tensor) -> tuple[Tensor, Tensor]:
        """([n], [n]) nats: log-prob and entropy of tokens [n] after hidden states [n, H]."""
        return chosen_logprobs(
            hidden, self.head.weight, tokens, bias=self.head.bias, temperature=self.temperature
        )

    @torch.no_grad()
    def hits(self, batch: Experience | Tokens) -> Tensor:
        """[N, R] bool: the token is the likeliest one. For accuracy; 1,024 x V at once."""
        hits: Tensor = self(self._hits, batch)
        return hits

    def _hits(self, batch: Experience | Tokens) -> Tensor:
        hidden = self.hidden(batch)[:, batch.num_context - 1 : -1]
        parts = hidden.flatten(0, 1).split(1024)
        best = torch.cat([self.head(part).argmax(-1) for part in parts])
        return best.view_as(batch.responses) == batch.responses

    @torch.no_grad()
    def verify(self) -> None:
        """Refuses a network whose logits are not its head times its hidden states.

        Soft caps and logit scales come after the head, and scoring would not see them.
        """
        with torch.compiler.set_stance("force_eager"):
            difference, tolerance, is_last = self(self._faithful)
        if not difference <= tolerance or not is_last:
            raise ValueError(
                f"{self.name} changes its logits after the output head (log-probs differ by "
                f"{difference:.2g} nats): soft-capped or scaled logits are not supported."
            )

    def _faithful(self) -> tuple[float, float, bool]:
        """Nats that log-probs differ by, nats that they may, and whether the head comes last."""
        weight = self.head.weight
        tokens = torch.arange(min(8, self.vocabulary), device=weight.device)[None]
        ones = torch.ones_like(tokens, dtype=torch.bool)
        batch = Tokens(tokens=tokens, token_mask=ones, loss_mask=ones, lengths=[tokens.shape[1]])
        logits = self.network(input_ids=tokens).logits[:, :-1].float() / self.temperature
        own = logits.log_softmax(-1).gather(-1, batch.responses.unsqueeze(-1)).squeeze(-1)
        difference = float((own - self._score(batch)[0]).abs().max())
        whole = weight.dtype in (torch.float32, torch.float64)
        exact = whole and not torch.is_autocast_enabled(weight.device.type)
        return difference, 1e-3 if exact else 0.25, self.head_is_last(tokens)

    def head_is_last(self, tokens: Tensor) -> bool:
        """Whether logits of size 30 still are what the head says: a soft cap bends such ones."""
        hidden = self.network.base_model(input_ids=tokens).last_hidden_state
        gain = 30 / float(self.head(hidden).abs().max().clamp(min=1e-6))
        louder = self.head.register_forward_hook(lambda layer, given, logits: logits * gain)
        difference = (self.network(input_ids=tokens).logits - self.head(hidden)).abs().max()
        louder.remove()
        return bool(difference < 1.0)
