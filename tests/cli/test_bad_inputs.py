"""Mistakes of a user: a message of one to three lines with the key and what to set, status 2."""

import json
import re

import pytest

from lit_align.cli.main import main
from lit_align.data.text import load_tokenizer
from lit_align.models.policy import Policy
from lit_align.models.scalar_head import ScalarHead

ONLINE = ("fit", "--config", "remax", "--config", "toy")
OFFLINE = ("fit", "--config", "sft", "--config", "toy")
PAIRED = ("fit", "--config", "dpo", "--config", "toy")
OTHER = ("--model.reference", "Policy")
PPO = ("fit", "--config", "ppo", "--config", "toy")
RTO = ("fit", "--config", "rto", "--config", "toy")
SMALL = "{model_type: llama, vocab_size: 200, num_hidden_layers: 1, hidden_size: 64}"
OFFLINE_RESPONSES = ("fit", "--config", "spr", "--config", "toy")

CASES = {
    "a config that is not there": (
        ("fit", "--config", "remaxx"),
        r"config remaxx: no such file and no packaged config. Did you mean 'remax'\?",
    ),
    "a command that is not there": (("fot",), r"'fot' is not a command. Did you mean 'fit'\?"),
    "nothing to do": (("fit",), r"There is no model section. Use --config NAME"),
    "an unknown section": (
        (*ONLINE, "--rolout.top_p", "1"),
        r"--rolout: This command has no setting 'rolout'. Did you mean 'rollout'\?",
    ),
    "an unknown trainer flag": (
        (*ONLINE, "--trainer.accelerater", "cpu"),
        r"--trainer.accelerater: Trainer has no setting .* Did you mean 'accelerator'\?",
    ),
    "an unknown argument of the algorithm": (
        (*ONLINE, "--model.kl_cof", "0.1"),
        r"--model.kl_cof: ReMax has no setting 'kl_cof'. Did you mean 'kl_coef'\?",
    ),
    "an unknown argument of the policy": (
        (*ONLINE, "--model.policy.pth", "x"),
        r"--model.policy.pth: Policy has no setting 'pth'. Did you mean 'path'\?",
    ),
    "an unknown argument of the optimizer": (
        (*ONLINE, "--model.optimizer.lrr", "1"),
        r"--model.optimizer.lrr: AdamW has no setting 'lrr'. Did you mean 'lr'\?",
    ),
    "a setting that the optimizer refuses": (
        (*ONLINE, "--model.optimizer.lr", "-1"),
        r"--model.optimizer: Invalid learning rate: -1.0",
    ),
    "an unknown argument of the data": (
        (*OFFLINE, "--data.btch_size", "3"),
        r"--data.btch_size: InstructionData has no setting .* Did you mean 'batch_size'\?",
    ),
    "a wrong type": (
        (*ONLINE, "--model.kl_coef", "abc"),
        r"--model.kl_coef must be a number, found 'abc'",
    ),
    "a wrong word for the trainer": (
        (*ONLINE, "--trainer.precision", "abc"),
        r"--trainer.precision must be .*one of .*bf16-mixed.*, found 'abc'",
    ),
    "an empty batch": ((*ONLINE, "--data.batch_size", "0"), r"batch_size must be at least 1"),
    "no sample": ((*ONLINE, "--model.num_samples", "0"), r"num_samples must be at least 1, found"),
    "an unknown algorithm": (
        (*ONLINE, "--model", "ReMaxx"),
        r"--model ReMaxx: there is no such class. Did you mean 'ReMax'\?",
    ),
    "a user's module that is not there": (
        (*ONLINE, "--model", "my_module.Mine"),
        r"--model my_module.Mine: No module named 'my_module'",
    ),
    "an unknown reward": (
        (*ONLINE, "--reward.functions", "Lxicon"),
        r"--reward.functions Lxicon: there is no such class. Did you mean 'Lexicon'\?",
    ),
    "Lightning's own clipping": (
        (*ONLINE, "--trainer.gradient_clip_val", "1.0"),
        r"--trainer.gradient_clip_val is not supported. Set --model.max_grad_norm",
    ),
    "Lightning's own accumulation": (
        (*ONLINE, "--trainer.accumulate_grad_batches", "2"),
        r"Set --data.batch_size .* and --model.microbatch_tokens",
    ),
    "a rollout without tokens": (
        (*ONLINE, "--rollout.max_new_tokens", "0"),
        r"Rollout needs max_new_tokens >= 1",
    ),
    "several epochs of ReMax": (
        (*ONLINE, "--model.update_epochs", "2"),
        r"ReMax takes one optimizer step per rollout, since it has no importance ratio",
    ),
    "a lexicon that is not there": (
        (*ONLINE, "--reward.functions", "Lexicon", "--reward.functions.path", "nowhere.txt"),
        r"nowhere.txt: no such lexicon file",
    ),
    "data that are not there": (
        (*ONLINE, "--data.path", "nowhere.jsonl"),
        r"there is no file or folder 'nowhere.jsonl'",
    ),
    "a tokenizer that is not there": (
        (*ONLINE, "--data.tokenizer", "./nowhere"),
        r"there is no tokenizer folder './nowhere'",
    ),
    "a model that is not there": (
        (*ONLINE, "--model.policy.path", "./nowhere"),
        r"\./nowhere: no such folder\. Use a hub id or a folder",
    ),
    "a rollout section for an offline algorithm": (
        (*OFFLINE, "--rollout.max_new_tokens", "5"),
        r"SFT does not generate responses\. Remove `rollout`",
    ),
    "no reward section for an online algorithm": (
        (*ONLINE, "--reward", "null"),
        r"ReMax is trained on scores. Add a `reward` section",
    ),
    "no rollout section for an online algorithm": (
        (*ONLINE, "--rollout", "null"),
        r"ReMax is trained on its own responses. Add a `rollout` section",
    ),
    "a vocabulary that is smaller than the tokenizer's": (
        (*ONLINE, "--model.policy.config.vocab_size", "100"),
        r"The tokenizer has 138 token ids and the policy llama from random weights has 100",
    ),
    "a group of one sample": (
        (*OFFLINE_RESPONSES, "--model.num_offline_samples", "0", "--model.num_samples", "1"),
        r"num_samples must be at least 2 for SPR, .* found 1",
    ),
    "no KL coefficient for SPR": (
        (*OFFLINE_RESPONSES, "--model.kl_coef", "0", "--model.step_kl_coef", "0"),
        r"SPR divides scores by kl_coef \+ step_kl_coef: .* found 0.0 and 0.0",
    ),
    "a limit of importance ratios below 1": (
        (*OFFLINE_RESPONSES, "--model.max_importance_ratio", "0"),
        r"max_importance_ratio must be at least 1, found 0",
    ),
    "offline responses of data that have none": (
        (*OFFLINE_RESPONSES, "--data", "PromptData"),
        r"num_offline_samples needs offline responses .* Use --data OfflineResponseData",
    ),
    "a beta of 0": (
        (*PAIRED, "--model.beta", "0"),
        r"beta must be above 0, found 0.0",
    ),
    "label smoothing that is too large": (
        (*PAIRED, "--model.label_smoothing", "0.5"),
        r"label_smoothing must be at least 0 and below 0.5, found 0.5",
    ),
    "a reference with another vocabulary": (
        (
            *PAIRED,
            *OTHER,
            "--model.reference.config",
            "{model_type: gpt2, vocab_size: 200, n_embd: 12}",
        ),
        r"The reference .* has 200 tokens .* the policy .* has 192. Set --model.reference",
    ),
    "precomputed log-probs of another reference": (
        (*PAIRED, *OTHER, "--model.reference.path", "./nowhere", "--model.precompute", "true"),
        r"precompute uses the policy at the start .* Remove --model.reference",
    ),
    "one sample per prompt for GRPO": (
        ("fit", "--config", "grpo", "--config", "toy", "--model.num_samples", "1"),
        r"num_samples must be at least 2 for GRPO, .* found 1",
    ),
    "one sample per prompt for RLOO": (
        ("fit", "--config", "rloo", "--config", "toy", "--model.num_samples", "1"),
        r"num_samples must be at least 2 for RLOO, .* found 1",
    ),
    "a minibatch size that does not divide the rollout": (
        (*PPO, "--model.minibatch_size", "48"),
        r"minibatch_size 48 does not divide the 64 rows of a rollout",
    ),
    "equal bounds of scores": (
        (
            "fit",
            "--config",
            "grpovi",
            "--config",
            "toy",
            "--model.min_score",
            "1",
            "--model.max_score",
            "1",
        ),
        r"min_score must be below max_score, found 1.0 and 1.0",
    ),
    "a critic with another vocabulary": (
        (*PPO, "--model.critic.config", SMALL),
        r"The critic .* has 200 tokens .* the policy .* has 192. Set --model.critic",
    ),
    "a DPO model with another vocabulary": (
        (*RTO, "--model.dpo.config", SMALL),
        r"The dpo .* has 200 tokens .* the policy .* has 192. Set --model.dpo",
    ),
    "two DPO models": (
        (*RTO, "--model.dpo_adapter", "somewhere"),
        r"RTO needs exactly one DPO model, found two. Set --model.dpo",
    ),
    "a DPO adapter that is not there": (
        (*RTO, "--model.dpo", "null", "--model.dpo_adapter", "somewhere"),
        r"somewhere: no adapter_config.json\. Use the folder of a saved adapter",
    ),
    "a shared reward model without a frozen base": (
        (*PPO, "--reward.functions", "SharedBackboneReward"),
        r"SharedBackboneReward needs a frozen .* trains without an adapter. Set --model.critic",
    ),
    "a shared reward model for an algorithm without a critic": (
        (*ONLINE, "--reward.functions", "SharedBackboneReward"),
        r"SharedBackboneReward needs PPO with an adapted critic, or HydraPPO, found ReMax",
    ),
    "a KL target of 0": (
        (*PPO, "--model.kl_target", "0"),
        r"kl_target must be above 0 nats per response, found 0",
    ),
    "a score clip of 0": (
        (*PPO, "--model.score_clip", "0"),
        r"score_clip must be above 0, found 0.0. Set --model.score_clip",
    ),
    "a checkpoint that is not there": (
        (*OFFLINE, "--ckpt_path", "nowhere.ckpt"),
        r"--ckpt_path nowhere.ckpt: no such checkpoint",
    ),
    "an unknown data type": (
        (*ONLINE, "--model.policy.dtype", "flaot32"),
        r"Unknown dtype flaot32\. Use float32, bfloat16 or float16",
    ),
    "a config to copy that is not there": (
        ("configs", "copy", "remaxx"),
        r"config remaxx: no such file and no packaged config. Did you mean 'remax'\?",
    ),
}

