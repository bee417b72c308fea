"""Texts and conversations as token ids: prompts, answers, stops, what is learnt."""

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

USER = [{"role": "user", "content": "hi"}]
TALK = [
    {"role": "system", "content": "be brief"},
    {"role": "user", "content": "1+1?"},
    {"role": "assistant", "content": "2"},
    {"role": "user", "content": "sure?"},
    {"role": "assistant", "content": "yes\n"},
]


def learnt_text(tokenizer, ids, learnt):
    """Runs of learnt tokens as texts."""
    runs, before = [], False
    for token, now in zip(ids, learnt, strict=True):
        if now and not before:
            runs.append([])
        if now:
            runs[-1].append(token)
        before = now
    return [tokenizer.decode(run) for run in runs]


def test_plain_prompt_and_answer(plain):
    prompt, answer = encode_response(plain, "2+2=", "4")
    assert prompt == encode_prompt(plain, "2+2=")
    assert plain.decode(prompt) == "2+2="
    assert plain.decode(answer) == "4<|eos|>"


def test_toy_prompts_begin_with_bos_and_do_not_end_with_eos():
    toy = load_tokenizer("toy")
    assert toy.decode(encode_prompt(toy, "review of")) == "<s> review of"
    assert toy.decode(encode_response(toy, "review of", "the plot")[1]) == "the plot </s>"


def test_special_tokens_behind_a_prompt_are_left_out():
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


def test_an_answer_that_brings_its_stop_gets_no_second(plain):
    assert plain.decode(encode_response(plain, "a", "b<|eos|>")[1]) == "b<|eos|>"
    assert plain.decode(encode_response(plain, "a", "b<|eos|>\n<|eos|>")[1]) == "b<|eos|>"
    assert plain.decode(encode_response(plain, "a", "b\n")[1]) == "b\n<|eos|>"


def test_a_token_across_the_border_leaves_the_prompt_as_it_is():
    tokenizer = byte_tokenizer(merges=[("a", "b")])
    assert len(tokenizer("ab")["input_ids"]) == 1
    prompt, answer = encode_response(tokenizer, "a", "b")
    assert (tokenizer.decode(prompt), tokenizer.decode(answer)) == ("a", "b<|eos|>")
    assert prompt == encode_prompt(tokenizer, "a")


def test_stops_are_eos_and_end_of_turn(plain, chat):
    eos, end = chat.convert_tokens_to_ids(["<|eos|>", "<|im_end|>"])
    assert stop_ids(plain) == [plain.eos_token_id]
    assert stop_ids(chat) == sorted([eos, end])
    chat.chat_template = CHATML.replace("<|im_end|>\n", "<|eos|>")
    assert stop_ids(chat) == [eos]
    chat.chat_template = CHATML.replace("<|im_end|>", "")
    assert stop_ids(chat) == [eos]


def test_chat_prompt_and_answer(chat):
    prompt, answer = encode_response(chat, USER, [{"role": "assistant", "content": "hello"}])
    assert prompt == encode_prompt(chat, USER)
    assert chat.decode(prompt) == "<|im_start|>user\nhi<|im_end|>\n<|im_start|>assistant\n"
    assert chat.decode(answer) == "hello<|im_end|>"
    assert encode_response(chat, USER, "hello") == (prompt, answer)
    assert encode_response(chat, "hi", [{"role": "assistant", "content": "hello"}])[1] == answer


@pytest.mark.parametrize(
    ("end", "stop"),
    [
        ("<|im_end|>\n<|eos|>", "<|im_end|>"),  # two stops in the template
        ("<|eos|>\n", "<|eos|>"),
        ("\n", "\n<|eos|>"),  # none
    ],
)
def test_one_stop_whatever_the_template_writes(chat, end, stop):
    chat.chat_template = CHATML.replace("<|im_end|>\n", end)
    assert chat.decode(encode_response(chat, USER, "hello")[1]) == "hello" + stop


@pytest.mark.parametrize("template", [CHATML, MARKED])
def test_assistant_turns_and_their_stops_are_learnt(chat, template):
    chat.chat_template = template
    ids, learnt = encode_messages(chat, TALK)
    assert chat.decode(ids) == (
        "<|im_start|>system\nbe brief<|im_end|>\n<|im_start|>user\n1+1?<|im_end|>\n"
        "<|im_start|>assistant\n2<|im_end|>\n<|im_start|>user\nsure?<|im_end|>\n"
        "<|im_start|>assistant\nyes\n<|im_end|>"
    )
    assert learnt_text(chat, ids, learnt) == ["2<|im_end|>", "yes\n<|im_end|>"]


