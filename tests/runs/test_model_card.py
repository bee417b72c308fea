"""Model card of exported weights."""

import json

import pytest
import yaml
from fake_run_folder import write_run
from tiny_models import adapted, tiny

from lit_align.models.policy import Policy
from lit_align.models.scalar_head import ScalarHead
from lit_align.runs.model_card import write_card


@pytest.fixture
def run(tmp_path):
    rows = [
        {"step": s, "iteration": s + 1.0, "reward": float(s), "kl/per_response_k1": 2.0}
        for s in range(20)
    ]
    folder = write_run(tmp_path / "my_run", rows, seed=7)
    with (folder / "config.yaml").open("a") as file:
        file.write("data: {class_path: PromptData, init_args: {path: some/data-set}}\n")
        file.write(
            "reward: {init_args: {functions: {class_path: a.b.Length, init_args: {target: 5}}}}"
        )
    (folder / "curves.png").write_bytes(b"png")
    (folder / "hf").mkdir()
    return folder


def front(text: str) -> dict:
    return yaml.safe_load(text.split("---")[1])


def test_card_describes_the_run(run):
    network = tiny()
    network.name = "some/base-model"
    text = write_card(run / "hf", run, network).read_text()
    assert front(text) == {
        "library_name": "transformers",
        "pipeline_tag": "text-generation",
        "tags": ["lit_align", "remax"],
        "base_model": "some/base-model",
        "datasets": ["some/data-set"],
    }
    assert "# my_run\n" in text
    for line in (
        "| base model | some/base-model |",
        "| data | some/data-set |",
        "| reward | Length, 5 |",
        "| seed | 7 |",
        "Over 20 rollouts:",
        "| reward | 0.5 | 18.5 |",  # 0 and 1, 18 and 19
        "| KL to the reference, nats per response | 2 | 2 |",
        "![curves](curves.png)",
        "    lit-align fit --config config.yaml",
    ):
        assert line in text
    assert (run / "hf" / "curves.png").read_bytes() == b"png"
    kept = text.split("```yaml\n")[1].split("\n```")[0]
    assert yaml.safe_load(kept) == yaml.safe_load((run / "config.yaml").read_text())


@pytest.mark.parametrize(
    ("network", "library", "tag", "loader"),
    [
        (lambda: adapted(Policy), "peft", "text-generation", "AutoPeftModelForCausalLM"),
        (
            lambda: adapted(ScalarHead),
            "peft",
            "text-classification",
            "AutoPeftModelForSequenceClassification",
        ),
        (tiny, "transformers", "text-generation", "AutoModelForCausalLM"),
    ],
)
def test_card_shows_loading_code(network, library, tag, loader, run):
    text = write_card(run / "hf", run, network()).read_text()
    assert front(text)["library_name"] == library
    assert front(text)["pipeline_tag"] == tag
    assert f"from {library} import {loader}\n" in text


def test_local_folder_is_not_hub_id(run, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "some" / "base-model").mkdir(parents=True)
    network = tiny()
    network.name = "some/base-model"
    assert "base_model" not in front(write_card(run / "hf", run, network).read_text())


def test_text_is_escaped_in_cells_and_code_blocks(run):
    network = tiny()
    network.name = "a|b<script>\nc"
    (run / "config.yaml").write_text("note: 'a ```` b'\n")
    text = write_card(run / "hf", run, network).read_text()
    assert "| base model | a\\|b&lt;script> c |" in text
    assert "`````yaml\nnote: 'a ```` b'\n`````" in text


def test_card_lists_commands(run):
    first, other = "lit-align fit --config remax", "lit-align fit --config remax --ckpt_path last"
    entries = [{"command": line} for line in (first, other, other, "")]
    (run / "environment.json").write_text(json.dumps(entries))
    text = write_card(run / "hf", run, tiny()).read_text()
    assert f"Trained with\n\n    {first}\n    {other}\n\nThe same with all settings" in text


def test_merged_adapter_is_full_model(run):
    text = write_card(run / "hf", run, adapted(Policy), is_full_model=True).read_text()
    assert front(text)["library_name"] == "transformers"
    assert "| weights | full model |" in text
    assert "from transformers import AutoModelForCausalLM\n" in text


def test_run_without_metrics_has_card(tmp_path):
    (tmp_path / "hf").mkdir()
    text = write_card(tmp_path / "hf", tmp_path, tiny()).read_text()
    assert "| base model | llama from random weights |" in text
    assert "Over" not in text
