"""The package as it is installed: what it holds, and the command that it brings."""

import os
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest
import tomllib
from conftest import ROOT

from unlearn_runner.trust import CONF


def test_every_folder_of_the_package_is_in_the_wheel():
    said = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["setuptools"]
    folders = {file.parent for file in (ROOT / "unlearn_runner").rglob("*.py")}
    there = {".".join(folder.relative_to(ROOT).parts) for folder in folders}
    assert set(said["packages"]) == there | {"unlearn_runner.conf"}
    assert said["package-dir"] == {"unlearn_runner.conf": "conf"} and CONF == ROOT / "conf"
    for group in (file.parent for file in (ROOT / "unlearn_runner").rglob("*.jinja")):
        assert group.parent.name == "comparison", "package-data names no other"


def command(*words: str, cwd: Path, **more: str) -> subprocess.CompletedProcess:
    return subprocess.run(
        [sys.executable, "-m", "unlearn_runner", *words], cwd=cwd, env=os.environ | more, capture_output=True, text=True
    )


def test_the_module_is_the_command(tmp_path):
    """From any folder: what would run, one sentence for a mistake, and nothing left behind."""
    shown = command("--cfg", "job", "method=siss", cwd=tmp_path, PYTHONPATH=str(ROOT))
    assert shown.returncode == 0, shown.stderr
    assert "unlearn_runner.methods.siss.siss.SISS" in shown.stdout
    refused = command("method=sis", cwd=tmp_path, PYTHONPATH=str(ROOT))
    assert refused.returncode == 1
    assert refused.stderr.startswith("method=sis: there is no such option"), refused.stderr
    assert not list(tmp_path.iterdir())
    (tmp_path / "own").mkdir()
    (tmp_path / "own" / "config.yaml").write_text("seed: -1\n")
    refused = command("--config-path", "own", "--config-name", "config", cwd=tmp_path, PYTHONPATH=str(ROOT))
    assert refused.returncode == 1 and "there is no configuration" not in refused.stderr, refused.stderr


@pytest.mark.slow
def test_a_wheel_runs_where_there_is_no_checkout(tmp_path):
    """Built as `pip install` does it, and unpacked where nothing else of the project is."""
    built = subprocess.run(
        [sys.executable, "-m", "pip", "wheel", "--no-deps", "--wheel-dir", str(tmp_path), str(ROOT)],
        capture_output=True, text=True,
    )  # fmt: skip
    if built.returncode:
        pytest.skip(f"a wheel needs setuptools from the package index: {built.stderr.splitlines()[-1]}")
    (wheel,) = tmp_path.glob("*.whl")
    with zipfile.ZipFile(wheel) as packed:
        packed.extractall(tmp_path / "site")
    configs = {file.relative_to(ROOT / "conf") for file in (ROOT / "conf").rglob("*.yaml") if "local" not in file.parts}
    packed = tmp_path / "site" / "unlearn_runner" / "conf"
    assert {file.relative_to(packed) for file in packed.rglob("*.yaml")} >= configs
    (tmp_path / "elsewhere").mkdir()
    ran = command(
        "debug=default", "method=naive_deletion", "logger=jsonl", "hardware=cpu", "hydra.run.dir=run",
        cwd=tmp_path / "elsewhere", PYTHONPATH=str(tmp_path / "site"),
        UNLEARN_RUNNER_CACHE=str(tmp_path / "cache"),
    )  # fmt: skip
    assert ran.returncode == 0, ran.stderr
    card = (tmp_path / "elsewhere" / "run" / "model" / "README.md").read_text()
    assert "method=naive_deletion" in card
