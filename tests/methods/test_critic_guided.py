"""The reverse process as a policy: its densities, its gradient, what it is rewarded for, and what it remembers."""

from collections import deque
from functools import partial
from itertools import pairwise

import numpy as np
import pytest
import torch
from diffusers import DDIMScheduler
from toy import gaussian_model

from unlearn_runner.errors import ConfigurationError, NonFiniteError
from unlearn_runner.methods.method import Setting, Update
from unlearn_runner.methods.policy import critic_guided
from unlearn_runner.methods.policy.critic_guided import CriticGuided
from unlearn_runner.methods.policy.rollouts import (
    Memory,
    PromptStatistics,
    Reward,
    Rollouts,
    generalised_advantages,
    move,
    policy_loss,
)
from unlearn_runner.models.clip import small_clip
from unlearn_runner.models.path import ladder
from unlearn_runner.spec import Labels
from unlearn_runner.types import Batch, make_generator

F64 = torch.float64
LABELS = Labels(retain=(0,), forget=(1,), names=("a one", "a seven"), contents=(0, 1))
NOTHING = Batch(None, None, None, None, 0.0)


@pytest.fixture
def double():
    torch.set_default_dtype(F64)
    yield
    torch.set_default_dtype(torch.float32)


@pytest.fixture
def clip():
    return small_clip(0, width=16, layers=1, heads=2, text_width=16, text_layers=1, embed_dim=8)


class Wanted:
    """A reward that is a function of the picture, in place of CLIP's."""

    def __init__(self, function, d=8):
        self.function = function
        self.texts = torch.zeros(2, d)

    def __call__(self, images, labels):
        return self.function(images.flatten(1).mean(1))

    def to_forget(self, labels):
        return labels == 1


def sgd(lr=1e-3):
    return partial(Update, optimizer=partial(torch.optim.SGD, lr=lr))


def toy_method(clip, reward=None, side=1, **more) -> CriticGuided:
    model = gaussian_model([-0.3, 0.4], [0.5, 0.6], side=side)
    settings = {"critic_update": None, "num_rollouts": 8, "num_inference_steps": 4, "reuse": 0} | more
    update = settings.pop("update", sgd())
    method = CriticGuided(Setting(model, make_generator(0, "m"), LABELS, clip), update, **settings)
    if reward is not None:
        method.reward = Wanted(reward)
    return method


def test_move_is_diffusers_step_with_the_density_of_its_noise(tiny_network, double):
    for prediction_type in ("epsilon", "v_prediction"):
        model = tiny_network(prediction_type=prediction_type).double()
        model.path.schedule.alphas_cumprod = model.path.schedule.alphas_cumprod.double()
        scheduler = DDIMScheduler.from_config(
            model.scheduler.config, clip_sample=False, set_alpha_to_one=True, timestep_spacing="trailing"
        )
        scheduler.alphas_cumprod = model.path.schedule.alphas_cumprod
        scheduler.set_timesteps(5)
        times = ladder(1000, 5)
        assert times.tolist() == [*scheduler.timesteps.tolist(), -1]
        labels = torch.tensor([1, 4, 7])
        x, noise = torch.randn(2, 3, *model.sample_shape, generator=torch.Generator().manual_seed(0))
        for t, t_next in pairwise(times):
            taken = move(model, x, t.expand(3), t_next.expand(3), labels, noise=noise)
            with torch.no_grad():
                prediction = model.predict(x, t.expand(3), labels)
            theirs = scheduler.step(prediction, t, x, eta=1.0, variance_noise=noise).prev_sample
            torch.testing.assert_close(taken.action, theirs, rtol=1e-9, atol=1e-9)
            if t_next < 0:
                assert taken.log_prob.tolist() == [0, 0, 0]
                assert torch.equal(taken.action, taken.mean)
                continue
            density = torch.distributions.Normal(taken.mean, taken.std.expand_as(x)).log_prob(taken.action)
            torch.testing.assert_close(taken.log_prob, density.flatten(1).sum(1), rtol=1e-12, atol=1e-12)
            std = scheduler._get_variance(t, t_next).sqrt()
            torch.testing.assert_close(taken.std.flatten(), std.expand(3), rtol=1e-9, atol=0)


