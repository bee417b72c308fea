"""Out of memory: the message names the phase and three settings that exist."""

import re

import pytest
import torch

from lit_align.algorithms.remax import ReMax
from lit_align.cli.main import main
from lit_align.models.policy import Policy
from lit_align.rewards.rules import Length

VALUES = {
    "--data.eval_batch_size": "4",
    "--data.batch_size": "4",
    "--model.num_samples": "2",
    "--rollout.max_new_tokens": "4",
    "--model.microbatch_tokens": "100",
    "--model.policy.activation_checkpointing": "true",
    "--model.policy.dtype": "bfloat16",
    "--reward.functions.tokens_per_pass": "100",
}


def run_out_of_memory(*args, **kwargs):
    raise torch.OutOfMemoryError("tried to allocate 20 GiB")


PLACES = {
    "load": (Policy, "load_or_init"),
    "rollout": (Policy, "generate"),
    "score": (Length, "__call__"),
    "prepare": (ReMax, "reference_logprobs"),
    "update": (ReMax, "losses"),
    "evaluate": (Policy, "generate"),  # of the sanity check before the first iteration
}


@pytest.mark.parametrize("phase", PLACES)
def test_the_message_names_the_phase_and_three_settings(phase, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(*PLACES[phase], run_out_of_memory)
    start = ["fit", "--config", "remax", "--config", "toy"]
    length = ["--reward.functions", "Length", "--reward.functions.target", "8"]
    end = ["--data.max_rows", "64", "--trainer.default_root_dir", str(tmp_path)]
    end += [] if phase == "evaluate" else ["--trainer.num_sanity_val_steps", "0"]
    assert main([*start, *length, *end]) == 2
    message = capsys.readouterr().err
    assert f"lit-align: Out of memory in phase {phase}: " in message
    assert "tried to allocate 20 GiB" in message
    named = re.findall(r"--config \w+|--[\w.]+\w|a smaller reward model", message)
    assert len(named) == 3, named
    reward_model = ["--reward.functions", "ModelReward", "--reward.functions.path", "x"]
    for name in named:  # the parser accepts each of them
        config = name.split() if name.startswith("--config") else []
        setting = [name, VALUES[name]] if name in VALUES else []
        assert config or setting or name == "a smaller reward model"
        with pytest.raises(SystemExit) as end:
            main([*start, *config, *reward_model, *setting, "--print_config"])
        assert end.value.code == 0
