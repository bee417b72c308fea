"""`lit-align chat`: a conversation with a model, or with two."""

from rich.console import Console

from lit_align.cli.argument_parser import Words
from lit_align.cli.errors import quieten
from lit_align.models.generation.decode import Sampling
from lit_align.tools.chat import Speaker, chat
from lit_align.tools.resolve_model import found_model

ABOUT = "Answers what you write, with the model's chat template; two models side by side."


def main(args: list[str]) -> int:
    """Parses the words behind `chat` and talks."""
    given = parser().parse_args(args)
    quieten()
    settings = {
        "max_new_tokens": given.max_new_tokens,
        "sampling": Sampling(given.top_k, given.top_p),
        "temperature": given.temperature,
        "system": given.system,
        "seed": given.seed,
        "device": given.device,
    }
    paths = [given.model] if given.other is None else [given.model, given.other]
    chat([Speaker(found_model(path), **settings) for path in paths], asked, Console())
    return 0


def parser() -> Words:
    """The arguments of `chat`."""
    words = Words(prog="lit-align chat", description=ABOUT)
    words.add_argument("model", metavar="MODEL", help="Hub id, export or run folder.")
    words.add_argument("--with", dest="other", metavar="OTHER", help="Answers beside the first.")
    words.add_argument("--temperature", type=float, default=1.0, help="0: the likeliest tokens.")
    words.add_argument("--max_new_tokens", type=int, default=256, help="Longest answer.")
    words.add_argument("--top_p", type=float, default=1.0, help="Share that may be sampled.")
    words.add_argument("--top_k", type=int, default=0, help="Tokens that may be sampled, 0: all.")
    words.add_argument("--system", help="What stands in front of the conversation.")
    words.add_argument("--seed", type=int, default=0, help="Of the samples.")
    words.add_argument("--device", default="cpu", help="cpu, cuda, ...")
    return words


def asked() -> str | None:
    """What the user types; None at the end of the input."""
    try:
        return input("> ")
    except (EOFError, KeyboardInterrupt):
        print()
        return None