def test_a_stop_behind_the_markers_is_learnt_too(chat):
    chat.chat_template = MARKED.replace(
        "{{ turn.content + '<|im_end|>' }}{% endgeneration %}",
        "{{ turn.content }}{% endgeneration %}{{ '<|im_end|>' }}",
    )
    assert learnt_text(chat, *encode_messages(chat, TALK))[0] == "2<|im_end|>"


def test_what_follows_the_last_answer_is_left_out(chat):
    assert encode_messages(chat, [*TALK, *USER]) == encode_messages(chat, TALK)


def test_the_last_answer_of_a_conversation_is_encoded_as_an_answer(chat):
    ids, learnt = encode_messages(chat, TALK)
    prompt, answer = encode_response(chat, TALK[:-1], TALK[-1:])
    assert ids == prompt + answer
    assert learnt[-len(answer) :] == [True] * len(answer)


def test_a_template_that_rewrites_earlier_turns_is_refused(chat):
    chat.chat_template = "{{ messages | length }}" + CHATML
    with pytest.raises(ValueError, match=r"writes earlier turns anew.*set data\.chat_template"):
        encode_messages(chat, TALK)
    with pytest.raises(ValueError, match="writes earlier turns anew"):
        encode_response(chat, USER, "hello")


def test_conversations_need_a_template(plain):
    with pytest.raises(ValueError, match=r"no chat template: set data\.chat_template"):
        encode_prompt(plain, USER)
    with pytest.raises(ValueError, match="no chat template"):
        encode_messages(plain, TALK)


def test_prompts_that_nobody_can_answer(chat):
    with pytest.raises(ValueError, match="must end in a turn that an assistant can answer"):
        encode_prompt(chat, TALK)
    with pytest.raises(ValueError, match="needs an assistant turn"):
        encode_messages(chat, USER)
    chat.chat_template = "{{ raise_exception('no system turns here') }}"
    with pytest.raises(ValueError, match="refuses the messages: no system turns here"):
        encode_prompt(chat, USER)


def test_pad_is_a_known_token_and_the_vocabulary_stays(chat_path):
    tokenizer = load_tokenizer(chat_path)
    assert tokenizer.pad_token_id == tokenizer.eos_token_id
    assert len(tokenizer) == 256 + 3
    toy = load_tokenizer("toy")
    assert toy.pad_token_id != toy.eos_token_id


def test_templates_as_text_and_as_file(chat_path, tmp_path: pathlib.Path):
    assert load_tokenizer(chat_path).chat_template == CHATML
    assert load_tokenizer(chat_path, chat_template=MARKED).chat_template == MARKED
    (tmp_path / "chat.jinja").write_text(MARKED)
    assert load_tokenizer("toy", str(tmp_path / "chat.jinja")).chat_template == MARKED
    with pytest.raises(FileNotFoundError, match=r"'chatty.jinja' is neither jinja text nor a file"):
        load_tokenizer("toy", "chatty.jinja")


def test_tokenizers_that_cannot_be_read(tmp_path: pathlib.Path, monkeypatch):
    with pytest.raises(FileNotFoundError, match=r"no tokenizer folder './nowhere'"):
        load_tokenizer("./nowhere")
    with pytest.raises(ValueError, match="no tokenizer can be read from"):
        load_tokenizer(str(tmp_path))

    def needs_code(*args, **kwargs):
        raise ValueError("pass trust_remote_code=True")

    monkeypatch.setattr("lit_align.data.text.AutoTokenizer.from_pretrained", needs_code)
    with pytest.raises(ValueError, match=r"code of its own: set trust_remote_code to true"):
        load_tokenizer("someone/model")


def test_a_real_tokenizer_writes_answers_where_the_prompt_ends():
    if not (SHARED / "models" / "stories260K").is_dir():
        pytest.skip("the shared real model is not here")
    tokenizer = load_tokenizer(str(SHARED / "models" / "stories260K"))
    prompt, answer = encode_response(tokenizer, "Once upon a time", ", there was a cat.")
    assert tokenizer.decode(prompt + answer) == "Once upon a time, there was a cat.</s>"
    assert tokenizer.pad_token_id == 0


def test_another_token_may_end_answers(chat_path):
    tokenizer = load_tokenizer(chat_path, eos_token="<|im_start|>")
    end = tokenizer.convert_tokens_to_ids("<|im_start|>")
    assert end in stop_ids(tokenizer)
    assert encode_text(tokenizer, "story")[-1] == end
    with pytest.raises(ValueError, match="has no token '<end>' to be its eos"):
        load_tokenizer(chat_path, eos_token="<end>")
