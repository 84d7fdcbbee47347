"""EraseFlow: the balance of chains whose balance is known, what is descended, and which steps count."""

import math
from functools import partial

import pytest
import torch
from pipelines import PROMPTS, tiny
from toy import gaussian_model

from unlearn_runner.methods.method import Setting, Update
from unlearn_runner.methods.policy.erase_flow import EraseFlow, imbalance
from unlearn_runner.models.path import Gaussian
from unlearn_runner.spec import Labels
from unlearn_runner.types import Batch, make_generator

LABELS = Labels(retain=(0,), forget=(1, 2), names=PROMPTS, contents=(0, 1, 1))
NOTHING = Batch(None, None, None, None, 0.0)


def flow(model, labels=LABELS, lr=1e-3, **settings):
    update = partial(Update, optimizer=partial(torch.optim.Adam, lr=lr))
    settings = {"num_rollouts": 3, "num_inference_steps": 6, **settings}
    return EraseFlow(Setting(model, make_generator(0, "method"), labels), update, update, **settings)


def tuned(**more):
    model = tiny(seed=0, guidance_scale=2.0, **more)
    model.freeze_for_unlearning()
    return model


def test_imbalance_by_hand():
    forward, backward = torch.tensor([[1.0, 2.0], [0.0, 0.5]]), torch.tensor([[0.5, 0.0], [1.0, 0.0]])
    assert imbalance(forward, backward, torch.tensor(0.25), 0.75).tolist() == [2.0, -1.0]


@pytest.mark.parametrize("means", [[0.4, 0.4], [0.4, -0.6]], ids=["right", "wrong"])
def test_balance_of_a_chain_that_is_known(means):
    """Data of one point, which the network knows: then every step is q(x_t-1 | x_t, x_0) itself, and the sum of
    log P_F - log P_B telescopes to log q(x_end | x_0) - log q(x_start | x_0), by Bayes. A network that believes in
    another point has a smaller sum.
    """
    torch.set_default_dtype(torch.float64)
    try:
        model = gaussian_model([0.4, means[1]], [1e-12] * 2)
        labels = Labels(retain=(0,), forget=(1,), names=("a", "b"), contents=(0, 1))
        method = flow(model, labels, num_inference_steps=8)
        method.condition = torch.zeros(3, dtype=torch.int64)  # roll-outs of the point that is known
        states = method._roll_out()
        forward, backward = method._densities(states, torch.arange(7))
        start, end = (
            Gaussian(0.4 * scale, std).log_prob(states[:, k]) / model.num_entries
            for k in (0, 7)
            for scale, std in [model.path.amplitudes(method.times[k].expand(3))]
        )
        found = (forward - backward).sum(1)
        if means[1] == 0.4:
            torch.testing.assert_close(found, end - start, rtol=1e-6, atol=1e-6)
        else:
            assert (found < end - start - 0.1).all()
    finally:
        torch.set_default_dtype(torch.float32)


def test_a_step_descends_the_squared_imbalance():
    """Its gradient is the loss's: the weights move as by hand, and log Z by 2 times the mean imbalance."""
    method = flow(tuned(), late_share=1.0)
    method.begin(None)
    moved = {}
    method.update.apply = lambda gradient: moved.update(network=gradient)
    method.partition_update.apply = lambda gradient: moved.update(partition=gradient)
    state = method.generator.get_state()
    metrics = method.step(NOTHING)
    method.generator.set_state(state)
    states = method._roll_out()
    torch.testing.assert_close(states, method.trajectories.states)
    forward, backward = method._densities(states, method._chosen_steps())
    log_partition = torch.tensor(-0.1953, requires_grad=True)
    found = imbalance(forward, backward, log_partition, 2.5)
    loss = found.square().mean()
    by_hand = torch.autograd.grad(loss, [log_partition, *method.update.weights])
    assert metrics["loss/balance"].item() == pytest.approx(loss.item(), rel=1e-4)
    assert moved["partition"].item() == pytest.approx(by_hand[0].item(), rel=1e-4)
    whole = torch.cat([part.flatten() for part in by_hand[1:]])
    torch.testing.assert_close(moved["network"].norm(), whole.norm(), rtol=1e-3, atol=0)


def test_the_forget_prompts_come_to_draw_what_the_anchor_draws():
    """The density of the anchor's roll-outs under the forget prompts grows, and log Z moves towards log beta."""
    method = flow(tuned(), lr=3e-3, anchor=PROMPTS[0], fresh_steps=1, log_reward=2.5)
    method.begin(None)
    method.step(NOTHING)

    def density():
        with torch.no_grad():
            forward, backward = method._densities(method.trajectories.states, torch.arange(5))
            return (forward - backward).sum(1).mean().item()

    before, z = density(), method.partition.value.item()
    for _ in range(60):
        metrics = method.step(NOTHING)
    assert density() > before
    assert method.partition.value.item() > z
    assert all(math.isfinite(value) for value in metrics.values())


def test_later_steps_learn_from_the_last_roll_outs():
    method = flow(tuned(), fresh_steps=2)
    method.begin(None)
    seen = []
    for _ in range(4):
        method.step(NOTHING)
        seen.append(method.trajectories.states.clone())
    assert not torch.equal(seen[0], seen[1])
    assert torch.equal(seen[1], seen[2])
    assert torch.equal(seen[1], seen[3])
    # with guidance twice a row: 5 steps of a roll-out, and 2 x 1 of 5 that count
    assert method.trained.network_evaluations == 2 * 3 * (2 * 5 + 4 * 2)


@pytest.mark.parametrize("late_share", [0.2, 0.5, 1.0])
def test_the_last_steps_always_count(late_share):
    method = flow(tuned(), num_inference_steps=11, late_share=late_share)
    late = min(10, round(late_share * 11))
    chosen = [method._chosen_steps().tolist() for _ in range(20)]
    for steps in chosen:
        assert set(range(10 - late, 10)) <= set(steps)
        assert len(set(steps)) == len(steps) == min(10, 2 * late)
    assert {step for steps in chosen for step in steps} == set(range(10))
