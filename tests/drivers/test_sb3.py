"""RL-lambda: the environment, its agents, and that nothing of it is lost or counted wrongly."""

import json
import math
import signal
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import assert_same_bits, marked, weights_of
from gymnasium.utils.env_checker import check_env
from stable_baselines3.common.env_checker import check_env as check_env_for_sb3
from trainers import build_driven, build_trainer, flat, flat_state

from unlearn_runner.drivers.lambda_env import LambdaEnv, squash
from unlearn_runner.drivers.sb3 import NEWER, LambdaDriver
from unlearn_runner.errors import ConfigurationError, Interrupted, NonFiniteError
from unlearn_runner.methods.siss.lambda_objectives import SeparateTerms
from unlearn_runner.methods.siss.rl_lambda import TERMS
from unlearn_runner.models.model import denoising_loss
from unlearn_runner.training.checkpoint import open_checkpoint
from unlearn_runner.training.clock import Listener
from unlearn_runner.types import make_generator

PPO = (
    "method=rl_lambda", "method.agent.batch_size=2", "+method.agent.n_epochs=2", "method.update_every=4",
    "trainer.max_steps=8",
)  # fmt: skip
SAC = (
    "method=rl_lambda", "method/agent=sac", "method.agent.learning_starts=2", "method.agent.train_freq=4",
    "method.agent.batch_size=4", "trainer.max_steps=8",
)  # fmt: skip
EPISODIC = ("method.training=episodic", "method.episodes=4", "method.episodes_per_update=2", "trainer.max_steps=4")
SB3S = ("method.fresh_state=false", "method.state_dependent_std=false")  # state and policy of older run folders
SETUPS = {
    "ppo online": PPO,
    "ppo online stale": (*PPO, *SB3S),
    "ppo online to the prior": (*PPO, "method.kl_weight=0.1", "method.observe_gradient_norms=false"),
    "ppo episodic probe": (*PPO, *EPISODIC, "method.reward=probe"),
    "sac online": (*SAC, "method.reward=probe"),
    "sac episodic": (*SAC, *EPISODIC, *SB3S[:1], "method.agent.train_freq=2"),
}


class Kept:
    """All that is told."""

    def __init__(self):
        self.lines, self.notes, self.looks, self.finished = [], [], [], []

    @property
    def listeners(self):
        return {"recorder": Listener(None, self.logged, self.noted, self.evaluate, self.finish, self)}

    def logged(self, clock, values):
        self.lines.append((clock.step, {key: value for key, value in values.items() if key != "seconds"}))

    def noted(self, clock, values):
        self.notes.append((clock.step, values))

    def evaluate(self, clock, model):
        self.looks.append(clock.step)

    def finish(self, clock, model):
        self.finished.append((clock.step, {name: weight.clone() for name, weight in model.state_dict().items()}))

    def state_dict(self):
        return {"lines": len(self.lines), "notes": len(self.notes)}

    def load_state_dict(self, state_dict):
        del self.lines[state_dict["lines"] :], self.notes[state_dict["notes"] :]


@pytest.fixture
def driven(composed, digits, tmp_path):
    def build(*overrides, recorder=None, folder="run"):
        return build_driven(composed(*overrides), digits, tmp_path / folder, recorder and recorder.listeners)

    return build


def environment(driven, *overrides) -> LambdaEnv:
    return driven(*overrides)[1].env


@pytest.mark.parametrize(("norms", "logits"), [("true", True), ("false", False)])
def test_the_environment_is_one(composed, digits, tmp_path, logits, norms):
    cfg = composed(*PPO, f"method.observe_gradient_norms={norms}", "trainer.max_steps=1000")
    env = LambdaEnv(build_trainer(cfg, digits, tmp_path), logits)
    env.trainer.listen("agent", Listener(stepped=env.stepped))
    env.features.frozen = True  # their running statistics are all that episodes leave behind
    assert env.observation_space.shape == ((6,) if norms == "true" else (4,))
    check_env(env, skip_render_check=True)
    check_env_for_sb3(env, warn=True)


