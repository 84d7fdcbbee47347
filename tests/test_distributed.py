"""Two processes do what one does; one that is lost ends the job and says why."""

import json
import os
import re
import signal
import subprocess
import sys
from pathlib import Path

import processes
import pytest
import torch
from conftest import ROOT, assert_same_bits, weights_of
from test_train import command, environment, in_training, runs_below, summary

from unlearn_runner.distributed import launch
from unlearn_runner.errors import ConfigurationError

SCRIPT = processes.__file__
PPO = ("rl_lambda", "method.update_every=2", "method.agent.batch_size=2")
ON_SD = ("model=sd_tiny", "dataset=sd_concepts", "dataset.image_size=16")
FEW = ("method.num_inference_steps=3", "method.minibatches=2", *ON_SD)
ON_STABLE_DIFFUSION = {
    "critic_guided": ("critic_guided", "method.critic_steps=1", *FEW),
    "ddpo": ("ddpo", *FEW),
    "siss": ("siss", *ON_SD),
    "esd": ("esd", "method.num_inference_steps=3", *ON_SD),
    "concept_ablation": ("concept_ablation", "method.num_images=6", "method.num_inference_steps=3", *ON_SD),
    "erase_flow": ("erase_flow", "method.num_rollouts=2", "method.num_inference_steps=4", *ON_SD),
    "sfd": ("sfd", *ON_SD),
    "uce": ("uce", *ON_SD),
}
LOSS_BASED = {
    "naive_deletion": ("naive_deletion",),
    "neg_grad": ("neg_grad",),
    "erase_diff": ("erase_diff",),
    "salun": ("salun",),
    "siss": ("siss",),
    "siss_no_is": ("siss_no_is",),
    "adaptive_siss": ("adaptive_siss",),
    "timesteps": ("adaptive_siss", "method/lambd=pathwise", "method/timesteps=second_moment"),
    "siss_vae": ("siss", "model=vae"),
    "vae": ("retrain", "model=vae"),
    "rl_lambda": PPO,
    "posterior": ("posterior",),
    "retrack": ("retrack",),
    "posterior_vae": ("posterior", "model=vae"),
}
DISTILLING = {
    "sfd": ("sfd",),
    "hybrid": ("hybrid",),
    "labels": ("hybrid", "method.variant=siss_sfd_labels"),
    "student": ("hybrid", "method.variant=siss_sfd_student"),
}


def jobs_of(composed, methods: dict[str, tuple[str, ...]], *overrides: str) -> dict[str, dict]:
    def small(method: str, *more: str) -> dict:
        pixels = ["model.network.block_out_channels=[8,8]", "model.network.attention=[false,false]"]
        pixels = [] if any("model=" in part for part in more) else pixels
        return composed(f"method={method}", *pixels, *overrides, *more)

    return {name: small(*method) for name, method in methods.items()}


def norm(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor]) -> float:
    """||a - b|| over all weights."""
    return sum((a[name].double() - b[name].double()).square().sum().item() for name in a) ** 0.5


def distances(jobs: dict[str, dict], resumed: dict[str, dict], folder: Path) -> dict[str, float]:
    """Between the weights that one process and two come to, as a share of how far training has moved them; both of the
    two have the same bits.
    """
    (folder / "one").mkdir()
    (folder / "two").mkdir()
    processes.train(jobs, folder / "one")
    launch(SCRIPT, "train_and_resume", (jobs, resumed, folder / "two"), 2)
    found = {}
    for name in jobs:
        (start, one), (_, first), (_, second) = (
            torch.load(folder / place / f"{name}.{rank}.pt") for place, rank in (("one", 0), ("two", 0), ("two", 1))
        )
        assert_same_bits(first, second)
        found[name] = norm(one, first) / norm(one, start)
    return found


@pytest.mark.parametrize(
    "names",
    [
        ("siss", "timesteps", "rl_lambda"),
        pytest.param(
            tuple(name for name in LOSS_BASED | DISTILLING if name not in ("siss", "timesteps", "rl_lambda")),
            marks=pytest.mark.slow,
        ),
    ],
    ids=["some", "others"],
)
def test_two_processes_train_as_one_and_resume_to_the_bit(composed, tmp_path, names):
    """A batch of 7 does not divide, nor does what SISS selects of it."""
    methods = {name: (LOSS_BASED | DISTILLING)[name] for name in names}
    jobs = jobs_of(composed, methods, "trainer.max_steps=4", "trainer.batch_size=7")
    resumed = {"siss": ("adaptive_siss", "model.network.dropout=0.3")} if "siss" in names else {"sfd": ("sfd",)}
    found = distances(jobs, jobs_of(composed, resumed, "trainer.max_steps=4"), tmp_path)
    assert not {name: value for name, value in found.items() if not value < 1e-7}


@pytest.mark.slow
def test_two_processes_train_as_one_on_stable_diffusion(composed, tmp_path):
    jobs = jobs_of(composed, ON_STABLE_DIFFUSION, "trainer.max_steps=2", "trainer.batch_size=7")
    found = distances(jobs, jobs_of(composed, {"critic": ON_STABLE_DIFFUSION["critic_guided"]}), tmp_path)
    assert not {name: value for name, value in found.items() if not value < 1e-7}