FAST = ("--trainer.limit_train_batches", "1", "--trainer.limit_val_batches", "0")
OWN = (*ONLINE, *FAST, "--data.batch_size", "4", "--data.eval_split", "null", "--data.path")
SCORED = (*OWN, "good.jsonl", "--reward.functions", "FunctionReward", "--reward.functions.function")
FILES = {  # files in the working folder of the cases below
    "empty.jsonl": "",
    "columns.jsonl": '{"question": "a film", "text2": "y"}',
    "blank.jsonl": '{"prompt": "a film"}\n{"prompt": "  "}',
    "long.jsonl": json.dumps({"prompt": "film " * 100}),
    "talk.jsonl": '{"prompt": [{"role": "user", "content": "film"}]}',
    "no_role.jsonl": '{"prompt": [{"content": "film"}]}',
    "half.jsonl": '{"prompt": "a film"}\n{"prompt": "a',
    "list.jsonl": "[1, 2]",
    "latin.jsonl": b'{"prompt": "a film"}\n{"prompt": "\xe9t\xe9"}',
    "ragged.csv": "prompt,answer\na,b\nc,d,e\n",
    "answers.pkl": "",
    "folder/readme": "",
    "adapter/adapter_model.safetensors": "",
    "pickled/config.json": '{"model_type": "llama", "vocab_size": 192}',
    "pickled/pytorch_model.bin": "",
    "pickled_adapter/adapter_config.json": '{"peft_type": "LORA", "base_model_name_or_path": "a"}',
    "pickled_adapter/adapter_model.bin": "",
    "one_answer.jsonl": '{"prompt": "a film", "chosen": "b"}',
    "good.jsonl": "\n".join(json.dumps({"prompt": f"a film {i}"}) for i in range(8)),
    "mine.py": "def short(completions): return [0.0]\n"
    "def silent(completions): return [None] * len(completions)\n"
    "def nan(completions): return [float('nan')] * len(completions)\n"
    "def words(completions): return 'good'\n"
    "def broken(completions): return [1 / 0]\n"
    "def needs(completions, answer): return [0.0] * len(completions)\n"
    "number = 3\n",
    "typo.py": "def f(:\n",
}
CASES |= {
    "an empty data set": ((*OWN, "empty.jsonl"), r"'empty.jsonl' has no rows"),
    "wrong columns": (
        (*OWN, "columns.jsonl"),
        r"row 0 of 'columns.jsonl': .* columns question, text2 and needs prompt, messages",
    ),
    "an empty prompt": (
        (*OWN, "blank.jsonl"),
        r"row 1 of 'blank.jsonl': the prompt is empty",
    ),
    "only prompts that are longer than the limit": (
        (*OWN, "long.jsonl"),
        r"no row of 'long.jsonl' is left: dropped 1 prompts of more than max_prompt_tokens 32",
    ),
    "a conversation for a tokenizer without a chat template": (
        (*OWN, "talk.jsonl"),
        r"row 0 of 'talk.jsonl': .* no chat template. Set --data.chat_template",
    ),
    "a chat template that is not there": (
        (*OWN, "talk.jsonl", "--data.chat_template", "nowhere.jinja"),
        r"chat_template 'nowhere.jinja' is neither jinja text nor a file",
    ),
    "a chat template that raises": (
        (*OWN, "talk.jsonl", "--data.chat_template", "{{ raise_exception('no film') }}"),
        r"the chat template refuses the messages: no film",
    ),
    "a message without a role": (
        (*OWN, "no_role.jsonl"),
        r"row 0 of 'no_role.jsonl': a message needs role and content",
    ),
    "an incomplete line of JSON": (
        (*OWN, "half.jsonl"),
        r"line 2 of 'half.jsonl' is not valid JSON",
    ),
    "a line that is not an object": (
        (*OWN, "list.jsonl"),
        r"line 1 of 'list.jsonl' is not a JSON object",
    ),
    "a file in another encoding": ((*OWN, "latin.jsonl"), r"line 2 of 'latin.jsonl' is not UTF-8"),
    "a table with a row that is too long": (
        (*OWN, "ragged.csv"),
        r"line 3 of 'ragged.csv' does not have the 2 columns prompt, answer",
    ),
    "a file of pickles": (
        (*OWN, "answers.pkl"),
        r"'answers.pkl' has none of the suffixes .csv, .json",
    ),
    "a folder without data": ((*OWN, "folder"), r"'folder' has no file with a suffix .csv, .json"),
    "a split of a single file": (
        (*OWN, "good.jsonl", "--data.split", "test"),
        r"'good.jsonl' is one file and has no split 'test'. Use --data.eval_path",
    ),
    "a column to rename that is not there": (
        (*OWN, "good.jsonl", "--data.rename_columns", "{question: prompt}"),
        r"row 0 of 'good.jsonl': there is no column 'question' to rename, found prompt",
    ),
    "a batch larger than the data": (
        (*OWN, "good.jsonl", "--data.batch_size", "100"),
        r"8 rows do not fill one batch of 100 rows .* Lower --data.batch_size",
    ),
    "a pair without its rejected response": (
        (*PAIRED, *FAST, "--data.path", "one_answer.jsonl", "--data.eval_split", "null"),
        r"row 0 of 'one_answer.jsonl': the row has the columns prompt, chosen and needs chosen and",
    ),
    "an eos that is not a token": (
        (*OWN, "good.jsonl", "--data.eos_token", "<end>"),
        r"the tokenizer of 'toy' has no token '<end>'. Set --data.eos_token",
    ),
    "a reward of the wrong length": (
        (*SCORED, "mine.py:short"),
        r"reward 'short' returned 1 scores instead of 8",
    ),
    "a reward that never applies": (
        (*SCORED, "mine.py:silent"),
        r"no reward function applies to this row",
    ),
    "a reward that is NaN": ((*SCORED, "mine.py:nan"), r"reward 'nan' returned nan"),
    "a reward function that returns a text": (
        (*SCORED, "mine.py:words"),
        r"reward 'words' returned str instead of a list of numbers",
    ),
    "a reward function that raises": (
        (*SCORED, "mine.py:broken"),
        r"reward 'broken' raised ZeroDivisionError: division by zero \(.*mine.py:5\)",
    ),
    "a reward function with an argument that is not a column": (
        (*SCORED, "mine.py:needs"),
        r"reward 'needs' needs the argument 'answer', but there are only: prompts, completions",
    ),
    "a reward function that is not in its file": (
        (*SCORED, "mine.py:f"),
        r"reward function 'mine.py:f': mine.py has no 'f'",
    ),
    "a reward function that is a number": (
        (*SCORED, "mine.py:number"),
        r"reward function 'mine.py:number': 'number' is a int, not a function",
    ),
    "a reward function in a file with a syntax error": (
        (*SCORED, "typo.py:f"),
        r"reward function 'typo.py:f': cannot import typo.py: SyntaxError",
    ),
    "a device that is not there": (
        (*ONLINE, "--trainer.accelerator", "tpu"),
        r"Requirement 'torch_xla>=.*' not met",
    ),
    "an accelerator of another machine": (
        (*ONLINE, "--trainer.accelerator", "mps"),
        r"accelerator is not available.* --trainer.accelerator auto and --trainer.devices auto",
    ),
    "a loss that is not finite": (
        (*ONLINE, *FAST, "--data.batch_size", "1", "--model.kl_coef", ".nan"),
        r"The loss is not finite: rows 0 \('review of .* iteration 1, .*checkpoint: none",
    ),
    "an adapter's folder without its configuration": (
        (*ONLINE, "--model.policy.path", "./adapter"),
        r"\./adapter could not be loaded: ",
    ),
    "a model of pickles": (
        (*ONLINE, "--model.policy.path", "./pickled"),
        r"\./pickled could not be loaded: .*safetensors",
    ),
    "an adapter of pickles": (
        (*ONLINE, "--model.policy.path", "./pickled_adapter"),
        r"pickled_adapter: no adapter_model\.safetensors",
    ),
    "a judge that is not there": (
        (
            "evaluate",
            "folder",
            "--config",
            "remax",
            "--config",
            "toy",
            "--judge",
            "x",
            "--reward",
            "null",
        ),
        r"folder: no config.json and no adapter_config.json",
    ),
    "an unknown accelerator": (
        (*ONLINE, "--trainer.accelerator", "gpuu"),
        r"invalid accelerator name: `accelerator='gpuu'`. Available names are: auto",
    ),
    "devices that are not a number": (
        (*ONLINE, "--trainer.devices", "two"),
        r"`devices` selected with `CPUAccelerator` should be an int > 0",
    ),
    "zero devices": (
        (*ONLINE, "--trainer.devices", "0"),
        r"`Trainer\(devices='?0'?\)` value is not",
    ),
    "an unknown strategy": (
        (*ONLINE, "--trainer.strategy", "dpp"),
        r"invalid strategy name: `strategy='dpp'`",
    ),
    "an unknown architecture": (
        (*ONLINE, "--model.policy.config.model_type", "lama"),
        r"Unrecognized model identifier: lama",
    ),
    "an impossible architecture": (
        (*ONLINE, "--model.policy.config.hidden_size", "65"),
        r"hidden size \(65\) is not a multiple of the number of attention heads",
    ),
    "a folder without a model": (
        (*ONLINE, "--model.policy.path", "./folder"),
        r"\./folder could not be loaded: ",
    ),
    "a run folder that is a file": (
        (*OFFLINE, *FAST, "--trainer.default_root_dir", "good.jsonl"),
        r"good.jsonl: File exists. Set --trainer.default_root_dir to a folder that can be",
    ),
    "a run folder below a file": (
        (*OFFLINE, *FAST, "--trainer.default_root_dir", "good.jsonl/run"),
        r"good.jsonl/run: Not a directory. Set --trainer.default_root_dir to",
    ),
    "a run folder that is not there": (("report", "nowhere"), r"nowhere: no such run folder"),
    "a report of a folder that is not a run": (
        ("report", "folder"),
        r"folder: no metrics.csv, .*Found: readme",
    ),
    "a report without a run": (("report",), r"required: RUN"),
    "a comparison without a reward": (
        ("evaluate", "folder", "--data.path", "good.jsonl"),
        r"evaluate compares models by rewards. Set --reward.functions",
    ),
    "a comparison of a folder without a model": (
        ("evaluate", "folder", "--config", "remax", "--config", "toy"),
        r"folder: no config.json and no adapter_config.json",
    ),
    "a conversation with a folder without a model": (
        ("chat", "folder"),
        r"folder: no config.json and no adapter_config.json .* Found: readme",
    ),
}


