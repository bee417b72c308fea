"""Tokenizers, and the encoding of texts and conversations as token ids.

A response to train on ends with exactly one stop token: the tokenizer's eos, or the end of turn of
its chat template. The ids of a prompt never depend on its response.
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
    """Return the tokenizer of a hub id or a local folder.

    Args:
        path: Hub id or local folder. The word toy is the embedded word-level tokenizer.
        chat_template: Jinja text or the path of a file with it. Default: the tokenizer's own.
        trust_remote_code: Run Python code that comes with the tokenizer.
        eos_token: Token that ends a response. Default: the tokenizer's own eos.

    Example:
        >>> tokenizer = load_tokenizer("toy")
        >>> tokenizer("the plot")["input_ids"]
        [2, 6, 16]
    """
    tokenizer = toy_tokenizer() if path == "toy" else read_tokenizer(path, trust_remote_code)
    if chat_template is not None:
        tokenizer.chat_template = read_template(chat_template)
    if eos_token is not None:
        if eos_token not in tokenizer.get_vocab():
            raise UserError(
                f"the tokenizer of '{path}' has no token '{eos_token}'. Set --data.eos_token."
            )
        tokenizer.eos_token = eos_token
    if tokenizer.pad_token_id is None:  # any token of the vocabulary: masks come from lengths
        known = [tokenizer.eos_token, tokenizer.unk_token, tokenizer.bos_token]
        known.append(tokenizer.convert_ids_to_tokens(0))
        tokenizer.pad_token = next(token for token in known if token is not None)
    return tokenizer


def read_tokenizer(path: str, trust_remote_code: bool) -> PreTrainedTokenizerBase:
    """Return the tokenizer that transformers loads from `path`, or raise a UserError."""
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
                f"the tokenizer of '{path}' needs its own Python code. Set trust_remote_code to "
                "true to run it."
            ) from None
        raise UserError(
            f"no tokenizer can be loaded from '{path}'. Use a hub id, a local folder, or toy for "
            "the embedded one."
        ) from error


def read_template(template: str) -> str:
    """Return Jinja text, from the text itself or from the path of a file.

    Example:
        >>> read_template("{{ messages[0].content }}")
        '{{ messages[0].content }}'
    """
    if "{{" in template or "{%" in template:
        return template
    if not Path(template).expanduser().is_file():
        raise UserError(f"chat_template '{template}' is neither jinja text nor a file")
    return Path(template).expanduser().read_text(encoding="utf-8")


def stop_ids(tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """Return the sorted token ids that end a response: eos and the template's end of turn.

    Example:
        >>> stop_ids(toy_tokenizer())
        [3]
    """
    stops = {tokenizer.eos_token_id, end_of_turn_id(tokenizer)}
    return sorted(stop for stop in stops if stop is not None)


def end_of_turn_id(tokenizer: PreTrainedTokenizerBase) -> int | None:
    """Return the first added token that the template writes after an assistant turn, if any.

    Example:
        >>> tokenizer = toy_tokenizer()
        >>> tokenizer.chat_template = "{{ messages[-1].content }} </s>"
        >>> tokenizer.convert_ids_to_tokens(end_of_turn_id(tokenizer))
        '</s>'
    """
    if tokenizer.chat_template is None:
        return None
    placeholder = "lit-align"  # any text that a template does not change
    conversation = [
        {"role": "user", "content": "Hello"},
        {"role": "assistant", "content": placeholder},
    ]
    after = tokenize(tokenizer, render_chat(tokenizer, conversation).rpartition(placeholder)[2])
    added = tokenizer.added_tokens_decoder
    return next((i for i in after if i in added and str(added[i]).strip()), None)


def encode_prompt(tokenizer: PreTrainedTokenizerBase, prompt: str | list[Message]) -> list[int]:
    """Return prompt token ids, ready for generation.

    A plain text gets the tokenizer's leading special tokens and no trailing ones. A conversation
    ends with the template's header of an assistant turn.

    Example:
        >>> tokenizer = toy_tokenizer()
        >>> tokenizer.convert_ids_to_tokens(encode_prompt(tokenizer, "the plot"))
        ['<s>', 'the', 'plot']
    """
    if not isinstance(prompt, str):
        return tokenize(tokenizer, render_chat(tokenizer, prompt, add_generation_prompt=True))
    encoded = tokenizer(prompt, return_special_tokens_mask=True)
    ids: list[int] = list(encoded["input_ids"])
    end, added = len(ids), encoded["special_tokens_mask"]
    while end and added[end - 1]:
        end -= 1
    return ids[: end or 1]  # an empty text still gets its leading special token


def encode_response(
    tokenizer: PreTrainedTokenizerBase,
    prompt: str | list[Message],
    completion: str | list[Message],
) -> tuple[list[int], list[int]]:
    """Return the token ids of the prompt, as `encode_prompt`, and of the response with its stop.

    Args:
        tokenizer: Tokenizer, with a chat template if one of the two is a conversation.
        prompt: Text or messages.
        completion: Text or messages of the response.

    Example:
        >>> encode_response(toy_tokenizer(), "review of", "the plot")
        ([2, 4, 5], [6, 16, 3])
    """
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
    """Return the token ids of a plain text for language modeling, with one stop at its end.

    Example:
        >>> encode_text(toy_tokenizer(), "the plot")
        [2, 6, 16, 3]
    """
    return end_with_stop(tokenizer, encode_prompt(tokenizer, text))


def encode_messages(
    tokenizer: PreTrainedTokenizerBase, messages: list[Message]
) -> tuple[list[int], list[bool]]:
    """Return the token ids of a conversation and the mask of its assistant turns with their stops.

    Turns after the last assistant turn are left out.

    Args:
        tokenizer: Tokenizer with a chat template.
        messages: Turns with role and content.

    Example:
        >>> toy = load_tokenizer("toy", "{% for m in messages %}{{ m.content }} </s>{% endfor %}")
        >>> talk = [{"role": "user", "content": "film"}, {"role": "assistant", "content": "good"}]
        >>> encode_messages(toy, talk)
        ([14, 3, 129, 3], [False, False, True, True])
    """
    last = max((i for i, turn in enumerate(messages) if turn["role"] == "assistant"), default=-1)
    if last < 1:
        raise UserError("a conversation needs an assistant turn after another turn")
    conversation = messages[: last + 1]
    has_markers = re.search(r"\{%-?\s*generation\s*-?%\}", require_chat_template(tokenizer))
    ids, target_mask = (encode_by_markers if has_markers else encode_by_prefixes)(
        tokenizer, conversation
    )
    if True not in target_mask:
        raise UserError(
            "the generation markers of the chat template enclose no token of the assistant turns. "
            "Set --data.chat_template."
        )
    end = len(ids) - target_mask[::-1].index(True)
    closed = end_with_stop(tokenizer, ids[:end])
    return closed, [*target_mask[:end], True][: len(closed)]


def encode_by_markers(
    tokenizer: PreTrainedTokenizerBase, messages: list[Message]
) -> tuple[list[int], list[bool]]:
    """Return token ids and the mask of `{% generation %}` blocks with the stop right after them.

    Example:
        >>> block = "film {% generation %}good{% endgeneration %} </s>"
        >>> encode_by_markers(load_tokenizer("toy", block), as_messages("hi", "user"))
        ([14, 129, 3], [False, True, True])
    """
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
    """Return token ids and the mask of the text that each rendered assistant turn adds.

    The mask ends with the stop of a turn.

    Example:
        >>> toy = load_tokenizer("toy", "{% for m in messages %}{{ m.content }} </s>{% endfor %}")
        >>> talk = [{"role": "user", "content": "film"}, {"role": "assistant", "content": "good"}]
        >>> encode_by_prefixes(toy, talk)[1]
        [False, False, True, True]
    """
    text, stops = render_chat(tokenizer, messages), stop_ids(tokenizer)
    ids: list[int] = []
    target_mask: list[bool] = []
    done = ""

    def encode_until(through: str) -> list[int]:
        """Return the token ids of the text between `done` and the end of `through`."""
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
    """Return the text of a conversation from the chat template.

    Args:
        tokenizer: Tokenizer with a chat template.
        messages: Turns with role and content.
        add_generation_prompt: Append the header of an assistant turn.

    Example:
        >>> toy = load_tokenizer("toy", "{% for m in messages %}{{ m.content }} </s>{% endfor %}")
        >>> render_chat(toy, [{"role": "user", "content": "film"}])
        'film </s>'
    """
    require_chat_template(tokenizer)
    if add_generation_prompt and (not messages or messages[-1]["role"] == "assistant"):
        raise UserError("a prompt must end with a turn of another role than assistant")
    try:
        text = tokenizer.apply_chat_template(
            messages, tokenize=False, add_generation_prompt=add_generation_prompt
        )
    except Exception as error:  # templates raise any error about roles and their order
        raise UserError(f"the chat template refuses the messages: {error}") from error
    return str(text)


def require_chat_template(tokenizer: PreTrainedTokenizerBase) -> str:
    """Return the chat template, or raise a UserError if it is not set.

    Example:
        >>> require_chat_template(load_tokenizer("toy", "{{ messages }}"))
        '{{ messages }}'
    """
    if tokenizer.chat_template is None:
        raise UserError(
            "the rows are conversations, but the tokenizer has no chat template. Set "
            "--data.chat_template to jinja text or a file."
        )
    return str(tokenizer.get_chat_template())


def as_messages(text: str | list[Message], role: str) -> list[Message]:
    """Return a text as one turn of `role`, and messages unchanged.

    Example:
        >>> as_messages("hi", "user")
        [{'role': 'user', 'content': 'hi'}]
    """
    return [{"role": role, "content": text}] if isinstance(text, str) else text


def check_prefix(text: str, head: str) -> None:
    """Raise a UserError if a rendered conversation does not start with its rendered first turns.

    Example:
        >>> check_prefix("film </s> good </s>", "film </s>")
    """
    if not text.startswith(head):
        raise UserError(
            "the chat template changes earlier turns when a turn is added. Set "
            "--data.chat_template to one with {% generation %} markers."
        )


def tokenize(tokenizer: PreTrainedTokenizerBase, text: str) -> list[int]:
    """Return the token ids of a text without added special tokens.

    Example:
        >>> tokenize(toy_tokenizer(), "the plot")
        [6, 16]
    """
    ids: list[int] = tokenizer(text, add_special_tokens=False)["input_ids"]
    return ids


def continuation(
    ids: list[int], full_ids: list[int], tokenizer: PreTrainedTokenizerBase, text: str
) -> list[int]:
    """Return the token ids that follow `ids`: the rest of `full_ids`, or `text` by itself.

    Args:
        ids: Token ids of the first part.
        full_ids: Token ids of both parts together. They start with `ids` unless a token spans
            the border.
        tokenizer: Tokenizer of all.
        text: Second part.

    Example:
        >>> continuation([6], [6, 16], toy_tokenizer(), "plot")
        [16]
    """
    if full_ids[: len(ids)] == ids:
        return full_ids[len(ids) :]
    return tokenize(tokenizer, text)


def end_with_stop(tokenizer: PreTrainedTokenizerBase, ids: Sequence[int]) -> list[int]:
    """Return the ids with exactly one stop at the end: their own, or else eos.

    White space after the stop is removed.

    Example:
        >>> end_with_stop(toy_tokenizer(), [6, 16]), end_with_stop(toy_tokenizer(), [6, 16, 3, 3])
        ([6, 16, 3], [6, 16, 3])
    """
    # Remove trailing white space. Keep one stop token of a run of stops.
    stops, end, stop = stop_ids(tokenizer), len(ids), -1
    while end and (ids[end - 1] in stops or not tokenizer.decode([ids[end - 1]]).strip()):
        end -= 1
        stop = end if ids[end] in stops else stop
    if stop >= 0:
        return list(ids[: stop + 1])
    if tokenizer.eos_token_id is None:
        raise UserError("the tokenizer has no eos token to end responses. Set --data.eos_token.")
    return [*ids, tokenizer.eos_token_id]
