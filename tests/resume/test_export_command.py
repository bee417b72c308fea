"""`lit-align export`: another process computes the same logits from the exported folder."""

import subprocess
import sys

import pytest
import torch
from run_cli import TWO_RANKS, checkpoint_argv, fit_argv, last, succeed
from tiny_models import adapted, tiny
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification

from lit_align.cli.main import main
from lit_align.models.adapters.lora import LoRA
from lit_align.models.merge_adapter import merge_adapter
from lit_align.models.policy import Policy

LM, SCORER = "AutoModelForCausalLM", "AutoModelForSequenceClassification"
NEW_PROCESS = """
import sys, torch, transformers
from peft import PeftModel
logits = []
for word in sys.argv[2:]:
    kind, folder, *base = word.split("|")
    assert len(transformers.AutoTokenizer.from_pretrained(folder)) > 100
    if base:
        base = transformers.AutoModelForCausalLM.from_pretrained(*base)
        model = PeftModel.from_pretrained(base, folder)
    else:
        model = getattr(transformers, kind).from_pretrained(folder)
    with torch.no_grad():
        logits.append(model.eval()(torch.arange(5, 17)[None]).logits)
assert "lit_align" not in sys.modules
torch.save(logits, sys.argv[1])
"""


def logits_in_new_process(folder, *models: tuple) -> list[torch.Tensor]:
    """Return the logits of twelve tokens of each model, from a process without lit_align.

    Args:
        folder: Working folder of the process.
        models: Class, folder and, for an adapter, the folder of its base.
    """
    words = ["|".join(map(str, model)) for model in models]
    subprocess.run([sys.executable, "-c", NEW_PROCESS, "logits", *words], check=True, cwd=folder)
    return torch.load(folder / "logits")


def export(folder, out, log, *more) -> str:
    return succeed(["export", "--ckpt_path", str(folder), "--out", str(out), *more], log)


@torch.no_grad()
def logits_of(folder, role: str, kind=AutoModelForCausalLM) -> torch.Tensor:
    """Return the same logits from the newest checkpoint itself."""
    from transformers import LlamaConfig

    from lit_align.cli.overlays import read_config

    config = read_config("toy")["model"]["init_args"]["policy"]["init_args"]["config"]
    model = kind.from_config(LlamaConfig(**config, num_labels=1)).eval()
    prefix = f"{role}.network."
    state = {k.removeprefix(prefix): v for k, v in last(folder)["state_dict"].items()}
    own = {k: v for k, v in state.items() if k in model.state_dict()}
    assert not model.load_state_dict(own, strict=False).missing_keys
    return model(torch.arange(5, 17)[None]).logits


def test_a_policy_is_exported_from_the_middle_of_a_run(tmp_path):
    run, log, template = tmp_path / "run", tmp_path / "log", "{{ messages[0]['content'] }}!"
    more = (f"--data.chat_template={template}", *checkpoint_argv(3, 9))
    succeed(fit_argv(run, "remax", *more, epochs=1), log)
    middle = run / "checkpoints" / "iteration_000003.ckpt"
    assert "wrote" in export(middle, tmp_path / "out", log)
    assert "trained by ReMax with" in (tmp_path / "out" / "README.md").read_text()
    export(run, tmp_path / "end", log)
    (found,) = logits_in_new_process(tmp_path, (LM, tmp_path / "out"))
    (run / "checkpoints" / "iteration_000004.ckpt").unlink()
    torch.testing.assert_close(found, logits_of(run, "policy"), rtol=0, atol=0)
    end = (tmp_path / "end" / "model.safetensors").read_bytes()
    assert end == (run / "hf" / "model.safetensors").read_bytes()
    assert end != (tmp_path / "out" / "model.safetensors").read_bytes()
    names = {path.name for path in (tmp_path / "out").iterdir()}
    assert {"config.json", "generation_config.json", "tokenizer.json"} <= names
    assert (tmp_path / "out" / "chat_template.jinja").read_text() == template


@pytest.mark.long
def test_policy_and_critic_are_exported_from_a_sharded_checkpoint(tmp_path):
    run, log, out = tmp_path / "run", tmp_path / "log", tmp_path / "out"
    succeed(fit_argv(run, "ppo", *TWO_RANKS, epochs=1), log, 2)
    assert (run / "checkpoints" / "iteration_000004.ckpt").is_dir()
    export(run, out, log)
    logits, scores = logits_in_new_process(tmp_path, (LM, out / "policy"), (SCORER, out / "critic"))
    torch.testing.assert_close(logits, logits_of(run, "policy"), rtol=0, atol=0)
    expected = logits_of(run, "critic", AutoModelForSequenceClassification)
    torch.testing.assert_close(scores, expected, rtol=0, atol=0)


