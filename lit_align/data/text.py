"""Tokenizers, and how texts and conversations become token ids.

An answer that is learnt ends in exactly one stop: the tokenizer's eos, or the token that its chat
template writes after an assistant turn. Ids of a prompt never depend on what answers it.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from transformers import AutoTokenizer, PreTrainedTokenizerBase

from lit_align.data.toy import toy_tokenizer
from lit_align.errors import UserError

Message = dict[str, Any]  # {"role": "user", "content": "..."}


def load_tokenizer(
    path: str,
    chat_template: str | None = None,
    trust_remote_code: bool = False,
    eos_token: str | None = None,
) -> PreTrainedTokenizerBase:
    """The tokenizer at a hub id or in a local folder.

    Args:
        path: Hub id or local folder; the word toy is the embedded word-level tokenizer.
        chat_template: Jinja text or the path of a file with it; replaces the tokenizer's own.
        trust_remote_code: Whether to run Python code that comes with the tokenizer.
        eos_token: Token that ends an answer; replaces the tokenizer's own eos.
    """
    tokenizer = toy_tokenizer() if path == "toy" else read_tokenizer(path, trust_remote_code)
    if chat_template is not None:
        tokenizer.chat_template = read_template(chat_template)
    if eos_token is not None:
        if eos_token not in tokenizer.get_vocab():
            raise UserError(f"the tokenizer of '{path}' has no token '{eos_token}' to be its eos")
        tokenizer.eos_token = eos_token
    if tokenizer.pad_token_id is None:  # any known token will do: masks come from lengths
        known = [tokenizer.eos_token, tokenizer.unk_token, tokenizer.bos_token]
        known.append(tokenizer.convert_ids_to_tokens(0))
        tokenizer.pad_token = next(token for token in known if token is not None)
    return tokenizer


def read_tokenizer(path: str, trust_remote_code: bool) -> PreTrainedTokenizerBase:
    """What transformers finds at `path`, or one sentence."""
    local_path = Path(path).expanduser()
    looks_local = path.startswith(("/", "./", "../", "~")) or path.count("/") > 1
    if looks_local and not local_path.is_dir():
        raise UserError(f"there is no tokenizer folder '{path}'")
    try:
        where = str(local_path) if local_path.is_dir() else path
        return AutoTokenizer.from_pretrained(where, trust_remote_code=trust_remote_code)
    except (OSError, ValueError, KeyError, TypeError) as error:
        if "trust_remote_code" in str(error):
            raise UserError(
                f"the tokenizer of '{path}' comes with code of its own: set trust_remote_code "
                "to true to run it"
            ) from None
        raise UserError(
            f"no tokenizer can be read from '{path}', as a hub id or a local folder; "
            "the word toy is the embedded one"
        ) from error


def read_template(template: str) -> str:
    """Jinja text, given as it is or as the path of its file."""
    if "{{" in template or "{%" in template:
        return template
    if not Path(template).expanduser().is_file():
        raise UserError(f"chat_template '{template}' is neither jinja text nor a file")
    return Path(template).expanduser().read_text(encoding="utf-8")


def stop_ids(tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """The ids that end an answer: eos, and what the chat template writes after an assistant."""
    stops = {tokenizer.eos_token_id, end_of_turn_id(tokenizer)}
    return sorted(stop for stop in stops if stop is not None)


def end_of_turn_id(tokenizer: PreTrainedTokenizerBase) -> int | None:
    """The first added token that the template writes after an assistant's words, if any."""
    if tokenizer.chat_template is None:
        return None
    placeholder = "lit-align"  # any words that a template leaves as they are
    conversation = [
        {"role": "user", "content": "Hello"},
        {"role": "assistant", "content": placeholder},
    ]
    after = tokenize(tokenizer, render_chat(tokenizer, conversation).rpartition(placeholder)[2])
    added = tokenizer.added_tokens_decoder
    return next((i for i in after if i in added and str(added[i]).strip()), None)


