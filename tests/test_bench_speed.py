"""The speed benchmark runs every algorithm of both sides at a tiny size."""

import importlib.util
import re
import sys
from pathlib import Path

import pytest
from tiny_models import distance, weights

SCRIPTS = str(Path(__file__).parents[1] / "scripts")
ALGORITHMS = ["grpo", "rloo", "dpo", "sft", "reward_model"]


@pytest.fixture
def bench(monkeypatch):
    """Return the module of cases, with a model size that takes no time."""
    monkeypatch.syspath_prepend(SCRIPTS)
    from bench import case

    tiny = {
        "vocab_size": 64,
        "hidden_size": 32,
        "intermediate_size": 64,
        "num_hidden_layers": 2,
    }
    monkeypatch.setitem(case.MODELS, "tiny", tiny)
    return case


def write_case(bench, algorithm: str, folder: Path, mean: int = 3):
    """Return a case of four prompts or rows, after writing its files."""
    from bench import data

    shape = bench.Shape("ragged" if mean else "full", 4, 2, 8, 6, mean, 2)
    case = bench.Case(algorithm, "tiny", shape)
    data.write_files(case, folder, 4)
    return case


@pytest.mark.parametrize("algorithm", ALGORITHMS)
def test_lit_align_side_runs_steps(bench, algorithm, tmp_path):
    from bench import lit_align_side
    from bench.interleave import interleave_steps

    case = write_case(bench, algorithm, tmp_path)
    (steps,) = interleave_steps([lambda *args: lit_align_side.run(case, tmp_path, *args)], rounds=2)
    assert len(steps) == 2
    assert all(step.clock > 0 for step in steps)


@pytest.mark.skipif(importlib.util.find_spec("trl") is None, reason="needs TRL: the extra `bench`")
@pytest.mark.parametrize("algorithm", ALGORITHMS)
def test_trl_side_runs_steps(bench, algorithm, tmp_path):
    from bench import trl_side
    from bench.interleave import interleave_steps

    case = write_case(bench, algorithm, tmp_path)
    (steps,) = interleave_steps([lambda *args: trl_side.run(case, tmp_path, *args)], rounds=2)
    assert len(steps) == 2


@pytest.mark.parametrize(("mean", "ragged"), [(0, False), (3, True)])
def test_responses_have_the_lengths_of_the_shape(bench, mean, ragged, tmp_path):
    """In the full shape no response ends before its sixth token. In the ragged one most do."""
    from bench import lit_align_side

    case = write_case(bench, "grpo", tmp_path, mean)
    lengths = []

    class LengthRecorder(lit_align_side.Callback):
        def on_train_batch_end(self, trainer, algorithm, outputs, batch, batch_idx):
            lengths.extend(batch.response_lengths)

    callbacks = [*lit_align_side.callbacks(case), LengthRecorder()]
    lit_align_side.fit(
        case, tmp_path, 2, lambda: None, lit_align_side.algorithm(case, tmp_path), callbacks
    )
    assert len(lengths) == 8
    assert any(length < 6 for length in lengths) == ragged


@pytest.mark.parametrize("mean", [0, 3])
def test_the_bare_loop_computes_the_same_weights(bench, mean, tmp_path):
    """Weights after two steps of SFT, each of which changes them by about 2e-6."""
    from bench import lit_align_side, loop

    case = write_case(bench, "sft", tmp_path, mean)
    algorithm = lit_align_side.algorithm(case, tmp_path)
    lit_align_side.fit(case, tmp_path, 2, lambda: None, algorithm, [])
    bare = loop.run(case, tmp_path, 2, lambda: None)
    assert distance(weights(bare), weights(algorithm.policy)) < 1e-7


def test_the_bare_loop_of_grpo_runs_steps(bench, tmp_path):
    from bench import loop

    case, steps = write_case(bench, "grpo", tmp_path), []
    loop.run(case, tmp_path, 2, lambda: steps.append(1))
    assert len(steps) == 2


@pytest.mark.parametrize("name", ["remax", "ppo", "lora_ppo", "hydra_ppo"])
def test_the_algorithms_of_the_papers_take_steps(bench, name, tmp_path):
    from bench import papers

    case, steps = write_case(bench, "grpo", tmp_path), []
    papers.prepare(tmp_path)
    papers.run(name, case, tmp_path, 1, lambda: steps.append(1))
    assert len(steps) == 1


@pytest.mark.long  # writes and compiles C++
def test_fractions_of_the_device_rate_are_printed(bench, monkeypatch, capsys):
    from bench import limits

    for name, small in {"ROUNDS": 1, "BATCH": 2, "PROMPT": 8, "RESPONSE": 4}.items():
        monkeypatch.setattr(limits, name, small)
    limits.report(bench.Case("grpo", "tiny", bench.shapes("grpo", "cpu")[0]))
    first, *lines = capsys.readouterr().out.splitlines()
    assert first.startswith("tiny: ")
    assert [line.split()[1] for line in lines] == ["plain", "recorded", "compiled"]
    percents = [
        int(percent) for line in lines for percent in re.findall(r"(\d+)% of the rate", line)
    ]
    assert len(percents) == 3
    assert all(percent > 0 for percent in percents[:2])


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
@pytest.mark.long  # a fork of a process with free pages of its own takes fewer new ones
def test_peak_memory_grows_by_the_bytes_touched(bench):
    """Two processes with the same imports differ by 200 million bytes."""
    import torch
    from bench.memory import peak, run_in_fork

    def touch(number: int) -> int:
        return peak(lambda: torch.ones(number, dtype=torch.uint8), "cpu")

    assert run_in_fork(touch, 300_000_000) - run_in_fork(touch, 100_000_000) == pytest.approx(
        200e6, rel=0.02
    )


@pytest.mark.parametrize("limit", [1, 2, 3, 7, 8, 13])
def test_the_largest_fitting_factor_is_found(bench, limit):
    from bench import papers

    tried = []
    assert (
        papers.largest_fitting_factor(lambda times: tried.append(times) or times <= limit) == limit
    )
    assert len(tried) <= 7