@pytest.mark.parametrize("case", CASES)
def test_a_mistake_gets_a_message_and_status_2(case, tmp_path, monkeypatch, capfd):
    argv, expected = CASES[case]
    monkeypatch.chdir(tmp_path)
    for name, text in FILES.items():
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_bytes(text if isinstance(text, bytes) else text.encode())
    assert main(list(argv)) == 2
    messages = [line for line in capfd.readouterr().err.splitlines() if "lit-align:" in line]
    text = "\n".join(messages)
    assert re.search(expected, text), text
    assert len(messages) <= 3
    assert len(text) < 400
    assert not list(tmp_path.rglob("*.ckpt"))


@pytest.fixture
def critic_with_another_tokenizer(tmp_path) -> str:
    """Save a critic of the toy's size whose tokenizer has the ids of two words swapped."""
    config = {**dict.fromkeys(("hidden_size", "intermediate_size"), 64), "num_hidden_layers": 1}
    ScalarHead(config={"model_type": "llama", "vocab_size": 192, **config}).save(
        tmp_path / "critic"
    )
    tokenizer = load_tokenizer("toy")
    tokenizer.save_pretrained(tmp_path / "critic")
    file = tmp_path / "critic" / "tokenizer.json"
    text = json.loads(file.read_text())
    words = text["model"]["vocab"]
    first, second = [word for word in words if word.isalpha()][:2]
    words[first], words[second] = words[second], words[first]
    file.write_text(json.dumps(text))
    return str(tmp_path / "critic")