def test_what_the_agent_sees_and_gets(driven):
    env = environment(driven, *PPO)
    first, _ = env.reset()
    assert first.tolist() == pytest.approx([0, 0, 0, 0, 0.5, 0])
    seen, reward, terminated, truncated, _ = env.step(np.float32([1.0]))
    lambd = 0.01 + 0.98 / (1 + np.exp(-1))
    assert env.method.lambd.value == pytest.approx(lambd)
    assert seen[4:] == pytest.approx([1 / (1 + np.exp(-1)), 1 / 8])
    assert not terminated and not truncated
    again, _ = env.reset()
    assert again.tolist() == first.tolist()
    assert env.trainer.clock.run_step == 0 and env.trainer.clock.step == 1
    metrics = {}
    env.trainer.listen("test", Listener(stepped=lambda clock, found: metrics.update(found)))
    _, second, *_ = env.step(np.float32([1.0]))
    assert second == reward, "after a reset the same step is the same"
    loss = metrics["loss/retain"] - metrics["loss/forget"]
    assert second == pytest.approx(float(-(loss + 0.1 * (lambd - 0.5) ** 2)))
    assert metrics["lambda/value"] == pytest.approx(lambd)


@pytest.mark.parametrize("norms", [True, False])
def test_the_fresh_state_is_that_of_the_new_weights(driven, norms):
    """Losses and gradient norms at the step's own images under the weights after it, each term apart, at timesteps and
    noise that are not the step's; they are counted, and change nothing of the step.
    """
    more = f"method.observe_gradient_norms={str(norms).lower()}"
    env, stale = environment(driven, *PPO, more), environment(driven, *PPO, more, SB3S[0])
    assert (stale.seen == TERMS) if norms else (stale.seen == TERMS[:2])
    shown, batches = [], []
    tell = Listener(stepped=lambda clock, metrics: shown.append([metrics[name].item() for name in env.seen]))
    env.trainer.listen("test", tell)
    draw = env.trainer.stream.next
    env.trainer.stream.next = lambda: (batches.append(draw()), batches[-1])[1]
    network, g = env.method.siss.trained, make_generator(env.method.seed, "state")
    for number in range(2):
        for other in (env, stale):
            other.step(np.float32([0.5]))
        batch = batches[number]
        timesteps = torch.randint(network.num_train_timesteps, (len(batch.x0_retain),), generator=g)
        eps = torch.randn(batch.x0_retain.shape, generator=g)
        losses, lengths = [], []
        for x0, cond in ((batch.x0_retain, batch.cond_retain), (batch.x0_forget, batch.cond_forget)):
            loss = denoising_loss(network, x0, cond, timesteps, eps).mean()
            losses.append(loss.item() / network.num_entries)
            parts = torch.autograd.grad(loss, list(network.parameters()))
            lengths.append(torch.cat([part.flatten() for part in parts]).norm().item())
        assert shown[number] == pytest.approx(losses + lengths * norms, rel=1e-4)
    evaluations = [other.trainer.clock.network_evaluations for other in (env, stale)]
    assert evaluations[0] - evaluations[1] == 2 * 2 * len(batch.x0_retain)
    weights = [dict(other.method.siss.trained.state_dict()) for other in (env, stale)]
    assert_same_bits(*weights)


def test_a_state_that_is_not_finite_stops_with_its_step(driven):
    env = environment(driven, *PPO)
    unknown = SeparateTerms(torch.ones(1), torch.full((1,), torch.nan), torch.ones(2))
    env.method.siss.separate_terms = lambda *_, **__: unknown
    with pytest.raises(NonFiniteError, match="the state after step 1"):
        env.step(np.float32([0.0]))


@pytest.mark.parametrize("setup", ["ppo online", "sac online"])
def test_actions_at_the_bounds(driven, setup):
    env = environment(driven, *SETUPS[setup])
    env.reset()
    for action, lambd in ((env.action_space.low, 0.01), (env.action_space.high, 0.99)):
        seen, reward, *_ = env.step(action)
        assert env.method.lambd.value == pytest.approx(lambd, abs=1e-4)
        assert 0.01 <= env.method.lambd.value <= 0.99
        assert np.isfinite(seen).all() and np.isfinite(reward)
        assert env.observation_space.contains(seen)


