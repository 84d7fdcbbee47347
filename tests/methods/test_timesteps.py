"""Timestep samplers: what they draw, and that the mean over timesteps stays that of uniform ones."""

import pytest
import torch

from unlearn_runner.methods.siss.timesteps import SecondMoment, Uniform

CPU = torch.device("cpu")


def taught(**settings) -> SecondMoment:
    """One that has met losses which grow with t."""
    sampler = SecondMoment(num_levels=4, **settings)
    level = torch.linspace(0.01, 0.99, 400)
    sampler.learn(level, (level * 4).floor() + 1)  # 1, 2, 3, 4
    return sampler


def test_uniform_is_one_plain_draw():
    timesteps, weights = Uniform().draw(1000, 1000, torch.Generator().manual_seed(3), CPU)
    assert torch.equal(timesteps, torch.randint(1000, (1000,), generator=torch.Generator().manual_seed(3)))
    assert (weights == 1).all()


def test_second_moment_draws_in_proportion_to_the_root_mean_square():
    assert taught(uniform_share=0.2).probabilities().tolist() == pytest.approx([0.13, 0.21, 0.29, 0.37])


def test_second_moment_leaves_means_as_they_are():
    timesteps, weights = taught().draw(200_000, 1000, torch.Generator().manual_seed(0), CPU)
    assert timesteps.min() >= 0
    assert timesteps.max() <= 999
    assert weights.max() <= 1 / 0.1
    every = torch.arange(1000).float()
    for f in (torch.ones_like, lambda t: t, lambda t: (t / 300).sin()):
        values = weights * f(timesteps.float())
        error = values.std().item() / len(values) ** 0.5
        assert values.mean().item() == pytest.approx(f(every).mean().item(), abs=4 * error)


def test_second_moment_is_uniform_until_every_range_is_known():
    sampler = SecondMoment(num_levels=4)
    sampler.learn(torch.tensor([0.1, 0.3, 0.6]), torch.ones(3))
    assert sampler.probabilities().tolist() == pytest.approx([0.25] * 4)
    assert (sampler.draw(10, 1000, torch.Generator(), CPU)[1] == 1).all()


def test_one_noise_level_is_always_drawn():
    assert (SecondMoment().draw(50, 1, torch.Generator(), CPU)[0] == 0).all()