def test_rescoring_with_unchanged_weights_gives_ratio_one_exactly(tiny_network, clip):
    labels = Labels(tuple(range(1, 10)), (0,), tuple("0123456789"), tuple(range(10)))
    method = CriticGuided(
        Setting(tiny_network(), make_generator(0, "m"), labels, clip),
        sgd(),
        None,
        num_rollouts=6,
        num_inference_steps=5,
    )
    rollouts = method.roll_out(method._draw_labels())
    assert rollouts.labels.tolist().count(0) == 3
    for step in range(rollouts.num_actions):
        again = method.score(method.trained, rollouts, torch.arange(6), torch.full((6,), step))
        assert torch.equal(again.log_prob, rollouts.log_probs[:, step])
        assert torch.equal((again.log_prob - rollouts.log_probs[:, step]).exp(), torch.ones(6))
    method.trained.backbone.unet.conv_out.bias.data += 0.1
    moved = method.score(method.trained, rollouts, torch.arange(6), torch.zeros(6, dtype=torch.int64))
    assert not torch.equal(moved.log_prob, rollouts.log_probs[:, 0])


def test_policy_gradient_is_the_gradient_of_the_expected_reward(double):
    """A chain of Gaussians: x_{k+1} = A_k x_k + B_k + std_k noise; E[r(x_0)] and its gradient are known."""
    model = gaussian_model([-0.3, 0.4], [0.5, 0.6], side=1)
    weights = list(model.parameters())
    times, n = ladder(1000, 4), 200_000

    def expected(a=1.0, b=2.0):
        mean, variance = torch.zeros(()), torch.ones(())
        ones = torch.ones(1, dtype=torch.int64)
        for t, t_next in pairwise(times):
            at = partial(move, model, t=t.expand(1), t_next=t_next.expand(1), cond=ones)
            zero, one = (at(torch.full((1, 1, 1, 1), x), noise=torch.zeros(1, 1, 1, 1)) for x in (0.0, 1.0))
            slope, shift, std = one.mean - zero.mean, zero.mean, zero.std
            if t_next < 0:  # not an action: nothing is learnt from it
                slope, shift, std = slope.detach(), shift.detach(), torch.zeros(())
            mean, variance = (slope * mean + shift).squeeze(), (slope.square() * variance + std.square()).squeeze()
        return a * mean + b * (mean.square() + variance)

    exact = torch.autograd.grad(expected(), weights)
    generator = torch.Generator().manual_seed(0)
    x, labels = torch.randn(n, 1, 1, 1, generator=generator), torch.ones(n, dtype=torch.int64)
    log_probs = []
    for t, t_next in pairwise(times):
        noise = torch.randn(x.shape, generator=generator)
        with torch.no_grad():
            action = move(model, x, t.expand(n), t_next.expand(n), labels, noise=noise).action
        if t_next >= 0:
            log_probs.append(move(model, x, t.expand(n), t_next.expand(n), labels, action=action).log_prob)
        x = action
    rewards = (x + 2 * x.square()).flatten()
    advantages = rewards - rewards.mean()
    loss = sum(policy_loss(lp - lp.detach(), advantages, torch.ones(n), 1e-4) for lp in log_probs)
    found = torch.autograd.grad(loss, weights)
    for ours, wanted in zip(found, exact, strict=True):
        assert wanted[1].abs() > 0.01
        torch.testing.assert_close(-ours, wanted, rtol=0.03, atol=1e-12)


def test_policy_loss_by_hand():
    log_ratio = torch.tensor([0.0, 0.5, 0.5, -0.5, -0.5], requires_grad=True)
    advantages = torch.tensor([2.0, 1.0, -1.0, 1.0, -1.0])
    weights = torch.tensor([1.0, 1.0, 2.0, 1.0, 1.0])
    # ratios 1, e^.5 = 1.6487, .., e^-.5 = 0.6065; range 0.2: min(r A, clip(r) A)
    terms = [2.0, 1.2, 2 * -1.64872, 0.60653, -0.8]
    loss = policy_loss(log_ratio, advantages, weights, 0.2)
    assert loss.item() == pytest.approx(-sum(terms) / 5, rel=1e-5)
    (slopes,) = torch.autograd.grad(loss, log_ratio)
    assert slopes.tolist() == pytest.approx([-0.4, 0.0, 2 * 1.64872 / 5, -0.60653 / 5, 0.0], rel=1e-4)