def test_the_policy_is_a_gaussian_whose_both_moments_come_from_the_state(driven):
    """Its densities by hand. In the beginning it is Stable-Baselines3's: a standard deviation of 1 for all states."""
    _, agent = driven(*PPO)
    policy = agent.model.policy
    states = torch.randn(5, 6, generator=torch.Generator().manual_seed(0))
    assert torch.equal(policy.get_distribution(states).distribution.stddev, torch.ones(5, 1))
    agent()
    gaussian = policy.get_distribution(states).distribution
    assert len(set(gaussian.stddev.flatten().tolist())) == 5, "learnt, and another for each state"
    latent = policy.mlp_extractor.forward_actor(states)
    mean, std = policy.action_net(latent), policy.log_std_net(latent).exp()
    z = torch.linspace(-2, 2, 5)[:, None]
    wanted = -(((z - mean) / std) ** 2) / 2 - std.log() - 0.5 * math.log(2 * math.pi)
    _, log_prob, entropy = policy.evaluate_actions(states, z)
    torch.testing.assert_close(log_prob, wanted.squeeze(1))
    torch.testing.assert_close(entropy, 0.5 * math.log(2 * math.pi * math.e) + std.log().squeeze(1))
    trained = {id(weight) for group in policy.optimizer.param_groups for weight in group["params"]}
    assert trained == {id(weight) for weight in policy.parameters()}


