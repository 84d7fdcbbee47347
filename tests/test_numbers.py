"""The default run does what README and docs/results.md say. Trains a real base: minutes."""

import time
from statistics import median

import pytest
import torch
from conftest import names, options
from hydra.utils import instantiate
from test_train import command, runs_below, summary
from trainers import build_driven, build_trainer

from unlearn_runner.data.digits_trousers import DigitsTrousers
from unlearn_runner.data.streams import BatchStream
from unlearn_runner.drivers.sb3 import RolloutStart
from unlearn_runner.methods.method import Setting
from unlearn_runner.models.ddpm import build_ddpm
from unlearn_runner.models.one_step import OneStepPipeline
from unlearn_runner.types import make_generator

pytestmark = pytest.mark.slow


def finished(tmp_path, *overrides: str, timeout: int = 3600):
    """The folder and the scores of a run with an empty cache."""
    done = command(*overrides, "logger=jsonl", outputs=tmp_path / "o", cache=tmp_path / "c", timeout=timeout)
    assert done.returncode == 0, done.stderr
    (folder,) = runs_below(tmp_path / "o")
    return folder, summary(folder)["metrics"]


def test_default_run_forgets_the_trousers_and_draws_digits_as_the_oracle_does(tmp_path):
    """The judge abstains on a quarter of what an oracle draws, too, so the oracle is the measure."""
    _, metrics = finished(tmp_path, "evaluation=full", "evaluation.oracle=true", timeout=2400)
    assert 0.3 <= metrics["base/forget_rate"] <= 0.7
    assert metrics["eval/forget_rate"] <= 0.01
    assert metrics["eval/restored_rate"] >= metrics["oracle/restored_rate"] - 0.05
    assert metrics["eval/retain_accuracy"] >= metrics["base/retain_accuracy"] - 0.03
    assert metrics["eval/nothing_rate"] <= metrics["oracle/nothing_rate"] + 0.05
    assert metrics["cost/peak_memory_gb"] <= 2.0


def test_critic_guided_forgets_a_concept_and_keeps_the_others(tmp_path):
    """Of the trousers at most a tenth is left, also under paraphrases; the digits are recognised as before."""
    overrides = ("model=sd_tiny", "dataset=sd_concepts", "method=critic_guided", "evaluation=prompts")
    _, metrics = finished(tmp_path, *overrides)
    assert metrics["base/forget_rate"] >= 0.85
    assert metrics["base/retain_accuracy"] >= 0.85
    assert metrics["eval/forget_rate"] <= 0.10
    assert metrics["eval/forget_rate_paraphrases"] <= 0.10
    assert metrics["eval/retain_accuracy"] >= metrics["base/retain_accuracy"] - 0.05
    assert metrics["cost/seconds"] <= 1200


def test_distillation_forgets_a_class_and_draws_in_one_step(tmp_path):
    """Of the digit "7" at most 5 % are left, the others are recognised as well as the teacher's; 25 passes less one."""
    folder, metrics = finished(tmp_path, "experiment=digits_class", "method=sfd", "evaluation.relearning=null")
    assert metrics["base/forget_rate"] >= 0.90
    assert metrics["eval/forget_rate"] <= 0.05
    assert metrics["eval/retain_accuracy"] >= metrics["base/retain_accuracy"] - 0.05
    assert metrics["cost/network_evaluations_per_sample"] == 1.0
    assert metrics["cost/images"] == 0
    assert metrics["cost/seconds"] <= 600

    generator = OneStepPipeline.from_pretrained(folder / "model")
    (weights,) = (tmp_path / "c" / "bases").glob("*/model")
    teacher = build_ddpm((1, 16, 16), tuple("0123456789"), 0, str(weights), [], [])
    teacher.load(weights)
    labels, ratios = torch.arange(1000) % 10, []
    for _ in range(3):
        started = time.perf_counter()
        teacher.sample(1000, labels, torch.Generator().manual_seed(0), num_inference_steps=25)
        between = time.perf_counter()
        for part in labels.split(250):
            generator(part, torch.Generator().manual_seed(0))
        ratios.append((between - started) / (time.perf_counter() - between))
    print(f"1,000 samples {median(ratios):.1f} times as fast as the teacher's with 25 steps")
    assert median(ratios) >= 15


@pytest.mark.parametrize("lambd", options("method/lambd"))
def test_choosing_lambda_costs_at_most_three_percent_of_a_step(composed, digits, lambd):
    """Median of 50 steps each, static and adaptive in turns on the same batches. Nothing else may run on the machine.

    Without split batches, for those make a step's cost depend on lambda itself.
    """
    methods = []
    for overrides in (("method=siss",), ("method=adaptive_siss", f"method/lambd={lambd}")):
        cfg = composed(*overrides, "method.split=false", debug=False)
        network = instantiate(cfg["model"]["network"], image_shape=(1, 16, 16), label_names=names(10), seed=0)
        method = instantiate(cfg["method"], _convert_="all")(Setting(network, make_generator(0, "m")))
        methods.append((method, BatchStream(digits, method.reads, 64, 0, torch.device("cpu")), []))
    for step in range(55):
        for method, stream, seconds in methods:
            batch = stream.next()
            started = time.perf_counter()
            method.step(batch)
            if step >= 5:
                seconds.append(time.perf_counter() - started)
    static, adaptive = (median(seconds) for _, _, seconds in methods)
    print(f"{lambd}: {1000 * static:.1f} ms static, {1000 * adaptive:.1f} ms adaptive, {adaptive / static - 1:+.1%}")
    assert adaptive <= 1.03 * static


@pytest.mark.parametrize(("agent", "share"), [("ppo", 0.05), ("sac", 0.10)])
def test_an_agent_costs_at_most_five_or_ten_percent_of_a_step(composed, tmp_path, agent, share):
    """Medians over rollouts of 25 steps, the policy's training included, in turns with static SISS at 28x28.

    Nothing else may run on the machine. Without split batches, for those make a step's cost depend on lambda itself,
    and without a fresh state, whose network evaluations are counted.
    """
    data = DigitsTrousers(image_size=28).load()
    same = ("dataset.image_size=28", "model=ddpm_small", "method.split=false", "trainer.max_steps=1000")
    static = build_trainer(composed("method=siss", *same, debug=False), data, tmp_path / "static")
    cfg = composed("method=rl_lambda", "method.fresh_state=false", f"method/agent={agent}", *same, debug=False)
    chosen, driven = build_driven(cfg, data, tmp_path / "chosen")
    seconds: dict[str, list[float]] = {"static": [], "chosen": []}
    for rollout in range(6):
        started = time.perf_counter()
        for _ in range(25):
            static.step()
        seconds["static"].append(time.perf_counter() - started)
        started = time.perf_counter()
        with driven.randomness.inside():
            driven.model.learn(25, RolloutStart(driven.rollout_started), None, reset_num_timesteps=False)
        seconds["chosen"].append(time.perf_counter() - started)
        assert static.clock.step == chosen.clock.step == 25 * (rollout + 1)
    before, after = (median(seconds[name][1:]) / 25 for name in ("static", "chosen"))
    print(f"{agent}: {1000 * before:.1f} ms static, {1000 * after:.1f} ms with it, {after / before - 1:+.1%}")
    assert after <= (1 + share) * before
