"""`lit-align chat`: a conversation with a model, or with two."""

from lit_align.cli.argument_parser import ArgumentParser

ABOUT = "Talk to a model, or to two side by side, with the model's chat template."


def main(argv: list[str]) -> int:
    """Parse the words after `chat` and start the conversation.

    Args:
        argv: The words after `chat`.
    """
    options = build_parser().parse_args(argv)
    from rich.console import Console

    from lit_align.cli.errors import silence_known_warnings
    from lit_align.models.generation.decode import SamplingParams
    from lit_align.tools.chat import ChatModel, chat
    from lit_align.tools.resolve_model import resolve_model

    silence_known_warnings()
    settings = {
        "max_new_tokens": options.max_new_tokens,
        "sampling": SamplingParams(options.top_k, options.top_p),
        "temperature": options.temperature,
        "system": options.system,
        "seed": options.seed,
        "device": options.device,
    }
    paths = [path for path in (options.model, options.compare_with) if path is not None]
    chat([ChatModel(resolve_model(path), **settings) for path in paths], ask_user, Console())
    return 0


def build_parser() -> ArgumentParser:
    """Return the parser of the words after `chat`."""
    parser = ArgumentParser(prog="lit-align chat", description=ABOUT)
    add = parser.add_argument
    add("model", metavar="MODEL", help="Hub id, exported folder or run folder.")
    add("--compare_with", metavar="MODEL", help="A second model, shown next to the first.")
    add("--temperature", type=float, default=1.0, help="Sampling temperature; 0 is greedy.")
    add("--max_new_tokens", type=int, default=256, help="Longest response in tokens.")
    add("--top_p", type=float, default=1.0, help="Smallest probability mass to sample from.")
    add("--top_k", type=int, default=0, help="Number of tokens to sample from; 0 means all.")
    add("--system", help="System message before the conversation.")
    add("--seed", type=int, default=0, help="Random seed.")
    add("--device", default="cpu", help="Device, such as cpu or cuda.")
    return parser


def ask_user() -> str | None:
    """Return the next line that the user types, or None at the end of the input."""
    try:
        return input("> ")
    except (EOFError, KeyboardInterrupt):
        print()
        return None
