"""Grids of runs: what fails is reported, what is finished is not done again, and every launcher does the same."""

import importlib.util
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import yaml
from conftest import ROOT, options
from hydra import compose, initialize_config_dir
from hydra.types import RunMode
from omegaconf import OmegaConf
from test_train import environment, runs_below, summary

from unlearn_runner.training.loggers import WandbLogger

JOB = ("debug=default", "method=siss", "evaluation.every=null", "evaluation.metrics.fid=null", "hardware=cpu",
       "hardware.threads=1", "trainer.checkpointing_steps=null")  # fmt: skip

WRONG_LAMBDA = (
    "method.lambd must be a number in [0, 1] or a group of options that makes a LambdaController, got 1.3; or choose "
    "method/lambd=blend|closed_form|constant|pathwise|variance."
)


def start(*overrides: str, outputs: Path, cache: Path, **more: str) -> subprocess.Popen:
    surroundings = environment(outputs, cache) | more
    surroundings.pop("UNLEARN_RUNNER_SWEEP", None)  # each command is a sweep of its own
    return subprocess.Popen(
        [sys.executable, str(ROOT / "train.py"), "-m", *JOB, *overrides],
        env=surroundings, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, start_new_session=True,
    )  # fmt: skip


def sweep(*overrides: str, outputs: Path, cache: Path, **more: str) -> tuple[int, str]:
    job = start(*overrides, outputs=outputs, cache=cache, **more)
    said, _ = job.communicate(timeout=600)
    return job.returncode, said


def failures(outputs: Path) -> list[dict]:
    return [json.loads(line) for file in outputs.glob("*/*/failures.jsonl") for line in file.read_text().splitlines()]


def test_a_sweep_goes_on_where_it_broke(tmp_path, shared_cache):
    """A job that fails is reported and recorded; the next command makes up for what is missing alone."""
    code, said = sweep("method.lambd=0.3,1.3", "seed=0", "logger=wandb", outputs=tmp_path, cache=shared_cache)
    assert code == 1
    assert "Error executing" not in said
    *_, sentence, which = said.strip().splitlines()
    assert sentence == WRONG_LAMBDA
    assert which.startswith("(job 1 of the sweep: ")
    assert which.endswith("; failures.jsonl in its folder has all)")
    (failure,) = failures(tmp_path)
    assert failure["error"] == WRONG_LAMBDA
    assert "method.lambd=1.3" in failure["overrides"]
    (first,) = runs_below(tmp_path)
    group = yaml.safe_load((first / "config.yaml").read_text())["logger"]["group"]
    assert group == failure["sweep"]

    again = ("method.lambd=0.3,0.7", "seed=0", "logger=wandb", "skip_finished=true", "objective=eval/forget_rate")
    code, said = sweep(*again, outputs=tmp_path, cache=shared_cache)
    assert code == 0, said
    assert f"skipped, for it is finished: {first}" in said
    assert f"to compare the runs: python scripts/compare.py {first.parent}\n" in said
    (second,) = set(runs_below(tmp_path)) - {first}
    config = yaml.safe_load((second / "config.yaml").read_text())
    assert config["method"]["lambd"] == 0.7
    assert config["logger"]["group"] != group


