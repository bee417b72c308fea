"""Talking to a model, or to two side by side."""

from collections.abc import Callable, Iterator
from typing import TypeVar

import torch
from rich.console import Console
from rich.live import Live
from rich.table import Table
from rich.text import Text

from lit_align.batches import Experience
from lit_align.data.padding import pad_left
from lit_align.data.text import Message, encode_prompt, load_tokenizer, stop_ids
from lit_align.errors import UserError
from lit_align.models.generation.decode import SamplingParams
from lit_align.models.policy import Policy
from lit_align.terminal import strip_control_characters

UNRESTRICTED = SamplingParams()  # tokens may be chosen
CHUNK_TOKENS = 8  # tokens between two looks: the context is read again for each
CHAT_HELP = "/clear forgets what was said, /temperature T changes it (0: likeliest), /quit ends."
Value = TypeVar("Value")


class ChatModel:
    """A model and what it has been told so far; a model without chat template goes on with a text.

    Args:
        path: Hub id or folder of the model and its tokenizer.
        max_new_tokens: Tokens after which an answer is cut.
        sampling: Which tokens may be chosen.
        temperature: Of the model; 0 takes the likeliest token.
        system: What stands in front of every conversation.
        seed: Of the samples.
        device: torch's word for where to compute.
    """

    def __init__(
        self,
        path: str,
        max_new_tokens: int = 256,
        sampling: SamplingParams = UNRESTRICTED,
        temperature: float = 1.0,
        system: str | None = None,
        seed: int = 0,
        device: str = "cpu",
    ):
        if max_new_tokens < 1:
            raise UserError(f"max_new_tokens must be at least 1, found {max_new_tokens}.")
        self.name = path
        self.tokenizer = load_tokenizer(path)
        check_device(device)
        self.policy = Policy(path).to(device).eval()
        self.device, self.max_new_tokens, self.sampling = device, max_new_tokens, sampling
        self.stops = sorted({*self.policy.stop_ids, *stop_ids(self.tokenizer)})
        self.generator = torch.Generator().manual_seed(seed)
        self.has_chat_template = self.tokenizer.chat_template is not None
        self.system_turns: list[Message] = [{"role": "system", "content": system}] if system else []
        self.set_temperature(temperature)
        self.clear()

    def clear(self) -> None:
        """Forgets the conversation."""
        self.turns = list(self.system_turns)

    def set_temperature(self, temperature: float) -> None:
        """From now on.

        Args:
            temperature: 0 takes the likeliest token.
        """
        if not 0 <= temperature < float("inf"):
            raise UserError(f"temperature must be at least 0, found {temperature:g}.")
        self.greedy = temperature == 0
        self.policy.set_temperature(temperature or 1.0)

    def stream_response(self, message: str) -> Iterator[str]:
        """What has been said so far, again and again until the answer is complete.

        Args:
            message: Of the user.
        """
        turns: list[Message] = [*self.turns, {"role": "user", "content": message}]
        ids = encode_prompt(self.tokenizer, turns if self.has_chat_template else message)
        self.check_length(len(ids))
        response_ids: list[int] = []
        while len(response_ids) < self.max_new_tokens:
            num_tokens = min(CHUNK_TOKENS, self.max_new_tokens - len(response_ids))
            chunk = self.generate_chunk([*ids, *response_ids], num_tokens)
            end = next((i for i, token in enumerate(chunk) if token in self.stops), None)
            response_ids += chunk[:end]
            yield self.decode(response_ids)
            if end is not None:
                break
        if self.has_chat_template:
            self.turns = [*turns, {"role": "assistant", "content": self.decode(response_ids)}]

    def check_length(self, length: int) -> None:
        """Refuses what would not fit with an answer.

        Args:
            length: Tokens of the conversation.
        """
        context_length = getattr(self.policy.network.config, "max_position_embeddings", None)
        if context_length is not None and length + self.max_new_tokens > context_length:
            raise UserError(
                f"{self.name} reads {context_length} tokens, and this takes {length} and "
                f"{self.max_new_tokens} for the answer: /clear, or start with a lower "
                f"--max_new_tokens."
            )

    def generate_chunk(self, ids: list[int], num_tokens: int) -> list[int]:
        """At most so many more token ids."""
        tokens, mask, lengths = pad_left([ids], 0)
        prompt = Experience(prompts=tokens, prompt_mask=mask, prompt_lengths=lengths)
        noise = torch.rand(1, num_tokens, generator=self.generator).to(self.device)
        pad = self.tokenizer.pad_token_id
        response = self.policy.generate(
            prompt.to(torch.device(self.device)), noise, [self.greedy], self.stops, pad,
            self.sampling,
        )  # fmt: skip
        new_ids: list[int] = response.tokens[0].tolist()
        return new_ids

    def decode(self, ids: list[int]) -> str:
        """Of token ids; what could steer a terminal is left out."""
        return strip_control_characters(str(self.tokenizer.decode(ids, skip_special_tokens=True)))