def test_kl_to_the_prior_is_part_of_ppos_loss(driven):
    """ent_coef (H - kl_weight / ent_coef KL) = ent_coef H - kl_weight KL. A strong one makes the policy the prior."""
    _, agent = driven(*PPO, "method.kl_weight=0.25", "method.agent.ent_coef=0.05", folder="a")
    policy = agent.model.policy
    states = torch.randn(5, 6, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        policy.action_net.bias += 1.5
        policy.log_std_net.bias -= 0.7
    _, _, entropy = policy.evaluate_actions(states, torch.zeros(5, 1))
    gaussian = policy.get_distribution(states).distribution
    prior = torch.distributions.Normal(0.0, 1.0)
    kl = torch.distributions.kl_divergence(gaussian, prior).sum(1)
    assert kl.min() > 0.5
    torch.testing.assert_close(0.05 * entropy, 0.05 * gaussian.entropy().sum(1) - 0.25 * kl)
    strong = "method.kl_weight=100", "+method.agent.learning_rate=0.02", "+method.agent.n_epochs=40"
    for more, held in ((strong, True), (strong[1:], False)):
        _, agent = driven(*(part for part in PPO if "n_epochs" not in part), *more, folder=f"held {held}")
        with torch.no_grad():
            agent.model.policy.action_net.bias += 1.5
        agent()
        seen = torch.from_numpy(agent.model.rollout_buffer.observations.reshape(-1, 6))
        means = agent.model.policy.get_distribution(seen).distribution.mean
        assert bool(means.abs().mean() < 0.3) == held


def test_squash():
    assert squash(0.0, 0.01, 0.99) == 0.5
    assert 0.2 < squash(-10.0, 0.2, 0.8) < 0.2001
    assert 0.7999 < squash(10.0, 0.2, 0.8) < 0.8


def test_an_agent_frozen_at_one_half_is_static_siss(composed, digits, tmp_path, driven):
    static = build_trainer(composed("method=siss", "trainer.max_steps=8"), digits, tmp_path / "static")
    while not static.done:
        static.step()
    trainer, agent = driven(*PPO, folder="frozen")
    for weight in agent.model.policy.parameters():
        weight.data.zero_()  # its mean is the logit 0
    agent.trained = True
    agent()
    found, wanted = flat_state(trainer), flat_state(static)
    found.pop("/method/state/state")  # what the agent is shown has its own noise
    chosen = {"/method/lambd/value", "/method/lambd/previous"}  # a constant has no state
    assert {found.pop(name).item() for name in chosen} == {0.5}
    assert_same_bits(found, wanted)


@pytest.mark.parametrize("setup", ["ppo episodic probe", "sac episodic"])
def test_episodes_rehearse_and_the_last_run_is_the_result(driven, setup):
    recorder = Kept()
    trainer, agent = driven(*SETUPS[setup], "trainer.evaluate_every=2", recorder=recorder)
    start, initial, starts = flat_state(trainer), flat(trainer._initial), []
    weights = {key: start[key] for key in start if "/weights/" in key}
    reset = trainer.reset
    trainer.reset = lambda: (reset(), starts.append(flat_state(trainer)))
    agent()
    assert len(starts) == 5, "after each of 4 episodes, and before the run that counts"
    for state in starts:
        assert_same_bits({key: state[key] for key in state if "/weights/" in key}, weights)
    assert_same_bits({key: starts[-1][key] for key in initial}, initial)  # draws what it would without an agent
    for drawn in {"/stream/generator", "/method/noise/state", "/method/state/state", "/rng/cpu"} & start.keys():
        states = {tuple(state[drawn].tolist()) for state in (start, *starts)}
        assert len(states) == 6, f"{drawn}: every rehearsal has draws of its own, and so has the run"
    assert trainer.clock.step == LambdaDriver().total_steps(trainer.method, trainer.plan) == 20
    assert recorder.looks == [18], "rehearsals are not looked at"
    [(step, shipped)] = recorder.finished
    assert step == 20
    assert_same_bits(shipped, dict(trainer.method.model.state_dict()))
    after = flat_state(trainer)
    assert any(not torch.equal(after[key], start[key]) for key in start if "/weights/" in key)
    assert trainer.clock.rehearsed["images"] * 5 == trainer.clock.images * 4
    returns = [values for _, values in recorder.notes if "agent/return" in values]
    assert len(returns) == 5
    rewards = [line["agent/reward"] for _, line in recorder.lines]
    assert [values["agent/return"] for values in returns] == pytest.approx(
        [sum(rewards[begin : begin + 4]) for begin in range(0, 20, 4)]
    )


@pytest.mark.parametrize("setup", ["ppo online", "sac online"])
def test_online_learns_within_the_one_run(driven, setup):
    recorder = Kept()
    trainer, agent = driven(*SETUPS[setup], recorder=recorder)
    before = flat(agent.model.get_parameters())
    agent()
    assert trainer.clock.step == trainer.clock.run_step == 8
    assert trainer.clock.rehearsed == {}
    after = flat(agent.model.get_parameters())
    assert any(not torch.equal(after[key], before[key]) for key in before)
    lambdas = [line["lambda/value"] for _, line in recorder.lines]
    assert len(set(lambdas)) == 8
    assert any("agent/train/n_updates" in values for _, values in recorder.notes)
    assert not [key for _, values in recorder.notes for key in values if not key.startswith("agent/")]


@pytest.mark.parametrize(
    ("setup",), marked([(s,) for s in SETUPS], {(s,) for s in SETUPS if s not in ("ppo online", "sac online")})
)
def test_same_seed_same_bits_and_the_global_generators_are_left_alone(driven, setup):
    ends = []
    for folder, disturbance in (("a", 1), ("b", 2)):
        torch.manual_seed(5)
        np.random.seed(disturbance)
        trainer, agent = driven(*SETUPS[setup], folder=folder)
        kept = np.random.get_state()[1].copy()
        agent()
        assert np.array_equal(np.random.get_state()[1], kept)
        ends.append(flat_state(trainer) | flat(agent.model.get_parameters()))
    assert_same_bits(*ends)


@pytest.fixture(scope="module")
def wholes() -> dict[str, tuple]:
    """By set-up, what an uninterrupted run left."""
    return {}


def left_by(trainer, agent, recorder) -> tuple:
    policy = Path(trainer.checkpoints.folder).parent / "policy" / "policy.json"
    told = [recorder.lines, recorder.notes, [step for step, _ in recorder.finished], policy.read_text()]
    clock = trainer.clock
    spent = [clock.images, clock.network_evaluations, clock.step, clock.run_step]
    return flat_state(trainer) | flat(agent.model.get_parameters()), told + spent


@pytest.mark.parametrize(
    ("setup", "at"),
    marked(
        [(setup, at) for setup in SETUPS for at in ((3, 8, 9, 18) if "episodic" in setup else (1, 4, 7, 8))],
        {(setup, at) for setup in SETUPS for at in (3, 8, 18)}
        | {(setup, at) for setup in ("ppo online stale", "ppo online to the prior", "sac online") for at in (4, 7)}
        | {("ppo online stale", 1), ("ppo online", 7)},
    ),
)
def test_interrupted_and_resumed_is_not_interrupted(driven, wholes, setup, at):
    """In the middle of a rollout, at its end, between episodes and in the last run."""
    if setup not in wholes:
        recorder = Kept()
        torch.manual_seed(0)  # as every process of this run begins
        whole, agent = driven(*SETUPS[setup], recorder=recorder, folder="whole")
        agent()
        wholes[setup] = left_by(whole, agent, recorder)
    recorder = Kept()
    torch.manual_seed(0)
    first, agent = driven(*SETUPS[setup], recorder=recorder)
    draw = first.stream.next

    def interrupted_draw():
        if first.clock.step == at - 1:
            first.interrupts.received = signal.SIGTERM
        return draw()

    first.stream.next = interrupted_draw
    with pytest.raises(Interrupted):
        agent()
    assert first.clock.step == at
    checkpoint = open_checkpoint(first.save())
    assert checkpoint.state["listeners"].keys() == {"recorder", "agent"}
    torch.manual_seed(0)
    second, agent = driven(*SETUPS[setup], recorder=recorder)
    torch.rand(3)
    np.random.rand(3)
    second.resume(checkpoint)
    agent()
    (found, told), (wanted, wanted_told) = left_by(second, agent, recorder), wholes[setup]
    assert_same_bits(found, wanted)
    assert told == wanted_told


@pytest.mark.parametrize("setup", ["ppo online", "sac online"])
def test_an_update_of_the_policy_is_not_torn(driven, setup):
    """A signal that arrives while SB3 trains takes effect before the next step."""
    trainer, agent = driven(*SETUPS[setup])
    model = agent.model
    train = model.train

    def interrupted_train(*args, **kwargs):
        trainer.interrupts._handle(signal.SIGTERM, None)
        train(*args, **kwargs)

    model.train = interrupted_train
    with pytest.raises(Interrupted):
        agent()
    assert trainer.clock.step == 4
    assert agent.rollout["num_timesteps"] == 4
    assert not agent.env.transitions


@pytest.mark.parametrize(
    ("overrides", "sentence"),
    [
        ((*PPO, "trainer.max_steps=30"), "trainer.max_steps=30 is not a multiple of method.update_every=4; 28 or 32"),
        ((*PPO, "method.update_every=1"), "batches of method.agent.batch_size=2"),
        ((*PPO, "method.update_every=8", "method.agent.batch_size=3"), "one of 2, 4, 8 would do"),
        ((*PPO, *EPISODIC, "method.episodes=5"), "method.episodes=5 is not a multiple .* 4 or 6 would be"),
        ((*PPO, *EPISODIC, "method.episodes=1"), "method.episodes=1 is not a multiple .* 2 would be"),
        ((*SAC, "trainer.max_steps=6"), "trainer.max_steps=6 is not a multiple of method.agent.train_freq=4; 4 or 8"),
        (
            (*SAC, "method.agent.train_freq=[1,episode]"),
            "train_freq must be a whole number above 0",
        ),
    ],
)
def test_numbers_that_do_not_divide_are_refused(driven, overrides, sentence):
    with pytest.raises(ConfigurationError, match=sentence):
        driven(*overrides)


def test_a_reward_that_is_not_finite_stops_with_its_step(driven):
    trainer, agent = driven(*PPO, "trainer.log_every=8")
    step = trainer.method.step
    trainer.method.step = lambda batch: (
        step(batch) | ({"agent/reward": torch.tensor(torch.nan)} if trainer.clock.step == 2 else {})
    )
    with pytest.raises(NonFiniteError, match="agent/reward became nan at step 3"):
        agent()


def test_runs_leave_a_policy_that_another_run_can_take(run, tmp_path):
    trained = run(*PPO, *EPISODIC, folder="trained")
    summary = json.loads((trained / "summary.json").read_text())
    metrics = summary["metrics"]
    assert summary["status"] == "finished"
    assert metrics["cost/policy_images"] * 5 == metrics["cost/images"] * 4
    assert 0 < metrics["cost/policy_seconds"] < metrics["cost/seconds"]
    assert metrics["cost/policy_network_evaluations"] < metrics["cost/network_evaluations"]
    lines = [json.loads(line) for line in (trained / "metrics.jsonl").read_text().splitlines()]
    rewards = [line["step"] for line in lines if "agent/reward" in line]
    assert rewards == list(range(1, 21))
    last = [line["lambda/value"] for line in lines if "lambda/value" in line and line["step"] > 16]
    assert metrics["mean/lambda/value"] == pytest.approx(np.mean(last)), "of the run that counts"

    taken = run(*PPO, f"method.policy={trained}", "trainer.max_steps=4", folder="taken")
    assert_same_bits(weights_of(taken), weights_of(trained))
    assert not (taken / "policy").exists()


def test_a_policy_for_something_else_is_refused(driven, tmp_path):
    _, agent = driven(*PPO, folder="trained")
    agent()
    for overrides, sentence in (
        ((*SAC,), "trained with method/agent=ppo, this run has sac"),
        ((*PPO, "method.low=0.1"), "trained with method.low=0.01, this run has 0.1"),
        ((*PPO, "method.observe_gradient_norms=false"), "trained with method.observe_gradient_norms=True"),
        (
            (*PPO, "method.state_dependent_std=false"),
            "trained with method.state_dependent_std=True, this run has False",
        ),
        ((*PPO, "method.fresh_state=false"), "trained with method.fresh_state=True, this run has False"),
    ):
        with pytest.raises(ConfigurationError, match=sentence):
            driven(*overrides, f"method.policy={tmp_path / 'trained'}", folder="taken")
    (tmp_path / "trained" / "policy" / "policy.safetensors").write_bytes(b"cut off")
    with pytest.raises(ConfigurationError, match="damaged"):
        driven(*PPO, f"method.policy={tmp_path / 'trained'}", folder="taken")
    with pytest.raises(ConfigurationError, match="is not there"):
        driven(*PPO, "method.policy=nowhere", folder="taken")


def test_a_policy_from_before_the_fresh_state_is_taken_as_what_it_is(driven, tmp_path):
    _, agent = driven(*PPO, *SB3S, folder="trained")
    agent()
    path = tmp_path / "trained" / "policy" / "policy.json"
    content = json.loads(path.read_text())
    older = {key: value for key, value in content.items() if key not in NEWER}
    assert len(older) == len(content) - 2
    path.write_text(json.dumps(older))
    driven(*PPO, *SB3S, f"method.policy={path.parent}", folder="taken")
    with pytest.raises(ConfigurationError, match=r"trained with method.state_dependent_std=False, this run has True"):
        driven(*PPO, f"method.policy={path.parent}", folder="refused")


def test_resuming_a_run_of_another_method_is_refused(driven, composed, digits, tmp_path):
    _, agent = driven(*PPO, folder="agent")
    agent()
    static = build_trainer(composed("method=siss"), digits, tmp_path / "static")
    with pytest.raises(ConfigurationError, match="another method"):
        static.resume(open_checkpoint(tmp_path / "agent"))
