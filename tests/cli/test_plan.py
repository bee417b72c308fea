"""`lit-align plan`: what it prints, its status, and what it refuses in a sentence."""

import json
import logging
import re
import warnings

import pytest
from run_cli import FSDP2, checkpoint_argv, fit_argv, succeed

from lit_align.cli.main import main
from lit_align.plan.memory_tracker import EstimatedPeak, MemoryLocation
from lit_align.plan.suggestions import try_suggestions
from lit_align.plan.table import MemoryPlan

LINE = ("plan", "--config", "remax", "--config", "toy")

WRONG = {
    "an unknown shape": (
        ("--model.policy.path", "shape:llama-3-8"),
        r"shape:llama-3-8: there is no such shape\. Did you mean 'llama-3-8b'\?",
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
        r"--prompt_tokens 64 is more than the 32 tokens that the data section allows",
    ),
    "a size that is none": (("--gpu_memory", "large"), r"large is no size; give a number and GB"),
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


def test_status_0_says_that_it_fits(capsys):
    assert status("--gpu_memory", "1GB", "--json", "--data.batch_size", "4") == 0
    found = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert found["fits"]
    assert found["changes"] == []
    assert set(found["phases"]) == {"load", "rollout", "score", "prepare", "update"}


@pytest.mark.long
def test_status_1_comes_with_small_changes_of_what_does_not_fit(capsys):
    given = ("--gpu_memory", "30MB", "--json", "--config", "lora", "--data.batch_size", "32")
    assert status(*given) == 1
    found = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert not found["fits"]
    changes = {change["words"]: change for change in found["changes"]}
    fewer = changes["--model.microbatch_tokens 2048"]
    assert fewer["fits"]
    assert fewer["peak"] < found["peak"]
    assert changes["--config galore"]["told"].startswith("refused: GaLore would project none")
    assert "--config lora" not in changes
    assert all(" --" not in line or "fsdp2" in line for line in changes)  # one each is enough


def plan_of_size(size: int) -> MemoryPlan:
    """A plan of so many bytes, of which 10 fit."""
    return MemoryPlan({"update": {MemoryLocation.DEVICE: EstimatedPeak(size, {}, "")}}, 10)


def test_changes_are_put_together_where_none_is_enough():
    saved = {"--a": 3, "--b": 4, "--c": 5}
    words = [(name,) for name in saved]
    tried = list(
        try_suggestions(words, lambda added: plan_of_size(20 - sum(saved[word] for word in added)))
    )
    assert [(suggestion.argv, suggestion.fits) for suggestion in tried] == [
        (("--a",), False),
        (("--b",), False),
        (("--c",), False),
        (("--a", "--b"), False),
        (("--a", "--b", "--c"), True),
    ]


def test_what_a_plan_silences_is_heard_again(capsys):
    assert status("--gpu_memory", "1GB", "--data.batch_size", "4") == 0
    assert logging.getLogger("lightning.pytorch").isEnabledFor(logging.INFO)
    with pytest.warns(UserWarning, match="heard"):
        warnings.warn("heard", UserWarning, stacklevel=1)


@pytest.mark.long
def test_ranks_that_are_forked_after_a_plan_save_shares_of_their_own(tmp_path):
    """torch keeps answers about equal meshes, in which the planned rank is the first."""
    assert (
        status("--trainer.devices", "2", "--trainer.strategy", "fsdp2", "--gpu_memory", "1GB") == 0
    )
    folder = tmp_path / "run"
    succeed(fit_argv(folder, "sft", *FSDP2, *checkpoint_argv(2, 1)), tmp_path / "log", 2)
    assert (folder / "checkpoints" / "iteration_000008.ckpt").is_dir()
