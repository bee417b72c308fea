"""Token ids of texts and conversations: prompts, responses, stops and target masks."""

import pathlib

import pytest
from byte_tokenizer import CHATML, MARKED, SHARED, byte_tokenizer

from lit_align.data.text import (
    encode_messages,
    encode_prompt,
    encode_response,
    encode_text,
    load_tokenizer,
    stop_ids,
)
from lit_align.errors import UserError

USER = [{"role": "user", "content": "hi"}]
TALK = [
    {"role": "system", "content": "be brief"},
    {"role": "user", "content": "1+1?"},
    {"role": "assistant", "content": "2"},
    {"role": "user", "content": "sure?"},
    {"role": "assistant", "content": "yes\n"},
]


def target_runs(tokenizer, ids, target_mask):
    """Return each run of target tokens as text."""
    runs, before = [], False
    for token, now in zip(ids, target_mask, strict=True):
        if now and not before:
            runs.append([])
        if now:
            runs[-1].append(token)
        before = now
    return [tokenizer.decode(run) for run in runs]


def test_plain_prompt_and_response(plain):
    prompt, response = encode_response(plain, "2+2=", "4")
    assert prompt == encode_prompt(plain, "2+2=")
    assert plain.decode(prompt) == "2+2="
    assert plain.decode(response) == "4<|eos|>"


def test_toy_prompts_start_with_bos_and_do_not_end_with_eos():
    toy = load_tokenizer("toy")
    assert toy.decode(encode_prompt(toy, "review of")) == "<s> review of"
    assert toy.decode(encode_response(toy, "review of", "the plot")[1]) == "the plot </s>"


def test_trailing_special_tokens_of_prompt_are_removed():
    toy = load_tokenizer("toy")
    toy.backend_tokenizer.post_processor = both_ends(toy)
    assert toy.decode(toy("review")["input_ids"]) == "<s> review </s>"
    assert toy.decode(encode_prompt(toy, "review")) == "<s> review"
    assert toy.decode(encode_prompt(toy, "review </s>")) == "<s> review </s>"
    assert toy.decode(encode_text(toy, "review")) == "<s> review </s>"
    assert toy.decode(encode_prompt(toy, "")) == "<s>"


def both_ends(toy):
    from tokenizers import processors

    ids = [("<s>", toy.bos_token_id), ("</s>", toy.eos_token_id)]
    return processors.TemplateProcessing("<s> $A </s>", special_tokens=ids)


def test_response_with_stop_gets_no_second_stop(plain):
    assert plain.decode(encode_response(plain, "a", "b<|eos|>")[1]) == "b<|eos|>"
    assert plain.decode(encode_response(plain, "a", "b<|eos|>\n<|eos|>")[1]) == "b<|eos|>"
    assert plain.decode(encode_response(plain, "a", "b\n")[1]) == "b\n<|eos|>"


def test_prompt_is_unchanged_by_token_across_border():
    tokenizer = byte_tokenizer(merges=[("a", "b")])
    assert len(tokenizer("ab")["input_ids"]) == 1
    prompt, response = encode_response(tokenizer, "a", "b")
    assert (tokenizer.decode(prompt), tokenizer.decode(response)) == ("a", "b<|eos|>")
    assert prompt == encode_prompt(tokenizer, "a")


def test_stop_ids_are_eos_and_end_of_turn(plain, chat):
    eos, end = chat.convert_tokens_to_ids(["<|eos|>", "<|im_end|>"])
    assert stop_ids(plain) == [plain.eos_token_id]
    assert stop_ids(chat) == sorted([eos, end])
    chat.chat_template = CHATML.replace("<|im_end|>\n", "<|eos|>")
    assert stop_ids(chat) == [eos]
    chat.chat_template = CHATML.replace("<|im_end|>", "")
    assert stop_ids(chat) == [eos]


def test_chat_prompt_and_response(chat):
    prompt, response = encode_response(chat, USER, [{"role": "assistant", "content": "hello"}])
    assert prompt == encode_prompt(chat, USER)
    assert chat.decode(prompt) == "<|im_start|>user\nhi<|im_end|>\n<|im_start|>assistant\n"
    assert chat.decode(response) == "hello<|im_end|>"
    assert encode_response(chat, USER, "hello") == (prompt, response)
    assert encode_response(chat, "hi", [{"role": "assistant", "content": "hello"}])[1] == response


@pytest.mark.parametrize(
    ("end", "stop"),
    [
        ("<|im_end|>\n<|eos|>", "<|im_end|>"),  # two stops in the template
        ("<|eos|>\n", "<|eos|>"),
        ("\n", "\n<|eos|>"),  # none
    ],
)
def test_response_has_one_stop_with_any_template(chat, end, stop):
    chat.chat_template = CHATML.replace("<|im_end|>\n", end)
    assert chat.decode(encode_response(chat, USER, "hello")[1]) == "hello" + stop