def encode_prompt(tokenizer: PreTrainedTokenizerBase, prompt: str | list[Message]) -> list[int]:
    """Ids from which an answer goes on.

    A plain text gets the special tokens that its tokenizer puts in front and none behind; a
    conversation gets the template's head of an assistant turn.
    """
    if not isinstance(prompt, str):
        return tokenize(tokenizer, render_chat(tokenizer, prompt, add_generation_prompt=True))
    encoded = tokenizer(prompt, return_special_tokens_mask=True)
    ids: list[int] = list(encoded["input_ids"])
    end, added = len(ids), encoded["special_tokens_mask"]
    while end and added[end - 1]:
        end -= 1
    return ids[: end or 1]  # of an empty text only what stands in front


def encode_response(
    tokenizer: PreTrainedTokenizerBase,
    prompt: str | list[Message],
    completion: str | list[Message],
) -> tuple[list[int], list[int]]:
    """Ids of the prompt, exactly `encode_prompt`'s, and of the completion with one stop."""
    ids = encode_prompt(tokenizer, prompt)
    if isinstance(prompt, str) and isinstance(completion, str):
        full_ids = encode_prompt(tokenizer, prompt + completion)
        response = continuation(ids, full_ids, tokenizer, completion)
        return ids, end_with_stop(tokenizer, response)
    conversation = as_messages(prompt, "user") + as_messages(completion, "assistant")
    head = render_chat(tokenizer, as_messages(prompt, "user"), add_generation_prompt=True)
    ids, text = tokenize(tokenizer, head), render_chat(tokenizer, conversation)
    check_prefix(text, head)
    response = continuation(ids, tokenize(tokenizer, text), tokenizer, text[len(head) :])
    return ids, end_with_stop(tokenizer, response)


def encode_text(tokenizer: PreTrainedTokenizerBase, text: str) -> list[int]:
    """Ids of a plain text for language modelling, with one stop at its end."""
    return end_with_stop(tokenizer, encode_prompt(tokenizer, text))


def encode_messages(
    tokenizer: PreTrainedTokenizerBase, messages: list[Message]
) -> tuple[list[int], list[bool]]:
    """Ids of a conversation, and which are learnt: assistant turns, each with its stop.

    What follows the last assistant turn is left out: nothing there is learnt.
    """
    last = max((i for i, turn in enumerate(messages) if turn["role"] == "assistant"), default=-1)
    if last < 1:
        raise UserError("a conversation needs an assistant turn that answers another turn")
    conversation = messages[: last + 1]
    has_markers = re.search(r"\{%-?\s*generation\s*-?%\}", require_chat_template(tokenizer))
    ids, target_mask = (encode_by_markers if has_markers else encode_by_prefixes)(
        tokenizer, conversation
    )
    if True not in target_mask:
        raise UserError("the chat template's generation markers enclose no token of these turns")
    end = len(ids) - target_mask[::-1].index(True)
    closed = end_with_stop(tokenizer, ids[:end])
    return closed, [*target_mask[:end], True][: len(closed)]


def encode_by_markers(
    tokenizer: PreTrainedTokenizerBase, messages: list[Message]
) -> tuple[list[int], list[bool]]:
    """What the template encloses in `{% generation %}`, and a stop right behind it."""
    encoded = tokenizer.apply_chat_template(
        messages, return_dict=True, return_assistant_tokens_mask=True
    )
    ids, stops = list(encoded["input_ids"]), stop_ids(tokenizer)
    target_mask = [bool(inside) for inside in encoded["assistant_masks"]]
    for i in range(1, len(ids)):
        if target_mask[i - 1] and ids[i] in stops and ids[i - 1] not in stops:
            target_mask[i] = True
    return ids, target_mask