def test_advantages_by_hand():
    values, rewards = torch.tensor([[0.2, 0.5, 0.4]]), torch.tensor([1.0])
    given = partial(generalised_advantages, values, rewards)
    torch.testing.assert_close(given(1.0), torch.tensor([[0.8, 0.5, 0.6]]))
    torch.testing.assert_close(given(0.0), torch.tensor([[0.3, -0.1, 0.6]]))
    torch.testing.assert_close(given(0.5), torch.tensor([[0.3 + 0.5 * (-0.1 + 0.5 * 0.6), -0.1 + 0.5 * 0.6, 0.6]]))


def test_advantages_are_in_standard_deviations_of_the_prompt_and_cut(clip):
    method = toy_method(clip, min_std=0.1, max_advantage=2.0, least_history=3)
    rewards = torch.tensor([0.1, 0.2, 0.6, 0.5, 0.5, 0.5])
    labels = torch.tensor([0, 0, 0, 1, 1, 1])
    method.statistics.add(labels, rewards)
    found = method.advantages(Rollouts(labels, torch.zeros(6, 5, 1, 1, 1), torch.zeros(6, 4), rewards))
    std = rewards[:3].std(correction=0)
    torch.testing.assert_close(found[:3, 0], (rewards[:3] - 0.3) / std)
    assert found[3:].abs().max() < 1e-6, "not a division by 0"
    assert torch.equal(found[:, 0], found[:, 3])
    late = Rollouts(labels, torch.zeros(6, 5, 1, 1, 1), torch.zeros(6, 4), rewards + 3)
    assert method.advantages(late).max() == 2.0


def test_statistics_of_a_prompt_or_of_its_kind():
    statistics = PromptStatistics(3, size=3, least=2)
    statistics.add(torch.tensor([0, 0, 0, 0, 1, 2]), torch.tensor([9.0, 1.0, 2.0, 3.0, 5.0, 7.0]))
    kinds = torch.tensor([False, False, True])
    mean, std = statistics.of(torch.tensor([0, 1, 2]), kinds)
    assert mean.tolist() == pytest.approx([2.0, 11 / 4, 7.0]), "the newest three; 1 has too few: 0's and its own"
    assert std[0].item() == pytest.approx((2 / 3) ** 0.5)


def test_advantages_of_ddpo_are_those_of_its_released_code(composed, clip):
    """Five rounds of rewards under six prompts: per prompt over a queue, of the round until enough, and cut."""
    cfg = composed("method=ddpo", "model=sd_tiny", "dataset=sd_concepts", debug=False)["method"]
    assert (cfg["history"], cfg["least_history"], cfg["max_advantage"], cfg["other_history"]) == (32, 16, 5.0, "round")
    names = tuple(f"prompt {number}" for number in range(6))
    settings = {name: cfg[name] for name in ("history", "least_history", "other_history", "min_std", "max_advantage")}
    model, prompts = gaussian_model([0.0] * 6, [1.0] * 6), Labels((0, 1, 2, 3), (4, 5), names, (0,) * 6)
    method = CriticGuided(Setting(model, make_generator(0, "m"), prompts, clip), sgd(), None, **settings)
    g, queues, cut = np.random.default_rng(0), [deque(maxlen=32) for _ in names], 0
    for _ in range(5):
        labels = g.choice(6, 40, p=[0.35, 0.3, 0.2, 0.1, 0.03, 0.02])
        rewards = g.normal(labels, 1 + labels).astype(np.float32)
        rewards[-1] += 100
        wanted = np.empty(40)
        for label in np.unique(labels):
            own = rewards[labels == label]
            queues[label].extend(own)
            known = rewards if len(queues[label]) < 16 else np.array(queues[label])
            wanted[labels == label] = (own - np.mean(known)) / (np.std(known) + 1e-6)
        drawn = torch.from_numpy(labels), torch.from_numpy(rewards)
        method.statistics.add(*drawn)
        found = method.advantages(Rollouts(drawn[0], torch.zeros(40, 5, 1), torch.zeros(40, 4), drawn[1]))
        assert found.shape == (40, 4), "every step has its roll-out's"
        np.testing.assert_allclose(found[:, 0], wanted.clip(-5, 5), rtol=1e-4, atol=1e-5)
        assert torch.equal(found, found[:, :1].expand(-1, 4))
        cut += int((np.abs(wanted) > 5).sum())
    assert cut > 0
    lengths = sorted(map(len, queues))
    assert lengths[0] < 16 and lengths[-1] == 32, "both kinds of statistics, and a full queue"


