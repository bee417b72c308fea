"""`scripts/plan_accuracy.py` at the toy size on a CPU, where estimates are within one percent."""

import runpy
import sys
from pathlib import Path

import pytest

SCRIPTS = Path(__file__).parents[1] / "scripts"
sys.path.insert(0, str(SCRIPTS))  # as when the script is run
try:
    SCRIPT = runpy.run_path(str(SCRIPTS / "plan_accuracy.py"))
finally:
    sys.path.remove(str(SCRIPTS))

main = SCRIPT["main"]
LINE = ("--model", "toy", "--device", "cpu", "--measured", "--methods", "SFT")


@pytest.mark.long
def test_estimates_are_compared_with_measured_peaks(tmp_path, capfd):
    plans = tmp_path / "plans.json"
    assert main([*LINE, "--within", "0.01", "--plans", str(plans)]) == 0
    lines = capfd.readouterr().out.splitlines()
    shown = [line.split()[:2] for line in lines if line.endswith("%") and line.startswith("SFT ")]
    assert shown == [["SFT", "load"], ["SFT", "prepare"], ["SFT", "update"]]
    assert lines[-1] == "1 of 1 methods within 1%"
    assert '"toy SFT"' in plans.read_text()


@pytest.mark.long
def test_a_failed_method_prints_its_error_and_sets_the_status(capfd):
    assert main(["--model", "llama-9", "--device", "cpu", "--methods", "SFT", "--measured"]) == 1
    printed = capfd.readouterr().out
    error = "lit_align.errors.UserError: shape:llama-9: there is no such shape"
    assert f"no plan: {error}" in printed
    assert f"failed: {error}" in printed


@pytest.mark.parametrize("off", [0.06, -0.06])
def test_errors_are_fractions_of_the_measured_bytes(off, capfd):
    print_differences = SCRIPT["print_differences"]
    assert print_differences({"load": round(1000 * (1 + off))}, {"load": 1000}, "SFT") == [
        pytest.approx(off)
    ]
    assert print_differences({}, {"update": 1000}, "SFT") == [-1.0]
