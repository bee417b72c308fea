"""A user's mistake is a sentence, a user's bug has a traceback, an old name gets the new one."""

import importlib
import pkgutil
import subprocess
import sys

import pytest

import lit_align
from lit_align import renamed
from lit_align.cli.discovery import import_all
from lit_align.cli.main import main, user_message
from lit_align.cli.mistakes import SECTIONS, find_mistake
from lit_align.errors import UserError

TYPO = """
from lit_align import ReMax


class Mine(ReMax):
    def prepare(self, batch):
        batch.scores = batch.scores * batch.respones_mask.sum(-1)
        return super().prepare(batch)
"""
RUN = ("fit", "--config", "remax", "--config", "toy", "--trainer.limit_train_batches", "1")


def test_a_typo_in_a_users_prepare_shows_its_file_and_line(tmp_path):
    (tmp_path / "mine.py").write_text(TYPO)
    words = [*RUN, "--trainer.num_sanity_val_steps", "0", "--model", "mine.Mine"]
    program = "import sys; from lit_align.cli.main import main; sys.exit(main(sys.argv[1:]))"
    done = subprocess.run(
        [sys.executable, "-c", program, *words], capture_output=True, text=True, cwd=tmp_path
    )
    assert done.returncode == 1
    assert 'mine.py", line 7, in prepare' in done.stderr
    assert "'respones_mask' is not" in done.stderr


