"""What the agent of RL-lambda is paid, and what the method refuses."""

import math

import pytest
import torch

from unlearn_runner.errors import ConfigurationError
from unlearn_runner.methods.method import Setting
from unlearn_runner.methods.rl_lambda import Probe, RLLambda, paper_reward, probe_reward
from unlearn_runner.types import Batch


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


def test_probe_looks_at_the_same_images_timesteps_and_noise(tiny_network):
    network = tiny_network()
    generator = torch.Generator().manual_seed(0)

    def batch():
        x0 = torch.randn(2, 6, 1, 8, 8, generator=generator).clamp(-1, 1)
        return Batch(x0[0], x0[1], torch.arange(6), torch.ones(6, dtype=torch.int64), 0.1)

    probe = Probe(size=4, seed=0)
    first = probe(network, batch())
    assert torch.equal(probe(network, batch()), first), "common random numbers, and the first batch's images"
    assert not torch.equal(Probe(size=4, seed=1)(network, batch()), first)
    resumed = Probe(size=4, seed=0)
    resumed.load_state_dict(probe.state_dict())
    assert torch.equal(resumed(network, batch()), first)
    before = network.network_evaluations
    probe(network, batch())
    assert network.network_evaluations - before == 8, "4 retain and 4 forget images, counted"


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
