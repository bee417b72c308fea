"""Inputs of both libraries: a random Llama, its tokenizer, and rows of known lengths."""

from __future__ import annotations

import json
import random
from pathlib import Path

import torch
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import WhitespaceSplit
from transformers import GenerationConfig, LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from bench.case import MODELS, Case

PAD, EOS = 0, 1
FIRST_WORD = 3


def reward(completions: list[str], **columns: object) -> list[float]:
    """Return a score for each response that takes no time to compute."""
    return [float(sum(map(ord, text[:8])) % 7) for text in completions]


def write_files(case: Case, folder: Path, steps: int) -> None:
    """Write `rows.jsonl`, and the folder `model` if it does not exist.

    Args:
        case: Case of the benchmark.
        folder: Folder to write to.
        steps: Number of optimizer steps that the rows are for.
    """
    if not (folder / "model").exists():
        save_tokenizer(MODELS[case.model]["vocab_size"], folder / "model")
        save_model(case, folder / "model")
    source = random.Random(0)
    rows = steps * case.shape.num_rows // (case.shape.num_samples if case.is_online else 1)
    with (folder / "rows.jsonl").open("w") as file:
        for _ in range(rows):
            file.write(json.dumps(row(case, source)) + "\n")


def save_tokenizer(vocabulary: int, folder: Path) -> None:
    """Save a tokenizer with one word per token id.

    Args:
        vocabulary: Number of token ids.
        folder: Folder to write to.
    """
    words = ["<pad>", "<eos>", "<unk>", *(f"w{i}" for i in range(FIRST_WORD, vocabulary))]
    core = Tokenizer(WordLevel({word: i for i, word in enumerate(words)}, unk_token="<unk>"))
    core.pre_tokenizer = WhitespaceSplit()
    special = {"pad_token": "<pad>", "eos_token": "<eos>", "unk_token": "<unk>"}
    PreTrainedTokenizerFast(tokenizer_object=core, **special).save_pretrained(folder)


def save_model(case: Case, folder: Path) -> None:
    """Save a model with random weights, whose responses never end or end after `mean_response`.

    Args:
        case: Case of the benchmark.
        folder: Folder to write to.
    """
    size, shape = {"num_attention_heads": 4, **MODELS[case.model]}, case.shape
    config = LlamaConfig(
        **size,
        max_position_embeddings=max(512, shape.max_tokens),
        pad_token_id=PAD,
        eos_token_id=EOS,
        bos_token_id=None,
    )
    torch.manual_seed(0)
    with torch.device(case.device):
        model = LlamaForCausalLM(config)
    with torch.no_grad():
        # No stop: a hidden channel that is larger than any layer's output lowers its logit.
        if case.is_online and not shape.mean_response:
            model.model.embed_tokens.weight[:, 0] = 8.0
            model.lm_head.weight[EOS] = 0.0
            model.lm_head.weight[EOS, 0] = -40 / config.hidden_size**0.5  # nats of the stop
    # A part of the vocabulary are stop tokens, so that lengths are geometric.
    stops = [EOS]
    if shape.mean_response and case.is_online:
        stops += range(FIRST_WORD, FIRST_WORD + round(config.vocab_size / shape.mean_response))
    model.generation_config = GenerationConfig(eos_token_id=stops, pad_token_id=PAD)
    model.to(torch.bfloat16 if case.is_bf16 else torch.float32).save_pretrained(folder)


def row(case: Case, source: random.Random) -> dict[str, str]:
    """Return a row: a prompt, and one or two responses if the algorithm reads them.

    Args:
        case: Case of the benchmark.
        source: Source of random numbers.
    """
    shape, vocabulary = case.shape, MODELS[case.model]["vocab_size"]
    stops = round(vocabulary / shape.mean_response) if shape.mean_response else 0

    def words(number: int) -> str:
        ids = [source.randrange(FIRST_WORD + stops, vocabulary) for _ in range(number)]
        return " ".join(f"w{i}" for i in ids)

    def response() -> str:
        length = shape.response - 1  # without the stop token
        if shape.mean_response:
            length = min(length, 1 + int(source.expovariate(1 / (shape.mean_response - 1))))
        return " " + words(length)

    prompt = words(
        source.randint(shape.prompt // 4, shape.prompt) if shape.mean_response else shape.prompt
    )
    if case.is_online:
        return {"prompt": prompt}
    if case.algorithm == "sft":
        return {"prompt": prompt, "completion": response()}
    return {"prompt": prompt, "chosen": response(), "rejected": response()}