def encode_by_prefixes(
    tokenizer: PreTrainedTokenizerBase, messages: list[Message]
) -> tuple[list[int], list[bool]]:
    """Turn by turn: what rendering one more assistant turn adds is learnt, through its stop."""
    text, stops = render_chat(tokenizer, messages), stop_ids(tokenizer)
    ids: list[int] = []
    target_mask: list[bool] = []
    done = ""

    def encode_until(through: str) -> list[int]:
        """Ids of what comes after `done`."""
        check_prefix(text, through)
        check_prefix(through, done)
        return continuation(ids, tokenize(tokenizer, through), tokenizer, through[len(done) :])

    for i, message in enumerate(messages):
        if message["role"] != "assistant":
            continue
        head = render_chat(tokenizer, messages[:i], add_generation_prompt=True)
        context = encode_until(head)
        ids, target_mask, done = ids + context, target_mask + [False] * len(context), head
        through = render_chat(tokenizer, messages[: i + 1])
        response = encode_until(through)
        end = next((k + 1 for k, token in enumerate(response) if token in stops), len(response))
        target_mask += [k < end for k in range(len(response))]
        ids, done = ids + response, through
    return ids, target_mask


def render_chat(
    tokenizer: PreTrainedTokenizerBase, messages: list[Message], add_generation_prompt: bool = False
) -> str:
    """The chat template's text of a conversation, and the head of an answer if one comes next."""
    require_chat_template(tokenizer)
    if add_generation_prompt and (not messages or messages[-1]["role"] == "assistant"):
        raise UserError("a prompt must end in a turn that an assistant can answer")
    try:
        text = tokenizer.apply_chat_template(
            messages, tokenize=False, add_generation_prompt=add_generation_prompt
        )
    except Exception as error:  # templates raise errors of their own about roles and their order
        raise UserError(f"the chat template refuses the messages: {error}") from error
    return str(text)


def require_chat_template(tokenizer: PreTrainedTokenizerBase) -> str:
    """The chat template, or one sentence about what to set."""
    if tokenizer.chat_template is None:
        raise UserError(
            "the rows are conversations, but the tokenizer has no chat template: set "
            "data.chat_template to jinja text or to its file"
        )
    return str(tokenizer.get_chat_template())


def as_messages(text: str | list[Message], role: str) -> list[Message]:
    """A text as the one turn of `role`; messages as they are."""
    return [{"role": role, "content": text}] if isinstance(text, str) else text


def check_prefix(text: str, head: str) -> None:
    """Refuses a template that writes the beginning of a conversation in several ways."""
    if not text.startswith(head):
        raise UserError(
            "the chat template writes earlier turns anew when a turn is added, so that what is "
            "learnt cannot be told: set data.chat_template to one with {% generation %} markers"
        )


def tokenize(tokenizer: PreTrainedTokenizerBase, text: str) -> list[int]:
    """Ids of a text without special tokens of the tokenizer's own."""
    ids: list[int] = tokenizer(text, add_special_tokens=False)["input_ids"]
    return ids


def continuation(
    ids: list[int], full_ids: list[int], tokenizer: PreTrainedTokenizerBase, text: str
) -> list[int]:
    """Ids of `text` after `ids`: the rest of `whole`, unless a token spans the border."""
    if full_ids[: len(ids)] == ids:
        return full_ids[len(ids) :]
    return tokenize(tokenizer, text)


def end_with_stop(tokenizer: PreTrainedTokenizerBase, ids: Sequence[int]) -> list[int]:
    """`ids` through the first stop of their end; with eos where only words are at their end."""
    stops, end, stop = stop_ids(tokenizer), len(ids), -1
    while end and (ids[end - 1] in stops or not tokenizer.decode([ids[end - 1]]).strip()):
        end -= 1
        stop = end if ids[end] in stops else stop
    if stop >= 0:
        return list(ids[: stop + 1])
    if tokenizer.eos_token_id is None:
        raise UserError("the tokenizer has no eos token, so that no answer can learn to end")
    return [*ids, tokenizer.eos_token_id]
