"""The benchmark: what it compares exists, its plain loop is the published algorithm, its table says what was found."""

import copy
import math
import subprocess
import sys

import bench
import pytest
import torch
from conftest import ROOT
from hydra.utils import instantiate
from reference_loop import ReferenceLoop

from unlearn_runner.methods.siss.mixture import mix, siss_loss
from unlearn_runner.models.model import squared_error
from unlearn_runner.types import Batch


@pytest.mark.parametrize("network", bench.NETWORKS)
def test_what_is_compared_exists(network):
    assert set(bench.COMPARED) | set(bench.COMPARED.values()) <= set(bench.SUBJECTS) | set(bench.REFERENCES)
    for overrides in bench.SUBJECTS.values():
        assert bench.composed([*bench.NETWORKS[network], *overrides])["method"]
    cfg = bench.composed(bench.NETWORKS[network])
    model = instantiate(cfg["model"]["network"], image_shape=(1, 28, 28), label_names=tuple("0123456789"), seed=0)
    weights = sum(weight.numel() for weight in model.parameters()) / 1e6
    assert weights == pytest.approx({"paper": 14.7, "small": 1.1}[network], abs=0.05)


@pytest.mark.parametrize("importance_sampling", [True, False])
def test_plain_loop_is_the_published_algorithm(tiny_network, importance_sampling):
    model, lambd, tau = tiny_network(), 0.3, 5.0
    b, generator = 16, torch.Generator().manual_seed(0)
    x, a = (torch.rand(b, 1, 8, 8, generator=generator) * 2 - 1 for _ in range(2))
    labels_x, labels_a = torch.arange(b) % 10, torch.ones(b, dtype=torch.int64)
    labels_x = torch.where(torch.arange(b) < 8, labels_a, labels_x)  # one-hot weights only where labels differ
    a[:8] = x[:8] + 0.05 * a[:8]
    weights = list(model.parameters())

    torch.manual_seed(0)
    t, eps = torch.randint(1000, (b,)), torch.randn_like(x)
    if importance_sampling:
        same = labels_x == labels_a  # the plain loop does not know that a label tells where m comes from
        batch = Batch(x, a, None, None, 0.0)
        from_a = torch.rand(b) < lambd
        mixture = mix(batch, t, model.noising(x, t, None), model.noising(a, t, None), eps, from_a, lambd)
        prediction = model.predict(mixture.m, t, torch.where(from_a, labels_a, labels_x))
        errors = [squared_error(prediction, origin.eps) for origin in (mixture.retain, mixture.forget)]
        losses = siss_loss(*errors, mixture.retain.weight, mixture.forget.weight)
        assert same.any()
    else:
        gamma, sigma = model.path.amplitudes(t)
        predictions = (model.predict(gamma * x0 + sigma * eps, t, cond) for x0, cond in ((x, labels_x), (a, labels_a)))
        losses = [squared_error(prediction, eps).mean() for prediction in predictions]
    g_x, g_a = (torch.autograd.grad(loss, weights, retain_graph=True) for loss in losses)
    norm_a = math.sqrt(sum(part.square().sum().item() for part in g_a))
    wanted = copy.deepcopy(model.backbone.unet)
    optimizer = torch.optim.AdamW(wanted.parameters(), 1e-3, betas=(0.95, 0.999), weight_decay=1e-6)
    for weight, part_x, part_a in zip(wanted.parameters(), g_x, g_a, strict=True):
        weight.grad = part_x - tau / norm_a * part_a
    torch.nn.utils.clip_grad_norm_(wanted.parameters(), 1.0)
    gradients = [weight.grad.clone() for weight in wanted.parameters()]
    optimizer.step()

    torch.manual_seed(0)
    loop = ReferenceLoop(model.backbone.unet, model.path.schedule.alphas_cumprod, importance_sampling, lambd, tau, 1e-3)
    loop.step(x, a, labels_x, labels_a)
    assert loop.log[0]["norm_a"] == pytest.approx(norm_a, rel=1e-4)
    for found, expected in zip(model.backbone.unet.parameters(), gradients, strict=True):
        torch.testing.assert_close(found.grad, expected, rtol=1e-3, atol=1e-5)


def test_table_says_what_was_found():
    row = {"milliseconds": 100.0, "quartiles": (90.0, 110.0), "images_per_second": 640.0, "evaluations": 1.0,
           "outside": 0.021, "peak": 300.0}  # fmt: skip
    found = {
        "network": "small", "parameters": 1.1e6, "batch_size": 64, "image_size": 28, "conditional": True,
        "threads": 2, "rounds": 3, "steps": 4, "subjects": {"reference": row, "siss": row},
        "ratios": bench.ratios_of(
            {"siss": [1.0, 2.0, 1.0], "reference": [1.4, 3.0, 1.6], "reference_tuned": [1.0, 2.0, 1.0]}
        ),
    }  # fmt: skip
    lines = bench.markdown(found).splitlines()
    assert lines[0].startswith("small network (1.1M weights), 28x28, batch 64, conditional, 2 threads, 3 rounds of 4")
    ratios = "1.50 (1.40 to 1.60) reference, 1.00 (1.00 to 1.00) reference_tuned"
    assert lines[-1] == f"| siss | 100 (90 to 110) | 640 | 1.00 | 2.1 % | 300 | {ratios} |"


def test_mistakes_get_one_sentence():
    for arguments, said in (
        (["--rounds", "0"], "--rounds must be positive, got 0."),
        (["--json", "nowhere/a.json"], "nowhere/a.json cannot be written: there is no folder nowhere."),
    ):
        done = subprocess.run(
            [sys.executable, str(ROOT / "scripts" / "bench.py"), *arguments], capture_output=True, text=True
        )
        assert done.returncode == 1
        assert done.stderr.strip() == said


@pytest.mark.slow
def test_every_subject_runs():
    """Each in a process of its own."""
    arguments = bench.parser().parse_args(
        ["--batch-size", "4", "--hardware", "cpu", "--rounds", "1", "--steps", "1", "--warm-up", "1"]
    )
    for name in bench.BY_DEFAULT:
        runner = bench.Runner(name, arguments)
        (seconds,) = bench.in_turns([runner], arguments).values()
        timing = bench.timing_of(runner, seconds, arguments)
        assert timing.milliseconds > 0, name
        assert 0 < timing.outside < 1, name
        assert timing.peak > 0, name
        runner.connection.close()


def test_a_subject_that_ends_says_so(capfd):
    arguments = bench.parser().parse_args(["--hardware", "cpu", "--set", "method.update.clip_norm=nonsense"])
    with pytest.raises(SystemExit, match="siss has ended; what it said stands above"):
        bench.Runner("siss", arguments)
    assert "nonsense" in capfd.readouterr().err