def test_memory_forgets_what_is_stale():
    memory = Memory(max_staleness=2)
    parts = [Rollouts(torch.tensor([n]), *torch.zeros(3, 1)) for n in range(5)]
    for number, part in enumerate(parts):
        memory.add(number, part)
    assert [int(part.labels) for part in memory.before(5, 10)] == [3, 4]
    assert [int(part.labels) for part in memory.before(5, 1)] == [4]
    assert [int(part.labels) for part in memory.before(6, 10)] == [4]
    assert memory.before(7, 10) == memory.before(5, 0) == []


def test_reused_rollouts_carry_bounded_weights(clip, monkeypatch):
    method = toy_method(
        clip, reward=torch.sigmoid, reuse=2, max_staleness=2, max_weight=1.02, update=sgd(0.05), num_rollouts=16
    )
    first = method.step(NOTHING)
    assert "weights/ess_reuse" not in first
    seen = []

    def noting(log_ratio, advantages, weights, clip_range):
        seen.append(weights)
        return policy_loss(log_ratio, advantages, weights, clip_range)

    monkeypatch.setattr(critic_guided, "policy_loss", noting)
    second = method.step(NOTHING)
    weights = torch.cat(seen)
    assert len(weights) == 2 * 16 * 3
    assert (weights == 1).sum() >= 16 * 3, "the fresh ones"
    others = weights[weights != 1]
    assert others.max() == pytest.approx(1.02)
    assert ((others > 0) & (others < 1)).any()
    assert 0.5 < second["weights/ess_reuse"] <= 1


@pytest.mark.slow
def test_critic_knows_better_towards_the_picture(clip):
    torch.manual_seed(0)
    method = toy_method(
        clip, reward=lambda x: torch.sigmoid(3 * x), num_rollouts=64, num_inference_steps=8, critic_steps=300,
        critic_update=partial(Update, optimizer=partial(torch.optim.Adam, lr=3e-3)), critic_batch=128,
    )  # fmt: skip
    for _ in range(3):
        method._teach_critic(method.roll_out(method._draw_labels()))
    fresh = method.roll_out(method._draw_labels())
    errors = (method.values(fresh) - fresh.rewards[:, None]).square().mean(0)
    assert errors[-1] < errors[0] / 3, errors
    assert errors[4] < errors[0], errors
    baseline = (fresh.rewards - fresh.rewards.mean()).square().mean()
    assert errors[-1] < baseline / 3


def test_rewards_by_hand(clip):
    labels = Labels((0, 1), (2, 3), ("a one", "a two", "a seven", "the seven"), (0, 1, 2, 2))
    images = torch.rand(4, 3, 16, 16, generator=torch.Generator().manual_seed(0)) * 2 - 1
    asked = torch.arange(4)
    cosines = clip.of_images(images) @ clip.of_texts(labels.names).T
    chances = (clip.scale * cosines).softmax(1)
    found = Reward(clip, labels, "probability")(images, asked)
    sevens = chances[:, 2] + chances[:, 3]
    torch.testing.assert_close(found, torch.stack([chances[0, 0], chances[1, 1], 1 - sevens[2], 1 - sevens[3]]))
    soft = Reward(clip, labels, "probability", temperature=0.5)(images, asked)
    torch.testing.assert_close(soft[:2], (2 * cosines).softmax(1).diagonal()[:2])
    similar = Reward(clip, labels, "similarity")(images, asked)
    own = (1 + cosines.diagonal()) / 2
    torch.testing.assert_close(similar, torch.cat([own[:2], 1 - own[2:]]))
    replaced = Reward(clip, labels, "similarity", override="an eight")(images, asked)
    eight = (clip.of_images(images) @ clip.of_texts(["an eight"]).T)[:, 0]
    torch.testing.assert_close(replaced, torch.cat([own[:2], (1 + eight[2:]) / 2]))
    for rewards in (found, soft, similar, replaced):
        assert ((rewards >= 0) & (rewards <= 1)).all()


