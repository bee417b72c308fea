"""`lit-align plan`: what it prints, its status, and what it refuses in a sentence."""

import json
import re

import pytest

from lit_align.cli.main import main

LINE = ("plan", "--config", "remax", "--config", "toy")

WRONG = {
    "an unknown shape": (
        ("--model.policy.path", "shape:llama-3-8"),
        r"shape:llama-3-8: there is no such shape; did you mean 'llama-3-8b'\?",
    ),
    "a hub id": (
        ("--model.policy.path", "nobody/nothing"),
        r"nobody/nothing is not on this machine, and plan reads nothing from the network",
    ),
    "GPUs that cannot be counted": (
        ("--trainer.strategy", "fsdp2"),
        r"--trainer.devices auto counts the GPUs of this machine",
    ),
    "GPUs without a strategy": (("--trainer.devices", "2"), r"2 devices need a strategy"),
    "longer prompts than the data allow": (
        ("--prompt_tokens", "64"),
        r"--prompt_tokens 64 is more than the 32 that the data allow",
    ),
    "a size that is none": (("--gpu", "large"), r"large is no size; give a number and GB"),
    "an argument that is none": (("--model.kl_cof", "1"), r"Did you mean 'kl_coef'\?"),
}


def status(*words: str) -> int:
    try:
        return main([*LINE, *words])
    except SystemExit as left:
        return int(left.code or 0)


@pytest.mark.parametrize("case", WRONG)
def test_bad_input_ends_with_status_2_and_a_sentence(case, capfd):
    words, sentence = WRONG[case]
    assert status(*words) == 2
    assert re.search(sentence, capfd.readouterr().err)


@pytest.mark.parametrize(("memory", "expected"), [("1GB", 0), ("1MB", 1)])
def test_the_status_says_whether_it_fits(memory, expected, capsys):
    assert status("--gpu", memory, "--json", "--data.batch_size", "4") == expected
    found = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert found["fits"] == (expected == 0)
    assert set(found["phases"]) == {"load", "rollout", "score", "prepare", "update"}
