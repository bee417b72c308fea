"""The wheel has all files of a run, and runs without the repository."""

import os
import shutil
import subprocess
import sys
import venv
from pathlib import Path
from zipfile import ZipFile

import pytest

ROOT = Path(__file__).parents[1]
ARGV = [
    *("fit", "--config", "remax", "--config", "toy", "--data.batch_size", "4"),
    *("--trainer.limit_train_batches", "2", "--trainer.limit_val_batches", "0"),
]
PRINT_LOCATION = "import lit_align; print('from', lit_align.__file__, flush=True);"
MAIN = "import sys; from lit_align.cli.main import main; sys.exit(main(sys.argv[1:]))"


@pytest.fixture(scope="module")
def wheel(tmp_path_factory) -> Path:
    """Wheel, built from a copy so that it has no files of an earlier build."""
    source, out = tmp_path_factory.mktemp("source"), tmp_path_factory.mktemp("wheel")
    for name in ("lit_align", "configs"):
        shutil.copytree(ROOT / name, source / name)
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, source)
    pip = [sys.executable, "-m", "pip", "wheel", "--quiet", "--no-deps", "--no-build-isolation"]
    done = subprocess.run([*pip, "-w", out, source], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    (built,) = out.iterdir()
    return built


def fit(python: str | Path, folder: Path, **environment: str) -> str:
    """Return the output of a short run in an empty folder, which must not find the repository."""
    folder.mkdir()
    inherited = {k: v for k, v in os.environ.items() if not k.startswith("PYTHON")}
    done = subprocess.run(
        [python, "-c", PRINT_LOCATION + MAIN, *ARGV],
        cwd=folder,
        env={**inherited, "OMP_NUM_THREADS": "1", **environment},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    assert "step 2/2" in done.stdout
    assert (folder / "runs" / "remax" / "hf" / "model.safetensors").is_file()
    return done.stdout


def test_the_wheel_has_all_configs_and_modules(wheel):
    names = set(ZipFile(wheel).namelist())
    folder = ROOT / "configs"
    configs = {str(path.relative_to(folder)) for path in folder.rglob("*.yaml")}
    assert {"remax.yaml", "overlays/toy.yaml"} <= configs
    assert {f"lit_align/configs/{name}" for name in configs} | {"lit_align/py.typed"} <= names
    modules = {str(path.relative_to(ROOT)) for path in (ROOT / "lit_align").rglob("*.py")}
    modules.add("lit_align/configs/__init__.py")
    assert modules == {name for name in names if name.endswith(".py")}
    metadata = next(name for name in names if name.endswith("METADATA"))
    assert "License-Expression: Apache-2.0" in ZipFile(wheel).read(metadata).decode()


@pytest.mark.long
def test_an_unpacked_wheel_runs(wheel, tmp_path):
    site = tmp_path / "site"
    ZipFile(wheel).extractall(site)
    printed = fit(sys.executable, tmp_path / "elsewhere", PYTHONPATH=str(site))
    assert printed.startswith(f"from {site / 'lit_align' / '__init__.py'}")


@pytest.mark.long
@pytest.mark.timeout(3600)  # torch comes over the network
def test_an_installed_wheel_runs(wheel, tmp_path):
    home = tmp_path / "environment"
    venv.create(home, with_pip=True)
    python = home / "bin" / "python"
    install = [python, "-m", "pip", "install", "--quiet", "-c", ROOT / "constraints.txt", wheel]
    done = subprocess.run(install, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    printed = fit(python, tmp_path / "elsewhere")
    assert printed.startswith(f"from {home}")
    version = subprocess.run([home / "bin" / "lit-align", "--version"], capture_output=True)
    assert version.stdout.decode().strip() == f"lit-align {wheel.name.split('-')[1]}"