@pytest.mark.slow
def test_an_agent_of_a_wandb_sweep_can_call_the_command(tmp_path, shared_cache):
    """The command line as W&B's own code makes it of the sweep's file; the run is the one that the agent has named."""
    utils = pytest.importorskip("wandb.sdk.launch.sweeps.utils")
    sweep = yaml.safe_load((ROOT / "scripts" / "wandb_sweep.yaml").read_text())
    chosen = {"method.rho": 0.03, "seed": 2}
    assert chosen.keys() == sweep["parameters"].keys()
    groups = {folder.name for folder in (ROOT / "conf").iterdir() if folder.is_dir()}
    assert not chosen.keys() & groups, "as docs/wandb.md says"
    args = utils.create_sweep_command_args({"args": {name: {"value": value} for name, value in chosen.items()}})
    places = {
        "${env}": ["/usr/bin/env"], "${interpreter}": [sys.executable], "${program}": [str(ROOT / sweep["program"])],
        "${args_no_hyphens}": args["args_no_hyphens"],
    }  # fmt: skip
    command = [word for part in utils.create_sweep_command(sweep["command"]) for word in places.get(part, [part])]
    agent = {"WANDB_SWEEP_ID": "abcd1234", "WANDB_RUN_ID": "agentsrun"}
    done = subprocess.run(
        [*command, *(setting for setting in JOB if not setting.startswith("method="))],
        capture_output=True, text=True, cwd=ROOT, env=environment(tmp_path, shared_cache) | agent,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    (folder,) = runs_below(tmp_path)
    config = yaml.safe_load((folder / "config.yaml").read_text())
    assert (config["method"]["rho"], config["seed"], config["logger"]["group"]) == (0.03, 2, "abcd1234")
    assert list(folder.glob("wandb/offline-run-*/run-agentsrun.wandb"))


def test_a_group_among_a_sweeps_parameters_hides_its_options(tmp_path, monkeypatch, request):
    """In W&B's config, as its agent hands the parameters over: why scripts/wandb_sweep.yaml has values only."""
    monkeypatch.setenv("WANDB_SWEEP_ID", "abcd1234")
    monkeypatch.setenv("WANDB_SWEEP_PARAM_PATH", str(tmp_path / "parameters.yaml"))
    wandb = pytest.importorskip("wandb")
    wandb.teardown()  # what an earlier test has set up knows nothing of the two variables
    request.addfinalizer(wandb.teardown)  # nor shall a later one know them
    for parameters in ({"method.rho": 0.03}, {"method": "siss", "method.rho": 0.03}):
        text = yaml.safe_dump({"wandb_version": 1} | {key: {"value": value} for key, value in parameters.items()})
        (tmp_path / "parameters.yaml").write_text(text)
        folder = tmp_path / str(len(parameters))
        folder.mkdir()
        logger = WandbLogger()
        logger.start(folder, {"method": {"rho": 0.03, "lambd": 0.5}, "seed": 1})
        found = dict(logger.run.config)
        logger.finish({}, failed=False)
        assert found["method"] == ("siss" if "method" in parameters else {"rho": 0.03, "lambd": 0.5})
        assert (found["method.rho"], found["seed"]) == (0.03, 1)


def test_a_search_without_optuna_says_what_it_needs(tmp_path):
    if importlib.util.find_spec("hydra_plugins.hydra_optuna_sweeper") is not None:
        pytest.skip("Optuna's sweeper is there")
    for command in (["hparams_search=siss"], ["-m", "hparams_search=learning_rate", "method=neg_grad"]):
        done = subprocess.run(
            [sys.executable, str(ROOT / "train.py"), *command], cwd=tmp_path, capture_output=True, text=True
        )
        assert done.returncode == 1
        assert "needs pip install 'unlearn_runner[optuna]'" in done.stderr
        assert len(done.stderr.splitlines()) == 1


@pytest.mark.parametrize("search", options("hparams_search"))
def test_a_search_is_one_word(search):
    """What Hydra makes of it where Optuna's sweeper is there: a sweep, also without -m, over what the file says."""
    pytest.importorskip("hydra_plugins.hydra_optuna_sweeper")
    with initialize_config_dir(str(ROOT / "conf"), version_base="1.3"):
        cfg = compose("train", [f"hparams_search={search}", "hydra.sweeper.n_trials=3"], return_hydra_config=True)
    sweeper = cfg.hydra.sweeper
    assert cfg.hydra.mode == RunMode.MULTIRUN
    assert sweeper._target_.endswith("OptunaSweeper")
    assert (sweeper.n_trials, len(sweeper.direction)) == (3, len(cfg.objective))
    assert all(OmegaConf.select(cfg, key) is not None for key in sweeper.params)


@pytest.mark.slow
def test_a_study_of_optuna_is_continued(tmp_path, shared_cache):
    """Two objectives, kept in SQLite; the first command is killed, the second goes on with the same study."""
    optuna = pytest.importorskip("optuna")
    pytest.importorskip("hydra_plugins.hydra_optuna_sweeper")
    storage = f"sqlite:///{tmp_path / 'study.db'}"
    search = (
        "hparams_search=siss", "hydra/sweeper/sampler=nsgaii", "hydra.sweeper.study_name=s",
        f"hydra.sweeper.storage={storage}", "hydra.sweeper.direction=[minimize,maximize]", "logger=jsonl",
        "objective=[eval/forget_rate,eval/ssim_retain]",
    )  # fmt: skip

    def complete() -> list:
        if not (tmp_path / "study.db").exists():
            return []
        try:
            study = optuna.load_study(study_name="s", storage=storage)
        except Exception:  # not begun yet
            return []
        return [trial for trial in study.trials if trial.state == optuna.trial.TrialState.COMPLETE]

    first = start(*search, "hydra.sweeper.n_trials=20", outputs=tmp_path / "o", cache=shared_cache)
    deadline = time.monotonic() + 200
    while len(complete()) < 2 and first.poll() is None and time.monotonic() < deadline:
        time.sleep(0.5)
    assert first.poll() is None, first.communicate()[0]
    os.killpg(first.pid, signal.SIGKILL)
    first.communicate()
    before = len(complete())
    code, said = sweep(*search, "hydra.sweeper.n_trials=2", outputs=tmp_path / "o", cache=shared_cache)
    assert code == 0, said
    assert len(complete()) == before + 2
    for trial in complete()[-2:]:
        found = [
            summary(folder)["metrics"]
            for folder in runs_below(tmp_path / "o")
            if yaml.safe_load((folder / "config.yaml").read_text())["method"]["lambd"] == trial.params["method.lambd"]
        ]
        assert trial.values == [found[0]["eval/forget_rate"], found[0]["eval/ssim_retain"]]


@pytest.mark.slow
@pytest.mark.parametrize("launcher", ["joblib", "submitit_local", "submitit_slurm", "ray"])
def test_launchers(tmp_path, shared_cache, launcher):
    """Two jobs that finish, and one that fails, each in processes of its own; then one job in two processes."""
    pytest.importorskip(f"hydra_plugins.hydra_{launcher.split('_')[0]}_launcher")
    more = {}
    if launcher == "submitit_slurm":
        (tmp_path / "bin").mkdir()
        (tmp_path / "states").mkdir()
        script = tmp_path / "bin" / "fake"
        script.write_text(f"#!{sys.executable}\n" + (ROOT / "tests" / "fake_slurm.py").read_text())
        script.chmod(0o755)
        for name in ("sbatch", "srun", "sacct", "scancel"):
            (tmp_path / "bin" / name).symlink_to(script)
        more = {"SLURM_FAKE": str(tmp_path / "states"), "PATH": f"{tmp_path / 'bin'}:{os.environ['PATH']}"}
    outputs = tmp_path / "outputs"
    chosen = (f"hydra/launcher={launcher}", "logger=wandb")
    code, said = sweep(*chosen, "method.lambd=0.3,1.3", "seed=0,1", outputs=outputs, cache=shared_cache, **more)
    assert code == 1, said
    assert WRONG_LAMBDA in said
    assert [summary(folder)["status"] for folder in runs_below(outputs)] == ["finished"] * 2, said
    assert len(failures(outputs)) == 2
    configs = [yaml.safe_load((folder / "config.yaml").read_text()) for folder in runs_below(outputs)]
    assert {config["logger"]["group"] for config in configs} == {failures(outputs)[0]["sweep"]}
    assert len({(folder / "wandb" / "run_id").read_text() for folder in runs_below(outputs)}) == 2
    if launcher == "submitit_slurm":
        assert "--partition=short" not in (tmp_path / "states" / "script").read_text()
        chosen = (*chosen, "hydra.launcher.partition=short")

    code, said = sweep(
        *chosen, "method.lambd=0.3", "seed=0,2", "hardware.num_processes=2", "skip_finished=true",
        outputs=outputs, cache=shared_cache, **more,
    )  # fmt: skip
    assert code == 0, said
    assert len(runs_below(outputs)) == 3, "seed 0 is finished, on whatever hardware"
    if launcher == "submitit_slurm":
        assert "--partition=short" in (tmp_path / "states" / "script").read_text()


def seeds(outputs: Path, status: str) -> list[int]:
    found = [folder for folder in runs_below(outputs) if summary(folder)["status"] == status]
    return sorted(yaml.safe_load((folder / "config.yaml").read_text())["seed"] for folder in found)


@pytest.mark.slow
def test_twelve_jobs_survive_kills(tmp_path, shared_cache):
    """A worker is killed, then the whole sweep, then a third command finishes; what was finished is not run again."""
    grid = ("hydra/launcher=joblib", "logger=jsonl", "skip_finished=true", f"seed={','.join(map(str, range(12)))}")

    def wait_for(count: int, job: subprocess.Popen) -> None:
        deadline = time.monotonic() + 400
        while len(seeds(tmp_path, "finished")) < count and job.poll() is None and time.monotonic() < deadline:
            time.sleep(0.1)
        assert job.poll() is None, job.communicate()[0]

    first = start(*grid, outputs=tmp_path, cache=shared_cache)
    wait_for(2, first)
    workers = open(f"/proc/{first.pid}/task/{first.pid}/children").read().split()  # noqa: SIM115
    loky = [pid for pid in workers if "LokyProcess" in open(f"/proc/{pid}/cmdline").read()]  # noqa: SIM115
    os.kill(int(loky[0]), signal.SIGKILL)
    said, _ = first.communicate(timeout=300)
    assert first.returncode == 1, said
    after_first = seeds(tmp_path, "finished")

    second = start(*grid, outputs=tmp_path, cache=shared_cache)
    wait_for(len(after_first) + 3, second)
    os.killpg(second.pid, signal.SIGKILL)
    second.communicate()
    time.sleep(1)
    after_second = seeds(tmp_path, "finished")
    assert 5 <= len(after_second) < 12

    code, said = sweep(*grid, outputs=tmp_path, cache=shared_cache)
    assert code == 0, said
    assert said.count("skipped, for it is finished") == len(after_second)
    assert seeds(tmp_path, "finished") == list(range(12)), "each once"
