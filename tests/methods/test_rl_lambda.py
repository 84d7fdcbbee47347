"""What the agent of RL-lambda is paid, and what the method refuses."""

import math

import pytest
import torch

from unlearn_runner.data.streams import Images
from unlearn_runner.errors import ConfigurationError
from unlearn_runner.methods.denoising import denoising_loss
from unlearn_runner.methods.method import Setting
from unlearn_runner.methods.siss.rl_lambda import Probe, RLLambda, paper_reward, probe_reward


def test_paper_reward():
    """-(0.5 + 0.1 * 0.2^2)."""
    found = paper_reward(torch.tensor(0.5), 0.7, 0.5, omega=0.1)
    assert math.isclose(found, -0.504, rel_tol=1e-6)
    assert math.isclose(paper_reward(torch.tensor(-3.0), 0.5, 0.5, omega=0.1), 3.0)


def test_probe_reward_by_hand_and_its_bounds():
    base = torch.tensor([0.1, 0.2])
    assert probe_reward(base, base, 0.5, 0.5, omega=1.0) == 0
    doubled = probe_reward(torch.tensor([0.1, 0.4]), base, 0.5, 0.5, omega=1.0)
    assert math.isclose(doubled, math.tanh(0.5), rel_tol=1e-6)
    damaged = probe_reward(torch.tensor([0.2, 0.2]), base, 0.5, 0.5, omega=1.0)
    assert math.isclose(damaged, -math.tanh(0.5), rel_tol=1e-6)
    assert math.isclose(probe_reward(base, base, 0.9, 0.5, omega=1.0), -0.16, rel_tol=1e-6)
    destroyed = probe_reward(torch.tensor([1e9, 1e9]), base, 0.5, 0.5, omega=1.0)
    assert destroyed == 0, "breaking the model pays nothing"
    for losses in ([1e9, 0.0], [0.0, 1e9], [-1e9, 1e9]):
        assert abs(probe_reward(torch.tensor(losses), base, 0.01, 0.99, omega=1.0)) <= 3
    nats = torch.tensor([-50.0, -60.0])  # a VAE's losses may be negative
    assert probe_reward(nats + torch.tensor([0.0, 5.0]), nats, 0.5, 0.5, omega=1.0) > 0


class Kept:
    """Images of one kind, as a stream shows them."""

    def __init__(self, pixels: torch.Tensor, label: int):
        self.pixels, self.label = pixels, label

    def __len__(self) -> int:
        return len(self.pixels)

    def take(self, rows, mirrored=False):
        return self.pixels[rows], torch.full((len(rows),), self.label)


def test_probe_looks_at_the_same_images_timesteps_and_noise(tiny_network):
    network = tiny_network()
    x0 = torch.randn(2, 6, 1, 8, 8, generator=torch.Generator().manual_seed(0)).clamp(-1, 1)
    images = Images(Kept(x0[0], 0), Kept(x0[1][:3], 1))
    before = network.network_evaluations
    probe = Probe(network, images, size=4, seed=0)
    assert network.network_evaluations - before == 7, "4 retain and all 3 forget images, counted"
    assert torch.equal(probe(network), probe.losses_base), "the base's, before anything has moved"
    assert torch.equal(Probe(network, images, size=4, seed=0).losses_base, probe.losses_base), "so a resumed run's is"
    assert not torch.equal(Probe(network, images, size=4, seed=1).losses_base, probe.losses_base)
    x0, cond, timesteps, eps = probe.parts[1]
    assert torch.allclose(probe.losses_base[1], denoising_loss(network, x0, cond, timesteps, eps).mean() / 64)
    assert timesteps.tolist() == [network.num_train_timesteps * n // 6 for n in (1, 3, 5)]


@pytest.mark.parametrize(
    ("settings", "named"),
    [
        ({"low": 0.6, "high": 0.4}, "method.low"),
        ({"low": 0.6}, "method.lambd"),
    ],
)
def test_refusals(tiny_network, settings, named):
    with pytest.raises(ConfigurationError, match=named):
        RLLambda(Setting(tiny_network(), torch.Generator()), agent=None, update=None, **settings)