def test_a_critic_with_another_tokenizer_is_refused(
    critic_with_another_tokenizer, tmp_path, monkeypatch, capfd
):
    monkeypatch.chdir(tmp_path)
    assert main([*PPO, "--model.critic.path", critic_with_another_tokenizer]) == 2
    message = capfd.readouterr().err
    assert re.search(r"The critic .*critic has another tokenizer than the data \(2 tokens", message)


def test_a_hydra_without_a_reward_head_is_refused(tmp_path, monkeypatch, capfd):
    monkeypatch.chdir(tmp_path)
    config = {**dict.fromkeys(("hidden_size", "intermediate_size"), 64), "num_hidden_layers": 1}
    Policy(config={"model_type": "llama", "vocab_size": 192, **config}).save(tmp_path / "language")
    words = ["fit", "--config", "hydra_ppo", "--config", "toy", "--data.tokenizer", "toy"]
    assert main([*words, "--model.policy.path", str(tmp_path / "language")]) == 2
    assert re.search(r"lacks 1 weights, the first is 'score.weight'", capfd.readouterr().err)


def test_a_config_that_is_not_yaml_is_refused(tmp_path, capsys):
    (tmp_path / "x.yaml").write_text("model: {class_path: [")
    assert main(["fit", "--config", str(tmp_path / "x.yaml")]) == 2
    assert "is not YAML" in capsys.readouterr().err
