"""A user's mistake is a sentence, a user's own bug keeps its traceback, an old name is answered."""

import subprocess
import sys

import pytest

from lit_align import renamed
from lit_align.cli.main import main, user_message
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


def test_a_wrong_key_of_a_config_is_a_sentence(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "mine.yaml").write_text("model: {class_path: ReMax, init_args: {kl_cof: 0.1}}")
    assert main(["fit", "--config", "remax", "--config", "mine.yaml"]) == 2
    line = "lit-align: --model.kl_cof: ReMax has no setting 'kl_cof'. Did you mean 'kl_coef'?\n"
    assert capsys.readouterr().err.endswith(line)


def test_the_message_of_a_user_error_is_printed_and_of_others_not():
    assert user_message(UserError("Set x.")) == "Set x."
    assert user_message(ValueError("any")) is None
    assert user_message(KeyError("any")) is None


@pytest.mark.parametrize(
    ("words", "answer"),
    [
        (
            ("--model.warmup", "0.1"),
            "warmup was renamed to warmup_ratio. Use --model.warmup_ratio.",
        ),
        (("--plan",), "`fit --plan` was removed. Run `lit-align plan` with the same arguments."),
        (
            ("--reward.functions", "PythonReward"),
            "--reward.functions: PythonReward was renamed to FunctionReward. Use FunctionReward.",
        ),
        (("--config", "dl_ppo"), "config dl_ppo was renamed to dynamic_lora_ppo."),
    ],
    ids=["key", "flag", "class", "config"],
)
def test_a_name_of_version_0_1_is_answered_by_the_new_one(words, answer, capsys):
    assert main([*RUN, *words]) == 2
    assert answer in capsys.readouterr().err


@pytest.mark.parametrize("key", sorted({*renamed.KEYS.values()}))
def test_the_table_of_old_names_leads_to_settings_that_exist(key):
    from lit_align.cli.discovery import concrete_subclasses, import_all, init_arguments

    import_all()
    known = {name for cls in concrete_subclasses(object) if cls.__module__.startswith("lit_align.")
             for name in init_arguments(cls)}  # fmt: skip
    assert key in known