@pytest.mark.long
def test_a_merged_adapter_has_the_logits_of_the_adapter(tmp_path):
    run, log, base = tmp_path / "run", tmp_path / "log", tmp_path / "base"
    succeed(fit_argv(base, "sft", epochs=1), log)
    lora = ("--config", "lora", f"--model.policy.path={base / 'hf'}", "--model.policy.lora.r=4")
    succeed(fit_argv(run, "remax", *lora, "--model.optimizer.lr=0.01", epochs=1), log)
    assert all(".lora_" in name for name in last(run)["state_dict"])
    export(run, tmp_path / "adapter", log)
    export(run, tmp_path / "merged", log, "--merge")
    assert not (tmp_path / "adapter" / "model.safetensors").exists()
    assert not list((tmp_path / "merged").glob("adapter_*"))
    adapter_on_base = ("PeftModel", tmp_path / "adapter", base / "hf")
    plain, adapter, merged = logits_in_new_process(
        tmp_path, (LM, base / "hf"), adapter_on_base, (LM, tmp_path / "merged")
    )
    assert float((adapter - plain).abs().max()) > 1e-2
    torch.testing.assert_close(merged, adapter, rtol=1e-5, atol=1e-5)


@pytest.mark.long
def test_two_adapters_become_two_models(tmp_path):
    run, log, out = tmp_path / "run", tmp_path / "log", tmp_path / "out"
    more = ("--rollout.max_new_tokens=4", "--model.optimizer.lr=0.01")
    succeed(fit_argv(run, "hydra_ppo", *more, epochs=1), log)
    export(run, out, log, "--merge")
    models = [(kind, out / role) for kind in (LM, SCORER) for role in ("actor", "critic")]
    actor, other, reward, scores = logits_in_new_process(tmp_path, *models)
    assert not torch.equal(actor, other)
    assert scores.shape == reward.shape == (1, 1)
    assert not torch.equal(scores, reward)


def test_other_frozen_weights_are_refused(tmp_path, capsys):
    run, log = tmp_path / "run", tmp_path / "log"
    lora = ("--config", "lora", "--model.policy.lora.r=4")
    succeed(fit_argv(run, "remax", *lora, epochs=1), log)
    config = run / "config.yaml"
    config.write_text(config.read_text().replace("seed_everything: 0", "seed_everything: 1"))
    argv = ["export", "--ckpt_path", str(run), "--out", str(tmp_path / "out")]
    assert main(argv) == 2
    assert "frozen weights differ from those" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("argv", "reason"),
    [
        (("--out", "x"), "the following arguments are required: --ckpt_path"),
        (("--ckpt_path", "nowhere", "--out", "x"), "--ckpt_path nowhere: no such checkpoint."),
    ],
)
def test_a_missing_argument_or_checkpoint_is_refused(argv, reason, capsys):
    assert main(["export", *argv]) == 2
    assert reason in capsys.readouterr().err


def test_merging_is_computed_in_float32():
    torch.manual_seed(0)
    policy = adapted(Policy, dtype="bfloat16")
    with torch.no_grad():
        for name, weight in policy.named_parameters():
            weight.add_(0.01 * torch.randn_like(weight) if ".lora_" in name else 0)
    layer = policy.network.model.layers[0].mlp.up_proj
    low_rank = layer.lora_B["default"].weight.float() @ layer.lora_A["default"].weight.float()
    exact = (layer.base_layer.weight.float() + 2 * low_rank).to(torch.bfloat16)
    plain = merge_adapter(policy, "default")
    assert torch.equal(plain.model.layers[0].mlp.up_proj.weight, exact)
    assert plain.model.layers[0].mlp.up_proj.weight.dtype == torch.bfloat16
    assert policy.adapted is not None  # the original is unchanged
    assert layer.base_layer.weight.dtype == torch.bfloat16


def test_only_adapters_that_train_are_saved(tmp_path):
    tiny().save(tmp_path / "base")
    frozen = Policy(str(tmp_path / "base"), lora=LoRA(r=2, lora_alpha=4))
    frozen.save(tmp_path / "frozen")
    policy = Policy(str(tmp_path / "base"), lora=LoRA(r=2, lora_alpha=4))
    policy.adapters.load_frozen_adapter(str(tmp_path / "frozen"), "dpo")
    policy.save(tmp_path / "own")
    files = sorted(path.name for path in (tmp_path / "own").rglob("*") if path.is_file())
    assert files == ["README.md", "adapter_config.json", "adapter_model.safetensors"]
    assert not (tmp_path / "own" / "dpo").exists()