def test_a_value_error_of_a_users_own_code_keeps_its_traceback(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    source = TYPO.replace("batch.scores = batch.scores * batch.respones_mask.sum(-1)",
                          "raise ValueError('my own check')")  # fmt: skip
    (tmp_path / "own_check.py").write_text(source)
    with pytest.raises(ValueError, match="my own check") as error:
        main([*RUN, "--trainer.num_sanity_val_steps", "0", "--model", "own_check.Mine"])
    assert not isinstance(error.value, UserError)


@pytest.mark.parametrize("key", ["--model", "--reward.functions"])
def test_an_import_error_inside_a_users_module_keeps_its_traceback(key, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "half_done.py").write_text("import not_installed\n")
    with pytest.raises(ModuleNotFoundError, match="not_installed") as error:
        main([*RUN, key, "half_done.Mine"])
    assert any(str(entry.path).endswith("half_done.py") for entry in error.traceback)


@pytest.mark.parametrize("key", ["--model", "--reward.functions", "--trainer.strategy"])
def test_a_module_that_is_not_there_is_a_sentence(key, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    assert main([*RUN, key, "nowhere.at_all.Mine"]) == 2
    assert f"{key} nowhere.at_all.Mine: No module named 'nowhere.at_all'" in capsys.readouterr().err


def test_a_wrong_key_of_a_config_is_a_sentence(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "mine.yaml").write_text("model: {class_path: ReMax, init_args: {kl_cof: 0.1}}")
    assert main(["fit", "--config", "remax", "--config", "mine.yaml"]) == 2
    line = "lit-align: --model.kl_cof: ReMax has no setting 'kl_cof'. Did you mean 'kl_coef'?\n"
    assert capsys.readouterr().err.endswith(line)


def test_a_wrong_key_is_named_after_a_correct_list_with_init_args(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    callbacks = "[{class_path: Checkpoints, init_args: {keep_last: 3}}]"
    assert main([*RUN, "--trainer.callbacks", callbacks, "--trainer.acelerator", "cpu"]) == 2
    assert "--trainer.acelerator: Trainer has no setting" in capsys.readouterr().err


def test_the_message_of_a_user_error_is_printed_and_of_others_not():
    assert user_message(UserError("Set x.")) == "Set x."
    assert user_message(ValueError("any")) is None
    assert user_message(KeyError("any")) is None


# Names of version 0.1 -----------------------------------------------------------------------------

OLD_CALLBACK = "[{class_path: Checkpoints, init_args: {keep: 3}}]"
ANSWERS = {  # words after RUN: the sentence
    ("--model.warmup", "0.1"): "warmup was renamed to warmup_ratio. Use --model.warmup_ratio.",
    ("--model.policy.lora", "LoRA", "--model.policy.lora.rank", "8"): (
        "rank was renamed to r. Use --model.policy.lora.r."
    ),
    ("--reward.sources", "Length"): "sources was renamed to functions. Use --reward.functions.",
    ("--trainer.callbacks+=ResponseLog", "--trainer.callbacks.every=3"): (
        "every was renamed to every_n_rollouts. Use --trainer.callbacks.every_n_rollouts."
    ),
    ("--trainer.callbacks", OLD_CALLBACK): (
        "keep was renamed to keep_last. Use keep_last in --trainer.callbacks[0]."
    ),
    ("--config", "fsdp", "--trainer.strategy.sum_once", "true"): (
        "sum_once was replaced. Use --trainer.strategy.sync_every_microbatch false (was true) or "
        "true (was false)."
    ),
    ("--trainer.strategy", "lit_align.models.fsdp2.FSDP2"): (
        "--trainer.strategy: lit_align.models.fsdp2.FSDP2 was renamed to "
        "lit_align.models.parallel.fsdp2.FSDP2."
    ),
    ("--reward.functions", "PythonReward"): (
        "--reward.functions: PythonReward was renamed to FunctionReward. Use FunctionReward."
    ),
    ("--data", "AnsweredPrompts"): (
        "--data: AnsweredPrompts was renamed to OfflineResponseData. Use OfflineResponseData."
    ),
}


@pytest.mark.parametrize("words", ANSWERS, ids=" ".join)
def test_an_old_name_on_the_command_line_gets_the_new_one(words, capsys):
    assert main([*RUN, *words]) == 2
    assert f"lit-align: {ANSWERS[words]}" in capsys.readouterr().err


@pytest.mark.parametrize(("command", "flag"), renamed.FLAGS)
def test_an_old_flag_of_a_command_gets_the_new_one(command, flag, capsys):
    assert main([command, flag, "x"]) == 2
    new = renamed.FLAGS[command, flag]
    assert capsys.readouterr().err == f"lit-align: {flag} was renamed to {new}. Use {new}.\n"
    with pytest.raises(SystemExit, match="0"):
        raise SystemExit(main([command, "--help"]))
    assert new in capsys.readouterr().out


@pytest.mark.parametrize(("command", "flag"), renamed.REMOVED_FLAGS)
def test_a_removed_flag_of_a_command_gets_a_replacement(command, flag, capsys):
    assert main([command, flag]) == 2
    assert f"lit-align: `{command} {flag}` was removed. Run " in capsys.readouterr().err


@pytest.mark.parametrize("name", renamed.CONFIGS)
def test_an_old_packaged_config_gets_the_new_one(name, capsys):
    new = renamed.CONFIGS[name]
    assert main(["fit", "--config", name]) == 2
    assert f"config {name} was renamed to {new}. Use --config {new}." in capsys.readouterr().err


PLACES = {  # words that name a class, the flag of its settings: old keys of this class
    (("--model", "PPO"), "--model"): (
        "warmup final_lr epochs park lam whiten value_clip normalise_scores critic_warmup "
        "per_response"
    ),
    (("--model", "GRPOVI"), "--model"): "low high scale weights",
    (("--model", "SPR"), "--model"): "step_coef num_stored stored_decay max_ratio",
    (("--model", "ReMax"), "--model"): "per_token",
    (("--model", "HydraSFT"), "--model"): "rm_coef",
    (("--model", "ReMax", "--model.policy", "Policy"), "--model.policy"): (
        "checkpointing attention fixed_cache quantisation"
    ),
    (
        ("--model", "PPO", "--model.critic", "ScalarHead", "--model.critic.lora", "LoRA"),
        "--model.critic.lora",
    ): "rank alpha targets train_fully",
    (("--data", "PromptData"), "--data"): "first_words drop columns",
    (("--data", "PromptData", "--data.path", "{path: toy}"), "--data.path"): "header",
    (("--rollout", "Rollout"), "--rollout"): "predict_greedily num_samples",
    (("--reward", "Reward"), "--reward"): "sources time_limit skip_failures",
    (("--trainer.callbacks", "Checkpoints"), "--trainer.callbacks"): "keep higher_is_better",
    (("--trainer.callbacks", "ResponseLog"), "--trainer.callbacks"): "every held_out",
    (("--trainer.callbacks", "Progress"), "--trainer.callbacks"): "lines",
    (
        ("--trainer.strategy", "lit_align.models.parallel.fsdp2.FSDP2"),
        "--trainer.strategy",
    ): "gather sum_once",
}
OLD_KEYS = [
    (words, f"{flag}.{key}") for (words, flag), keys in PLACES.items() for key in keys.split()
]


@pytest.mark.parametrize(("words", "flag"), OLD_KEYS, ids=[flag for _, flag in OLD_KEYS])
def test_an_old_key_gets_the_new_one(words, flag):
    import_all()
    key = flag.rpartition(".")[2]
    sentence = find_mistake([*words, flag, "1"], set(SECTIONS))
    assert sentence is not None
    assert sentence.startswith((f"{key} was renamed to ", f"{key} was replaced. Use --"))


def test_every_old_key_has_a_place_above():
    local = {key.rpartition(".")[2] for key in renamed.LOCAL_KEYS}
    known = {*renamed.KEYS, *renamed.CHOICES, *local}
    assert {flag.rpartition(".")[2] for _, flag in OLD_KEYS} == known


def test_an_old_key_in_another_class_gets_no_new_name():
    import_all()
    sentence = find_mistake(["--data", "PromptData", "--data.keep", "1"], set(SECTIONS))
    assert sentence.startswith("--data.keep: PromptData has no setting 'keep'.")


@pytest.mark.parametrize("module", sorted(set(renamed.MODULES.values())))
def test_a_new_module_exists(module):
    assert importlib.import_module(module).__name__ == module


def test_new_class_names_exist():
    found = set()
    for module in pkgutil.walk_packages(lit_align.__path__, "lit_align."):
        found |= set(vars(importlib.import_module(module.name)))
    assert set(renamed.CLASSES.values()) <= found


@pytest.mark.parametrize("name", renamed.LOG_KEYS)
def test_an_old_log_key_gets_the_new_one(name):
    new = renamed.LOG_KEYS[name]
    expected = f"{name} is no longer logged." if new is None else f"{name} was renamed to {new}."
    assert renamed.renamed_log_key(name) == expected
    assert renamed.renamed_log_key(new or "reward") is None