@pytest.mark.parametrize("template", [CHATML, MARKED])
def test_assistant_turns_with_stops_are_targets(chat, template):
    chat.chat_template = template
    ids, target_mask = encode_messages(chat, TALK)
    assert chat.decode(ids) == (
        "<|im_start|>system\nbe brief<|im_end|>\n<|im_start|>user\n1+1?<|im_end|>\n"
        "<|im_start|>assistant\n2<|im_end|>\n<|im_start|>user\nsure?<|im_end|>\n"
        "<|im_start|>assistant\nyes\n<|im_end|>"
    )
    assert target_runs(chat, ids, target_mask) == ["2<|im_end|>", "yes\n<|im_end|>"]


def test_stop_after_generation_block_is_target(chat):
    chat.chat_template = MARKED.replace(
        "{{ turn.content + '<|im_end|>' }}{% endgeneration %}",
        "{{ turn.content }}{% endgeneration %}{{ '<|im_end|>' }}",
    )
    assert target_runs(chat, *encode_messages(chat, TALK))[0] == "2<|im_end|>"


def test_turns_after_last_assistant_turn_are_left_out(chat):
    assert encode_messages(chat, [*TALK, *USER]) == encode_messages(chat, TALK)


def test_last_assistant_turn_is_encoded_as_response(chat):
    ids, target_mask = encode_messages(chat, TALK)
    prompt, response = encode_response(chat, TALK[:-1], TALK[-1:])
    assert ids == prompt + response
    assert target_mask[-len(response) :] == [True] * len(response)


def test_template_that_changes_earlier_turns_is_refused(chat):
    chat.chat_template = "{{ messages | length }}" + CHATML
    with pytest.raises(ValueError, match=r"changes earlier turns.*Set --data\.chat_template"):
        encode_messages(chat, TALK)
    with pytest.raises(ValueError, match="changes earlier turns"):
        encode_response(chat, USER, "hello")


def test_conversations_need_chat_template(plain):
    with pytest.raises(ValueError, match=r"no chat template\. Set --data\.chat_template"):
        encode_prompt(plain, USER)
    with pytest.raises(ValueError, match="no chat template"):
        encode_messages(plain, TALK)


def test_invalid_conversations_are_refused(chat):
    with pytest.raises(ValueError, match="must end with a turn of another role than assistant"):
        encode_prompt(chat, TALK)
    with pytest.raises(ValueError, match="needs an assistant turn"):
        encode_messages(chat, USER)
    chat.chat_template = "{{ raise_exception('no system turns here') }}"
    with pytest.raises(ValueError, match="refuses the messages: no system turns here"):
        encode_prompt(chat, USER)


def test_pad_is_existing_token(chat_path):
    tokenizer = load_tokenizer(chat_path)
    assert tokenizer.pad_token_id == tokenizer.eos_token_id
    assert len(tokenizer) == 256 + 3
    toy = load_tokenizer("toy")
    assert toy.pad_token_id != toy.eos_token_id


def test_template_from_text_and_file(chat_path, tmp_path: pathlib.Path):
    assert load_tokenizer(chat_path).chat_template == CHATML
    assert load_tokenizer(chat_path, chat_template=MARKED).chat_template == MARKED
    (tmp_path / "chat.jinja").write_text(MARKED)
    assert load_tokenizer("toy", str(tmp_path / "chat.jinja")).chat_template == MARKED
    with pytest.raises(UserError, match=r"'chatty.jinja' is neither jinja text nor a file"):
        load_tokenizer("toy", "chatty.jinja")


def test_invalid_tokenizers_are_refused(tmp_path: pathlib.Path, monkeypatch):
    with pytest.raises(UserError, match=r"no tokenizer folder './nowhere'"):
        load_tokenizer("./nowhere")
    with pytest.raises(ValueError, match="no tokenizer can be loaded from"):
        load_tokenizer(str(tmp_path))

    def needs_code(*args, **kwargs):
        raise ValueError("pass trust_remote_code=True")

    monkeypatch.setattr("lit_align.data.text.AutoTokenizer.from_pretrained", needs_code)
    with pytest.raises(ValueError, match=r"its own Python code\. Set trust_remote_code to true"):
        load_tokenizer("someone/model")


def test_real_tokenizer_joins_prompt_and_response():
    if not (SHARED / "models" / "stories260K").is_dir():
        pytest.skip("the shared real model is not here")
    tokenizer = load_tokenizer(str(SHARED / "models" / "stories260K"))
    prompt, response = encode_response(tokenizer, "Once upon a time", ", there was a cat.")
    assert tokenizer.decode(prompt + response) == "Once upon a time, there was a cat.</s>"
    assert tokenizer.pad_token_id == 0


def test_eos_token_can_be_replaced(chat_path):
    tokenizer = load_tokenizer(chat_path, eos_token="<|im_start|>")
    end = tokenizer.convert_tokens_to_ids("<|im_start|>")
    assert end in stop_ids(tokenizer)
    assert encode_text(tokenizer, "story")[-1] == end
    with pytest.raises(ValueError, match=r"has no token '<end>'\. Set --data\.eos_token"):
        load_tokenizer(chat_path, eos_token="<end>")
