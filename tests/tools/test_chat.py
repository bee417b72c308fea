"""A conversation with a model over stdin."""

import io

import pytest
import torch
from tiny_models import WORDS

from lit_align.batches import Experience
from lit_align.cli.main import main
from lit_align.data.text import load_tokenizer
from lit_align.models.generation.decode import SamplingParams
from lit_align.models.policy import Policy
from lit_align.tools.chat import ChatModel, latest_of_each

TEMPLATE = (
    "{% for turn in messages %}{{ turn['content'] + ' ' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ ':' }}{% endif %}"
)
PROMPT = "review of the silent river"


@pytest.fixture
def model(tmp_path):
    """Save random weights with the toy tokenizer."""

    def save(name: str, seed: int = 0, template: str | None = None) -> str:
        torch.manual_seed(seed)
        Policy(config={**WORDS, "initializer_range": 0.3}).save(tmp_path / name)
        tokenizer = load_tokenizer("toy", template)
        tokenizer.save_pretrained(tmp_path / name)
        return str(tmp_path / name)

    return save


def chat_output(monkeypatch, capsys, argv: list[str], *lines: str) -> str:
    monkeypatch.setattr("sys.stdin", io.StringIO("".join(f"{line}\n" for line in lines)))
    assert main(["chat", *argv]) == 0
    return capsys.readouterr().out


def test_chunks_add_up_to_one_call_of_generate(model):
    chat_model = ChatModel(model("one"), max_new_tokens=20, temperature=0)
    pieces = list(chat_model.stream_response(PROMPT))
    ids = chat_model.tokenizer(PROMPT)["input_ids"]
    ids = ids[: len(ids) - (ids[-1] in chat_model.stops)]
    prompt = Experience(
        prompts=torch.tensor([ids]),
        prompt_mask=torch.ones(1, len(ids), dtype=torch.bool),
        prompt_lengths=[len(ids)],
    )
    noise = torch.zeros(1, 20)
    response = chat_model.policy.generate(
        prompt, noise, [True], chat_model.stops, 0, SamplingParams()
    )
    assert pieces[-1] == chat_model.decode(response.tokens[0].tolist())
    assert len(pieces) > 1
    assert pieces[-1].startswith(pieces[0])


def test_a_conversation_is_kept_until_it_is_cleared(model):
    chat_model = ChatModel(model("one", template=TEMPLATE), max_new_tokens=3, system="good film")
    response = [*chat_model.stream_response("the plot")][-1]
    assert [turn["content"] for turn in chat_model.turns] == ["good film", "the plot", response]
    chat_model.clear()
    assert [turn["content"] for turn in chat_model.turns] == ["good film"]


def test_a_response_ends_at_a_stop_token(model):
    chat_model = ChatModel(model("one"), max_new_tokens=40)
    chat_model.stops = list(range(192))
    assert list(chat_model.stream_response(PROMPT)) == [""]


def test_one_seed_gives_equal_responses(model, monkeypatch, capsys):
    argv = [model("one"), "--max_new_tokens", "12", "--seed", "3"]
    assert chat_output(monkeypatch, capsys, argv, PROMPT) == chat_output(
        monkeypatch, capsys, argv, PROMPT
    )
    other = chat_output(monkeypatch, capsys, [*argv[:-1], "4"], PROMPT)
    assert other != chat_output(monkeypatch, capsys, argv, PROMPT)


def test_two_models_are_shown_side_by_side(model, monkeypatch, capsys):
    argv = [model("one"), "--compare_with", model("two", seed=1), "--max_new_tokens", "4"]
    shown = chat_output(monkeypatch, capsys, argv, PROMPT).replace("\n", "")
    assert "│" in shown
    assert shown.count("template") == 2  # once per model in the notice


def test_commands_print_what_they_did(model, monkeypatch, capsys):
    argv = [model("one"), "--max_new_tokens", "4"]
    shown = chat_output(
        monkeypatch, capsys, argv, "/clear", "/temperature 0.5", "/temperature x",
        "/temperature -1", "/what", "", "/quit", "never read",
    )  # fmt: skip
    for part in (
        "conversation removed",
        "temperature 0.5",
        "must be a number, found x",
        "must be at least 0",
    ):
        assert part in shown
    assert shown.count("/clear removes") == 2


def test_a_conversation_that_is_too_long_does_not_end_the_program(model, monkeypatch, capsys):
    argv = [model("one"), "--max_new_tokens", "100", "--temperature", "0"]
    shown = " ".join(chat_output(monkeypatch, capsys, argv, "river " * 60, "/clear").split())
    assert "the conversation of 61 tokens plus a response of 100 exceeds it" in shown
    assert "conversation removed" in shown


def test_control_characters_of_terminals_are_removed(model, monkeypatch):
    chat_model = ChatModel(model("one"))
    monkeypatch.setattr(
        type(chat_model.tokenizer), "decode", lambda self, ids, **settings: "a\x1b[31mb\n\x07c"
    )
    assert chat_model.decode([1]) == "a[31mb\nc"


def test_the_latest_values_are_yielded_until_all_iterators_have_ended():
    responses = latest_of_each([iter("ab"), iter("xyz")])
    assert list(responses) == [["a", "x"], ["b", "y"], ["b", "z"]]


@pytest.mark.parametrize(
    ("more", "message"),
    [
        (("--max_new_tokens", "0"), "max_new_tokens must be at least 1, found 0"),
        (("--temperature", "-1"), "temperature must be at least 0, found -1"),
        (("--device", "nowhere"), "--device nowhere is not available: "),
        (("--compare_with", "./nowhere"), "there is no tokenizer folder './nowhere'"),
    ],
)
def test_a_mistake_is_a_message(more, message, model, capsys):
    assert main(["chat", model("one"), *more]) == 2
    assert message in capsys.readouterr().err