def test_shares_dropout_and_caches(tmp_path):
    launch(SCRIPT, "share_drop_and_cache", (tmp_path,), 2)
    for rows in (6, 5, 1):  # also of inputs that came out of shares, in another order, and of weights used outside
        first, second = (torch.load(tmp_path / f"{rows}.{rank}.pt") for rank in (0, 1))
        processes.share(rows, tmp_path)
        for a, b, c in zip(torch.load(tmp_path / f"{rows}.0.pt"), first, second, strict=True):
            assert torch.allclose(a, b, rtol=1e-12, atol=1e-12)
            assert torch.equal(b, c)
    (kept, drawn), (_, drawn_there) = (torch.load(tmp_path / f"drop.{rank}.pt") for rank in (0, 1))
    assert not torch.equal(kept[0], kept[1]), "each process has a dropout of its own"
    assert torch.equal(drawn, drawn_there), "and all have the same generator afterwards"


@pytest.mark.parametrize(
    ("how", "which", "kind", "said"),
    [
        ("defect", 1, RuntimeError, "ZeroDivisionError: in one process"),
        ("mistake", 0, ConfigurationError, "^expected a, got b.$"),
        ("kill", 1, RuntimeError, "SIGKILL"),
    ],
)
def test_a_lost_process_ends_the_job(how, which, kind, said):
    before = signal.getsignal(signal.SIGTERM)
    with pytest.raises(kind, match=said):
        launch(SCRIPT, "lose_one", (how, which), 2)
    assert signal.getsignal(signal.SIGTERM) == before


TWO = ("debug=default", "logger=jsonl", "hardware=cpu", "hardware.num_processes=2")


@pytest.mark.slow
def test_the_command_leaves_one_folder_with_the_scores_of_one_process(tmp_path, shared_cache):
    """With an empty cache: the base is trained by both."""
    one = command(
        *TWO, "hardware.num_processes=1", "evaluation.oracle_seeds=[0,1]", outputs=tmp_path / "1", cache=shared_cache
    )
    assert one.returncode == 0, one.stderr
    launcher = [[sys.executable], [sys.executable, "-m", "torch.distributed.run", "--nproc_per_node", "2"]]
    for number, start in enumerate(launcher):
        done = subprocess.run(
            [*start, str(ROOT / "train.py"), *TWO, "evaluation.oracle_seeds=[0,1]"],
            capture_output=True, text=True, env=environment(tmp_path / f"2{number}", tmp_path / "cache"),
        )  # fmt: skip
        assert done.returncode == 0, done.stderr
        assert len(re.findall("everything is in", done.stdout)) == 1
        (folder,), (alone,) = runs_below(tmp_path / f"2{number}"), runs_below(tmp_path / "1")
        assert list((tmp_path / f"2{number}").glob("*/*/*")) == [folder]
        one, two = weights_of(alone), weights_of(folder)
        assert norm(one, two) < 1e-3 * norm(one, {name: torch.zeros(()) for name in one})
        assert summary(folder)["metrics"].keys() == summary(alone)["metrics"].keys()
        for name in ("fid_retain", "kid_retain", "is_retain", "forget_rate"):  # torchmetrics must not add processes up
            scores = [summary(place)["metrics"][f"base/{name}"] for place in (folder, alone)]
            assert scores[0] == pytest.approx(scores[1], rel=0.02, abs=1e-3)
        there = summary(folder)["oracles"]
        assert [oracle["seed"] for oracle in there] == [0, 1]
        for ours, theirs in zip(there, summary(alone)["oracles"], strict=True):
            assert ours["metrics"]["fid_retain"] == pytest.approx(theirs["metrics"]["fid_retain"], rel=0.02)
        for name in ("network_evaluations", "images"):
            assert summary(folder)["metrics"][f"cost/{name}"] == summary(alone)["metrics"][f"cost/{name}"]


@pytest.mark.slow
@pytest.mark.parametrize("to", ["launcher", "worker"])
def test_a_signal_stops_all_after_the_same_step(tmp_path, shared_cache, to):
    settings = (*TWO, "trainer.max_steps=150", "evaluation.every=null", "trainer.checkpointing_steps=null")
    job = in_training(*settings, outputs=tmp_path, cache=shared_cache)
    os.kill(job.pid if to == "launcher" else children(job.pid)[-1], signal.SIGTERM)
    said, _ = job.communicate(timeout=60)
    assert job.returncode == 130, said
    (folder,) = runs_below(tmp_path)
    assert summary(folder)["status"] == "interrupted"
    resumed = command(*settings, "resume_from_checkpoint=latest", outputs=tmp_path, cache=shared_cache)
    assert resumed.returncode == 0, resumed.stderr
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines if "loss/forget" in line] == list(range(1, 151))


def children(pid: int) -> list[int]:
    """Those of a process that compute, which have threads of their own."""
    found = open(f"/proc/{pid}/task/{pid}/children").read().split()  # noqa: SIM115
    return [int(child) for child in found if "spawn_main" in Path(f"/proc/{child}/cmdline").read_text()]
