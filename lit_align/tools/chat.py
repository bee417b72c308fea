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
from lit_align.models.generation.decode import Sampling
from lit_align.models.policy import Policy
from lit_align.terminal import harmless

ALL = Sampling()  # tokens may be chosen
CHUNK = 8  # tokens between two looks: the context is read again for each
HELP = "/clear forgets what was said, /temperature T changes it (0: likeliest), /quit ends."
Value = TypeVar("Value")


class Speaker:
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
        sampling: Sampling = ALL,
        temperature: float = 1.0,
        system: str | None = None,
        seed: int = 0,
        device: str = "cpu",
    ):
        if max_new_tokens < 1:
            raise ValueError(f"max_new_tokens must be at least 1, found {max_new_tokens}.")
        self.name = path
        self.tokenizer = load_tokenizer(path)
        check_device(device)
        self.policy = Policy(path).to(device).eval()
        self.device, self.max_new_tokens, self.sampling = device, max_new_tokens, sampling
        self.stops = sorted({*self.policy.stop_ids, *stop_ids(self.tokenizer)})
        self.noise = torch.Generator().manual_seed(seed)
        self.talks = self.tokenizer.chat_template is not None
        self.start: list[Message] = [{"role": "system", "content": system}] if system else []
        self.set_temperature(temperature)
        self.clear()

    def clear(self) -> None:
        """Forgets the conversation."""
        self.turns = list(self.start)

    def set_temperature(self, temperature: float) -> None:
        """From now on.

        Args:
            temperature: 0 takes the likeliest token.
        """
        if not 0 <= temperature < float("inf"):
            raise ValueError(f"temperature must be at least 0, found {temperature:g}.")
        self.greedy = temperature == 0
        self.policy.set_temperature(temperature or 1.0)

    def answer(self, words: str) -> Iterator[str]:
        """What has been said so far, again and again until the answer is complete.

        Args:
            words: Of the user.
        """
        turns: list[Message] = [*self.turns, {"role": "user", "content": words}]
        ids = encode_prompt(self.tokenizer, turns if self.talks else words)
        self.check_room(len(ids))
        said: list[int] = []
        while len(said) < self.max_new_tokens:
            number = min(CHUNK, self.max_new_tokens - len(said))
            chunk = self.go_on([*ids, *said], number)
            end = next((i for i, token in enumerate(chunk) if token in self.stops), None)
            said += chunk[:end]
            yield self.text(said)
            if end is not None:
                break
        if self.talks:
            self.turns = [*turns, {"role": "assistant", "content": self.text(said)}]

    def check_room(self, length: int) -> None:
        """Refuses what would not fit with an answer.

        Args:
            length: Tokens of the conversation.
        """
        room = getattr(self.policy.network.config, "max_position_embeddings", None)
        if room is not None and length + self.max_new_tokens > room:
            raise ValueError(
                f"{self.name} reads {room} tokens, and this takes {length} and "
                f"{self.max_new_tokens} for the answer: /clear, or start with a lower "
                f"--max_new_tokens."
            )

    def go_on(self, ids: list[int], number: int) -> list[int]:
        """At most so many more token ids."""
        tokens, mask, lengths = pad_left([ids], 0)
        prompt = Experience(prompts=tokens, prompt_mask=mask, prompt_lengths=lengths)
        noise = torch.rand(1, number, generator=self.noise).to(self.device)
        pad = self.tokenizer.pad_token_id
        answer = self.policy.respond(
            prompt.to(torch.device(self.device)), noise, [self.greedy], self.stops, pad,
            self.sampling,
        )  # fmt: skip
        found: list[int] = answer.tokens[0].tolist()
        return found

    def text(self, ids: list[int]) -> str:
        """Of token ids; what could steer a terminal is left out."""
        return harmless(str(self.tokenizer.decode(ids, skip_special_tokens=True)))


def check_device(device: str) -> None:
    """Refuses what torch cannot compute on here."""
    try:
        torch.zeros(1, device=device)
    except (RuntimeError, AssertionError) as error:
        reason = str(error).split("\n")[0]
        raise ValueError(f"--device {device} is not available here: {reason}") from error


def chat(speakers: list[Speaker], ask: Callable[[], str | None], console: Console) -> None:
    """Answers until there is nothing more to answer.

    Args:
        speakers: One, or two side by side.
        ask: What the user says next; None at the end.
        console: Where answers are shown.
    """
    console.print(HELP, style="dim")
    for speaker in speakers:
        if not speaker.talks:
            told = f"{speaker.name} has no chat template: it goes on with each text as it is."
            console.print(told, style="dim", markup=False)
    while (words := ask()) is not None and words.strip() != "/quit":
        try:
            if words.strip().startswith("/"):
                console.print(command(speakers, words.split()), style="dim", markup=False)
            elif words.strip():
                show(speakers, words, console)
        except ValueError as error:
            console.print(str(error), style="red", markup=False)


def command(speakers: list[Speaker], words: list[str]) -> str:
    """Does what a line with a slash says, and says so."""
    if words == ["/clear"]:
        for speaker in speakers:
            speaker.clear()
        return "forgotten"
    if words[0] == "/temperature" and len(words) == 2:
        try:
            temperature = float(words[1])
        except ValueError:
            return f"/temperature takes a number, found {words[1]}"
        for speaker in speakers:
            speaker.set_temperature(temperature)
        return f"temperature {temperature:g}"
    return HELP


def show(speakers: list[Speaker], words: str, console: Console) -> None:
    """The answers as they come: in place on a terminal, as whole texts elsewhere."""
    answers = together([speaker.answer(words) for speaker in speakers])
    last = [""] * len(speakers)
    with Live(console=console, auto_refresh=False, transient=True) as live:
        for last in answers:
            live.update(beside(speakers, last), refresh=console.is_terminal)
    console.print(beside(speakers, last))


def together(answers: list[Iterator[Value]]) -> Iterator[list[Value]]:
    """The newest of each iterator, for as long as one goes on."""
    newest = [next(answer) for answer in answers]
    over = [False] * len(answers)
    while not all(over):
        yield list(newest)
        for place, answer in enumerate(answers):
            later = next(answer, None)
            over[place] = later is None
            newest[place] = newest[place] if later is None else later


def beside(speakers: list[Speaker], said: list[str]) -> Table | Text:
    """One answer as it is, two in columns under the models' names."""
    if len(speakers) == 1:
        return Text(said[0])
    table = Table(expand=True)
    for speaker in speakers:
        table.add_column(Text(speaker.name), ratio=1, overflow="fold")
    table.add_row(*map(Text, said))
    return table
