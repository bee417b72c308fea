"""`lit-align plan`: output, exit status and messages."""

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
    "an unknown number of GPUs": (
        ("--trainer.strategy", "fsdp2"),
        r"--trainer.devices auto would count the GPUs of this machine\. Set it to the number",
    ),
    "GPUs without a strategy": (
        ("--trainer.devices", "2"),
        r"2 devices need a distributed strategy, found auto\. Set --trainer.strategy",
    ),
    "longer prompts than the data section allows": (
        ("--prompt_tokens", "64"),
        r"--prompt_tokens 64 is more than the 32 tokens that the data section allows",
    ),
    "an invalid size": (("--gpu_memory", "large"), r"invalid size large\. Set for example 80GB"),
    "an unknown argument": (("--model.kl_cof", "1"), r"Did you mean 'kl_coef'\?"),
}


def exit_status(*words: str) -> int:
    """Return the exit status of a plan; the parser exits by itself."""
    try:
        return main([*LINE, *words])
    except SystemExit as end:
        return int(end.code or 0)


@pytest.mark.parametrize("case", WRONG)
def test_wrong_input_has_status_2_and_a_message(case, capfd):
    words, sentence = WRONG[case]
    assert exit_status(*words) == 2
    assert re.search(sentence, capfd.readouterr().err)


def test_a_run_that_fits_has_status_0(capsys):
    assert exit_status("--gpu_memory", "1GB", "--json", "--data.batch_size", "4") == 0
    found = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert found["fits"]
    assert found["changes"] == []
    assert set(found["phases"]) == {"load", "rollout", "score", "prepare", "update"}


@pytest.mark.long
def test_a_run_that_does_not_fit_has_status_1_and_suggestions(capsys):
    given = ("--gpu_memory", "30MB", "--json", "--config", "lora", "--data.batch_size", "32")
    assert exit_status(*given) == 1
    found = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert not found["fits"]
    changes = {change["words"]: change for change in found["changes"]}
    fewer = changes["--model.microbatch_tokens 2048"]
    assert fewer["fits"]
    assert fewer["peak"] < found["peak"]
    assert changes["--config galore"]["message"].startswith("refused: --model.optimizer: GaLore")
    assert "--config lora" not in changes
    # a single change fits, so no combinations are planned
    assert all(" --" not in line or "fsdp2" in line for line in changes)


def plan_of_size(size: int) -> MemoryPlan:
    """Return a plan of `size` bytes for a device of 10 bytes."""
    return MemoryPlan({"update": {MemoryLocation.DEVICE: EstimatedPeak(size, {}, "")}}, 10)


def test_suggestions_are_combined_if_no_single_one_fits():
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


def test_logs_and_warnings_are_enabled_again_after_a_plan(capsys):
    assert exit_status("--gpu_memory", "1GB", "--data.batch_size", "4") == 0
    assert logging.getLogger("lightning.pytorch").isEnabledFor(logging.INFO)
    with pytest.warns(UserWarning, match="again"):
        warnings.warn("again", UserWarning, stacklevel=1)


@pytest.mark.long
def test_ranks_that_are_forked_after_a_plan_save_their_own_shards(tmp_path):
    """torch caches results for equal meshes, in which the simulated rank is the first."""
    two_ranks = ("--trainer.devices", "2", "--trainer.strategy", "fsdp2")
    assert exit_status(*two_ranks, "--gpu_memory", "1GB") == 0
    folder = tmp_path / "run"
    succeed(fit_argv(folder, "sft", *FSDP2, *checkpoint_argv(2, 1)), tmp_path / "log", 2)
    assert (folder / "checkpoints" / "iteration_000008.ckpt").is_dir()
