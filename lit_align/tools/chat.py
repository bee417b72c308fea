"""A conversation with a model, or with two models side by side."""

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

UNRESTRICTED = SamplingParams()  # no top-k and no top-p
CHUNK_TOKENS = 8  # tokens between two updates of the screen; each chunk prefills the context again
CHAT_HELP = "/clear removes the conversation, /temperature T sets it (0: greedy), /quit ends."
Value = TypeVar("Value")


class ChatModel:
    """A model and its conversation so far.

    A model without a chat template has no conversation: it continues each text that you type.

    Args:
        path: Hub id or folder of the model and its tokenizer.
        max_new_tokens: Longest response in tokens.
        sampling: Tokens that may be sampled. Default: all.
        temperature: Sampling temperature; 0 is greedy.
        system: System message before every conversation. Default: none.
        seed: Random seed of the samples.
        device: Name of the device in torch, such as cuda.
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
            raise UserError(
                f"max_new_tokens must be at least 1, found {max_new_tokens}. Set --max_new_tokens."
            )
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
        """Remove the conversation, except for the system message."""
        self.turns = list(self.system_turns)

    def set_temperature(self, temperature: float) -> None:
        """Set the sampling temperature of the following responses.

        Args:
            temperature: At least 0; 0 is greedy.
        """
        if not 0 <= temperature < float("inf"):
            raise UserError(
                f"temperature must be at least 0, found {temperature:g}. Set --temperature, or "
                f"type /temperature 1."
            )
        self.greedy = temperature == 0
        self.policy.set_temperature(temperature or 1.0)  # greedy decoding must not divide by 0

    def stream_response(self, message: str) -> Iterator[str]:
        """Yield the response so far after each chunk, until it is complete.

        Args:
            message: Message of the user.
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
            # all ids are decoded again: a character may span tokens of two chunks
            yield self.decode(response_ids)
            if end is not None:
                break
        if self.has_chat_template:
            self.turns = [*turns, {"role": "assistant", "content": self.decode(response_ids)}]

    def check_length(self, length: int) -> None:
        """Refuse a conversation that leaves too few tokens of the context for a response.

        Args:
            length: Length of the conversation in tokens.
        """
        context_length = getattr(self.policy.network.config, "max_position_embeddings", None)
        if context_length is not None and length + self.max_new_tokens > context_length:
            raise UserError(
                f"{self.name} has a context of {context_length} tokens, and the conversation of "
                f"{length} tokens plus a response of {self.max_new_tokens} exceeds it. Type "
                f"/clear, or set a lower --max_new_tokens."
            )

    def generate_chunk(self, ids: list[int], num_tokens: int) -> list[int]:
        """Return up to `num_tokens` token ids that continue `ids`.

        Args:
            ids: Token ids of the context.
            num_tokens: Most tokens that are generated.
        """
        tokens, mask, lengths = pad_left([ids], 0)
        prompt = Experience(prompts=tokens, prompt_mask=mask, prompt_lengths=lengths)
        # random numbers from the CPU, so that a seed means the same on every device
        noise = torch.rand(1, num_tokens, generator=self.generator).to(self.device)
        pad = self.tokenizer.pad_token_id
        response = self.policy.generate(
            prompt.to(torch.device(self.device)), noise, [self.greedy], self.stops, pad,
            self.sampling,
        )  # fmt: skip
        new_ids: list[int] = response.tokens[0].tolist()
        return new_ids

    def decode(self, ids: list[int]) -> str:
        """Return the text of token ids without control characters of terminals."""
        return strip_control_characters(str(self.tokenizer.decode(ids, skip_special_tokens=True)))


def check_device(device: str) -> None:
    """Refuse a device on which torch cannot allocate a tensor."""
    try:
        torch.zeros(1, device=device)
    except (RuntimeError, AssertionError) as error:  # torch 2.13 asserts that it has CUDA
        reason = str(error).split("\n")[0]
        raise UserError(f"--device {device} is not available: {reason}") from error


def chat(models: list[ChatModel], read_message: Callable[[], str | None], console: Console) -> None:
    """Respond to each message until there are no more.

    Args:
        models: One model, or two side by side.
        read_message: Returns the next message of the user, or None at the end.
        console: Output of the responses.
    """
    console.print(CHAT_HELP, style="dim")
    for model in models:
        if not model.has_chat_template:
            notice = f"{model.name} has no chat template: it continues each text that you type."
            console.print(notice, style="dim", markup=False)
    while (message := read_message()) is not None and message.strip() != "/quit":
        try:
            if message.strip().startswith("/"):
                console.print(run_chat_command(models, message.split()), style="dim", markup=False)
            elif message.strip():
                show_responses(models, message, console)
        except ValueError as error:  # a mistake must not end the conversation
            console.print(str(error), style="red", markup=False)


def run_chat_command(models: list[ChatModel], words: list[str]) -> str:
    """Run a line that begins with a slash and return the text to print.

    Args:
        models: Models of the conversation.
        words: The line, split at spaces.
    """
    if words == ["/clear"]:
        for model in models:
            model.clear()
        return "conversation removed"
    if words[0] == "/temperature" and len(words) == 2:
        try:
            temperature = float(words[1])
        except ValueError:
            return f"/temperature must be a number, found {words[1]}"
        for model in models:
            model.set_temperature(temperature)
        return f"temperature {temperature:g}"
    return CHAT_HELP


def show_responses(models: list[ChatModel], message: str, console: Console) -> None:
    """Print the responses: updated in place on a terminal, once when complete elsewhere.

    Args:
        models: One model, or two side by side.
        message: Message of the user.
        console: Output of the responses.
    """
    responses = latest_of_each([model.stream_response(message) for model in models])
    last = [""] * len(models)
    with Live(console=console, auto_refresh=False, transient=True) as live:
        for last in responses:
            live.update(side_by_side(models, last), refresh=console.is_terminal)
    console.print(side_by_side(models, last))


def latest_of_each(responses: list[Iterator[Value]]) -> Iterator[list[Value]]:
    """Yield the latest value of each iterator, until all of them have ended.

    Example:
        >>> list(latest_of_each([iter("ab"), iter("xyz")]))
        [['a', 'x'], ['b', 'y'], ['b', 'z']]
    """
    newest = [next(response) for response in responses]
    finished = [False] * len(responses)
    while not all(finished):
        yield list(newest)
        for index, response in enumerate(responses):
            update = next(response, None)
            finished[index] = update is None
            newest[index] = newest[index] if update is None else update


def side_by_side(models: list[ChatModel], texts: list[str]) -> Table | Text:
    """Return one response as text, two in columns with the models' names.

    Args:
        models: Models of the conversation.
        texts: Response of each model.
    """
    if len(models) == 1:
        return Text(texts[0])
    table = Table(expand=True)
    for model in models:
        table.add_column(Text(model.name), ratio=1, overflow="fold")
    table.add_row(*map(Text, texts))
    return table