def test_rewards_for_forgetting_several_contents(clip):
    """Under a forget prompt none of them may be shown; under a retain prompt all is as it was."""
    labels = Labels((0, 1), (2, 3, 4), ("a one", "a two", "a seven", "the seven", "an eight"), (0, 1, 2, 2, 3))
    images = torch.rand(5, 3, 16, 16, generator=torch.Generator().manual_seed(0)) * 2 - 1
    asked = torch.arange(5)
    cosines = clip.of_images(images) @ clip.of_texts(labels.names).T
    chances = (clip.scale * cosines).softmax(1)
    found = Reward(clip, labels, "probability")(images, asked)
    torch.testing.assert_close(found, torch.cat([chances.diagonal()[:2], 1 - chances[2:, 2:].sum(1)]))
    similar = Reward(clip, labels, "similarity")(images, asked)
    shown = torch.stack([
        torch.maximum(cosines[2, 2], cosines[2, 4]),
        torch.maximum(cosines[3, 3], cosines[3, 4]),
        torch.maximum(cosines[4, 4], torch.maximum(cosines[4, 2], cosines[4, 3])),
    ])  # fmt: skip
    expected = torch.cat([(1 + cosines.diagonal()[:2]) / 2, 1 - (1 + shown) / 2])
    torch.testing.assert_close(similar, expected)


def test_reward_rises(clip):
    """Of a wish that the toy can fulfil, in a few rounds, with a critic and without."""
    for more in ({}, {"critic_update": partial(Update, optimizer=partial(torch.optim.Adam, lr=3e-3))}):
        method = toy_method(
            clip, reward=torch.sigmoid, num_rollouts=64, clip_range=0.2, critic_warmup=1,
            update=partial(Update, optimizer=partial(torch.optim.Adam, lr=0.05)), **more,
        )  # fmt: skip
        rounds = [method.step(NOTHING) for _ in range(12)]
        assert rounds[-1]["reward/mean"] > rounds[0]["reward/mean"] + 0.1
        assert all("grad_variance/policy" in metrics for metrics in rounds[1:])


def test_divergence_from_the_base_pulls_back(clip):
    settings = {
        "reward": torch.sigmoid, "num_rollouts": 64, "clip_range": 0.2,
        "update": partial(Update, optimizer=partial(torch.optim.Adam, lr=0.05)),
    }  # fmt: skip
    free, held = toy_method(clip, **settings), toy_method(clip, kl_weight=10.0, kl_prompts="all", **settings)
    for method in (free, held):
        start = torch.cat([weight.detach().clone() for weight in method.trained.parameters()])
        metrics = [method.step(NOTHING) for _ in range(6)]
        method.moved = (torch.cat(list(method.trained.parameters())) - start).norm()
    assert metrics[0]["loss/kl"] < metrics[1]["loss/kl"]
    assert held.moved < free.moved / 1.5
    assert held.networks[1].network_evaluations > 0


def test_divergence_holds_the_prompts_that_it_is_asked_for(clip):
    """By hand on moved weights; half of the roll-outs are under the forget label."""
    found = {}
    for prompts in ("retain", "all"):
        method = toy_method(clip, reward=torch.sigmoid, kl_weight=1.0, kl_prompts=prompts)
        method.begin(None)
        rollouts = method.roll_out(method._draw_labels())
        with torch.no_grad():
            for weight in method.trained.parameters():
                weight += 0.1
        rows, steps = torch.arange(8), torch.tensor([0, 1, 2, 0, 1, 2, 0, 1])
        scored, base = (method.score(model, rollouts, rows, steps) for model in (method.trained, method.base))
        kl = torch.distributions.kl_divergence(
            *(torch.distributions.Normal(part.mean, part.std.expand_as(part.mean)) for part in (scored, base))
        )
        held = torch.ones(8) if prompts == "all" else (~method.reward.to_forget(rollouts.labels)).float()
        found[prompts] = method._divergence(scored, rollouts, rows, steps)
        torch.testing.assert_close(found[prompts], (kl.flatten(1).mean(1) * held).mean(), rtol=1e-5, atol=1e-7)
    assert 0 < found["retain"] < found["all"]


def test_reward_that_is_no_number_stops_the_run(clip):
    method = toy_method(clip, reward=lambda x: x * torch.nan)
    before = [weight.detach().clone() for weight in method.trained.parameters()]
    with pytest.raises(NonFiniteError, match="the reward became nan in round 1"):
        method.step(NOTHING)
    for a, b in zip(before, method.trained.parameters(), strict=True):
        assert torch.equal(a, b)


def test_refuses(clip):
    with pytest.raises(ConfigurationError, match=r"num_inference_steps must be at most 1000, .*; got 1001"):
        toy_method(clip, num_inference_steps=1001)
    with pytest.raises(ConfigurationError, match="minibatches must be at most the steps that a round learns from"):
        toy_method(clip, minibatches=10_000)