def check_device(device: str) -> None:
    """Refuses what torch cannot compute on here."""
    try:
        torch.zeros(1, device=device)
    except (RuntimeError, AssertionError) as error:
        reason = str(error).split("\n")[0]
        raise UserError(f"--device {device} is not available here: {reason}") from error


def chat(models: list[ChatModel], read_message: Callable[[], str | None], console: Console) -> None:
    """Answers until there is nothing more to answer.

    Args:
        models: One, or two side by side.
        read_message: What the user says next; None at the end.
        console: Where answers are shown.
    """
    console.print(CHAT_HELP, style="dim")
    for model in models:
        if not model.has_chat_template:
            notice = f"{model.name} has no chat template: it goes on with each text as it is."
            console.print(notice, style="dim", markup=False)
    while (message := read_message()) is not None and message.strip() != "/quit":
        try:
            if message.strip().startswith("/"):
                console.print(run_command(models, message.split()), style="dim", markup=False)
            elif message.strip():
                show_responses(models, message, console)
        except ValueError as error:
            console.print(str(error), style="red", markup=False)


def run_command(models: list[ChatModel], words: list[str]) -> str:
    """Does what a line with a slash says, and says so."""
    if words == ["/clear"]:
        for model in models:
            model.clear()
        return "forgotten"
    if words[0] == "/temperature" and len(words) == 2:
        try:
            temperature = float(words[1])
        except ValueError:
            return f"/temperature takes a number, found {words[1]}"
        for model in models:
            model.set_temperature(temperature)
        return f"temperature {temperature:g}"
    return CHAT_HELP


def show_responses(models: list[ChatModel], message: str, console: Console) -> None:
    """The answers as they come: in place on a terminal, as whole texts elsewhere."""
    responses = latest_of_each([model.stream_response(message) for model in models])
    last = [""] * len(models)
    with Live(console=console, auto_refresh=False, transient=True) as live:
        for last in responses:
            live.update(side_by_side(models, last), refresh=console.is_terminal)
    console.print(side_by_side(models, last))


def latest_of_each(responses: list[Iterator[Value]]) -> Iterator[list[Value]]:
    """The newest of each iterator, for as long as one goes on."""
    newest = [next(response) for response in responses]
    finished = [False] * len(responses)
    while not all(finished):
        yield list(newest)
        for index, response in enumerate(responses):
            update = next(response, None)
            finished[index] = update is None
            newest[index] = newest[index] if update is None else update


def side_by_side(models: list[ChatModel], texts: list[str]) -> Table | Text:
    """One answer as it is, two in columns under the models' names."""
    if len(models) == 1:
        return Text(texts[0])
    table = Table(expand=True)
    for model in models:
        table.add_column(Text(model.name), ratio=1, overflow="fold")
    table.add_row(*map(Text, texts))
    return table
