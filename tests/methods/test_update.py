"""Optimizers and schedules of other libraries: what works is accepted, what cannot is refused before any training."""

import copy
import inspect
from functools import partial

import diffusers.optimization
import pytest
import torch
from hydra.utils import instantiate

from unlearn_runner.errors import ConfigurationError
from unlearn_runner.methods.method import Update
from unlearn_runner.options import CANNOT_STEP
from unlearn_runner.validation import checked

STEPS = 250  # trainer.max_steps

# The arguments of their documentation
OPTIMIZERS = {
    "Adadelta": {"lr": 1.0, "rho": 0.9, "eps": 1e-6},
    "Adafactor": {"lr": 0.01, "beta2_decay": -0.8, "eps": [None, 1e-3], "d": 1.0},
    "Adagrad": {"lr": 0.01, "lr_decay": 0, "initial_accumulator_value": 0, "eps": 1e-10},
    "Adam": {"lr": 1e-3, "betas": [0.9, 0.999], "eps": 1e-8, "amsgrad": True, "foreach": True},
    "AdamW": {"lr": 1e-3, "betas": [0.9, 0.999], "eps": 1e-8, "weight_decay": 1e-2, "fused": True},
    "Adamax": {"lr": 2e-3, "betas": [0.9, 0.999], "eps": 1e-8},
    "ASGD": {"lr": 0.01, "lambd": 1e-4, "alpha": 0.75, "t0": 1e6},
    "Muon": {"lr": 1e-3, "weight_decay": 0.1, "momentum": 0.95, "nesterov": True, "eps": 1e-7, "ns_steps": 5,
             "ns_coefficients": [3.4445, -4.775, 2.0315], "adjust_lr_fn": "match_rms_adamw"},
    "NAdam": {"lr": 2e-3, "betas": [0.9, 0.999], "momentum_decay": 4e-3, "decoupled_weight_decay": True},
    "RAdam": {"lr": 1e-3, "betas": [0.9, 0.999], "eps": 1e-8},
    "RMSprop": {"lr": 0.01, "alpha": 0.99, "eps": 1e-8, "momentum": 0.9, "centered": True},
    "Rprop": {"lr": 0.01, "etas": [0.5, 1.2], "step_sizes": [1e-6, 50]},
    "SGD": {"lr": 0.1, "momentum": 0.9, "dampening": 0, "weight_decay": 1e-4, "nesterov": True},
}  # fmt: skip
TORCH_SCHEDULES = {
    "ConstantLR": {"factor": 0.5, "total_iters": 4},
    "CosineAnnealingLR": {"T_max": STEPS, "eta_min": 0},
    "CosineAnnealingWarmRestarts": {"T_0": 20, "T_mult": 2},
    "CyclicLR": {"base_lr": 0.01, "max_lr": [0.1], "step_size_up": 10, "mode": "exp_range", "gamma": 0.99},
    "ExponentialLR": {"gamma": 1.01},
    "LinearLR": {"start_factor": 0.05, "end_factor": 1.0, "total_iters": 4},
    "MultiStepLR": {"milestones": [30, 80], "gamma": 0.1},
    "OneCycleLR": {"max_lr": 0.01, "total_steps": STEPS, "anneal_strategy": "linear"},
    "PolynomialLR": {"total_iters": 4, "power": 0.5},
    "StepLR": {"step_size": 30, "gamma": 0.1, "last_epoch": -1},
}
NEEDS_CODE = {"LambdaLR", "MultiplicativeLR"}  # a function, which no plain value is
ENDS = {"num_warmup_steps": 0, "num_training_steps": STEPS}
DIFFUSERS_SCHEDULES = {
    "get_constant_schedule": {"last_epoch": -1},
    "get_constant_schedule_with_warmup": {"num_warmup_steps": 10},
    "get_cosine_schedule_with_warmup": ENDS | {"num_cycles": 0.5},
    "get_cosine_with_hard_restarts_schedule_with_warmup": ENDS | {"num_cycles": 2},
    "get_linear_schedule_with_warmup": ENDS | {"f_min": 0.0, "f_max": 1.0},
    "get_piecewise_constant_schedule": {"step_rules": "1:10,0.1:20,0.01:30,0.005"},
    "get_polynomial_decay_schedule_with_warmup": ENDS | {"lr_end": 1e-7, "power": 2},
    "get_scheduler": ENDS | {"name": "cosine_with_restarts", "num_cycles": 1},
}
AGENTS = [
    ("PPO", {"learning_rate": 3e-4, "n_epochs": 2, "gae_lambda": 0.95, "clip_range": 0.2, "clip_range_vf": None,
             "ent_coef": 0.0, "vf_coef": 0.5, "max_grad_norm": 0.5, "target_kl": 0.1, "normalize_advantage": True,
             "policy_kwargs": {"net_arch": {"pi": [8], "vf": [8, 8]}, "ortho_init": False, "log_std_init": -1}}),
    ("SAC", {"learning_rate": 3e-4, "tau": 0.005, "gamma": 0.99, "ent_coef": "auto_0.1", "target_entropy": "auto",
             "target_update_interval": 1, "gradient_steps": -1, "train_freq": 1, "learning_starts": 2,
             "policy_kwargs": {"net_arch": {"pi": [8], "qf": [8, 8]}}}),
]  # fmt: skip
OPTIMIZER_CASES = [*OPTIMIZERS.items(), ("Adafactor", {"eps": [1e-30, 1e-3]})]


def group(target: str, options: dict) -> dict:
    return {"_target_": target, "_partial_": True, **options}


@pytest.fixture(scope="module")
def composed_once() -> dict:
    return {}


@pytest.fixture
def cfg(composed, composed_once):
    if not composed_once:  # half a second each
        composed_once.update(composed("method=siss", debug=False))
    return copy.deepcopy(composed_once)


@pytest.fixture
def accepted(cfg):
    """`accepted(optimizer=..., lr_schedule=...)`: the update of a configuration with these, checked."""

    def check(**parts: dict) -> dict:
        cfg["method"]["update"] |= parts
        return checked(cfg)["method"]["update"]

    return check


def two_steps(update: dict) -> None:
    model = torch.nn.Linear(3, 2, bias=False)  # Muon takes matrices only
    before = model.weight.detach().clone()
    made = instantiate(update, _convert_="all")(model)
    for _ in range(2):
        made.apply(torch.ones(6))
    assert model.weight.isfinite().all()
    assert not torch.equal(model.weight, before)


@pytest.mark.parametrize(("name", "options"), OPTIMIZER_CASES, ids=lambda part: part if isinstance(part, str) else "")
def test_optimizers_of_torch(accepted, name, options):
    two_steps(accepted(optimizer=group(f"torch.optim.{name}", options), lr_schedule=None))


@pytest.mark.parametrize(
    ("name", "options"),
    [(f"torch.optim.lr_scheduler.{name}", options) for name, options in TORCH_SCHEDULES.items()]
    + [(f"diffusers.optimization.{name}", options) for name, options in DIFFUSERS_SCHEDULES.items()],
    ids=lambda part: part if isinstance(part, str) else "",
)
def test_schedules(accepted, name, options):
    optimizer = group("torch.optim.SGD", {"lr": 0.1, "momentum": 0.9})
    two_steps(accepted(optimizer=optimizer, lr_schedule=group(name, options)))


def test_every_optimizer_and_schedule_is_in_a_table():
    optim, lr_scheduler = torch.optim, torch.optim.lr_scheduler
    refused = {target.rpartition(".")[2] for target in CANNOT_STEP}
    assert {name for name in optim.__all__ if inspect.isclass(getattr(optim, name))} == {*OPTIMIZERS} | (
        refused & set(optim.__all__)
    )
    assert set(lr_scheduler.__all__) == {*TORCH_SCHEDULES} | NEEDS_CODE | (refused & set(lr_scheduler.__all__))
    assert {name for name in vars(diffusers.optimization) if name.startswith("get_")} == {*DIFFUSERS_SCHEDULES}


@pytest.mark.parametrize(("name", "options"), AGENTS, ids=lambda part: part if isinstance(part, str) else "")
def test_agents_of_stable_baselines3(composed, name, options):
    gymnasium = pytest.importorskip("gymnasium")
    cfg = composed("method=rl_lambda", f"method/agent={name.lower()}", debug=False)
    cfg["method"]["agent"] |= options
    agent = checked(cfg)["method"]["agent"]
    sizes = {"n_steps": 25} if name == "PPO" else {"buffer_size": 100}
    instantiate(agent, _convert_="all")(env=gymnasium.make("Pendulum-v1"), device="cpu", **sizes).learn(30)


@pytest.mark.parametrize(
    ("agent", "options", "sentence"),
    [
        ("ppo", {"ent_coef": "auto"}, "ent_coef must be a number of at least 0, got 'auto'"),
        ("ppo", {"gamma": 1.5}, r"gamma must be a number in \[0, 1\], got 1.5"),
        ("sac", {"ent_coef": "auto_x"}, "at least 0 or a text that is auto, or auto_<its first value>, got 'auto_x'"),
        ("sac", {"train_freq": [1, "episode"]}, r"train_freq must be a whole number above 0, got \[1, 'episode'\]"),
        ("sac", {"policy_kwargs": {"net_arch": {"pi": [0]}}}, "net_arch.pi must be a list of whole numbers above 0"),
    ],
)
def test_agents_that_cannot_learn(composed, agent, options, sentence):
    cfg = composed("method=rl_lambda", f"method/agent={agent}", debug=False)
    cfg["method"]["agent"] |= options
    with pytest.raises(ConfigurationError, match=rf"^method\.agent\..*{sentence}"):
        checked(cfg)


SGD, TORCH, DIFFUSERS = "torch.optim.SGD", "torch.optim.lr_scheduler.", "diffusers.optimization."
ADAMW = ("torch.optim.AdamW", {"lr": 1e-3})


@pytest.mark.parametrize(
    ("part", "target", "options", "sentence"),
    [
        # what cannot make a step of this runner
        ("optimizer", "torch.optim.LBFGS", {"lr": 1}, "._target_=torch.optim.LBFGS cannot be used: it computes the"),
        ("optimizer", "torch.optim.SparseAdam", {}, "cannot be used: it takes sparse gradients only"),
        ("optimizer", "torch.optim.Optimizer", {}, "cannot be used: it is what others derive from"),
        ("lr_schedule", f"{TORCH}ReduceLROnPlateau", {}, "cannot be used: it asks for a score at every step"),
        ("lr_schedule", f"{TORCH}SequentialLR", {}, "cannot be used: it is made of other schedules"),
        ("optimizer", ADAMW[0], {"differentiable": True}, ".differentiable must be false, got true"),
        # ranges
        ("optimizer", ADAMW[0], {"eps": [None, 1e-3]}, r".eps must be a number above 0, got \[null, 0.001\]"),
        ("optimizer", "torch.optim.Adafactor", {"eps": [-1, 1e-3]}, r".eps must be a list of .*, got \[-1, 0.001\]"),
        ("lr_schedule", f"{TORCH}CosineAnnealingLR", {"T_max": 0}, ".T_max must be a whole number above 0, got 0"),
        ("lr_schedule", f"{TORCH}StepLR", {"step_size": 0}, ".step_size must be a whole number above 0, got 0"),
        ("lr_schedule", f"{TORCH}CyclicLR", {"step_size_up": 0}, ".step_size_up must be a whole number above 0"),
        ("lr_schedule", f"{TORCH}ExponentialLR", {"gamma": -1}, ".gamma must be a number of at least 0, got -1"),
        ("lr_schedule", f"{DIFFUSERS}get_scheduler", {"num_cycles": 0.5}, ".num_cycles must be a whole number above 0"),
        ("lr_schedule", f"{DIFFUSERS}get_constant_schedule", {"last_epoch": 5}, ".last_epoch must be -1, got 5"),
        # the length of a run
        ("lr_schedule", f"{TORCH}OneCycleLR", {"max_lr": 0.1, "total_steps": 2}, ".total_steps must be at least 250, "),
        ("lr_schedule", f"{TORCH}OneCycleLR", {"max_lr": 0.1, "epochs": 2, "steps_per_epoch": 100}, "at least 250, "),
        (
            "lr_schedule", f"{DIFFUSERS}get_scheduler",
            {"name": "polynomial", "num_warmup_steps": 9, "num_training_steps": 9}, ".num_warmup_steps of a polynomial",
        ),
    ],
)  # fmt: skip
def test_what_plain_values_show(accepted, part, target, options, sentence):
    with pytest.raises(ConfigurationError, match=rf"^method\.update\.{part}.*{sentence}"):
        accepted(**{part: group(target, options)})


@pytest.mark.parametrize(
    ("overrides", "least"),
    [
        (("method=siss",), {"update": 250}),
        (("method=sfd",), {"update": 250, "fake_update": 250}),
        (
            ("method=hybrid", "method.variant=siss_sfd_student", "method.distil_share=0.2"),
            {"update": 200, "generator_update": 50, "fake_update": 50},
        ),
        (
            ("model=sd_tiny", "dataset=sd_concepts", "method=critic_guided", "method.critic_warmup=10"),
            {"update": 280, "critic_update": 640},  # of 80 rounds
        ),
    ],
)
def test_a_schedule_lasts_for_the_steps_of_its_optimizer(composed, overrides, least):
    cfg = composed(*overrides, debug=False)
    for name, steps in least.items():
        for total in (steps - 1, steps):
            found = copy.deepcopy(cfg)
            found["method"][name]["lr_schedule"] = group(f"{TORCH}OneCycleLR", {"max_lr": 0.1, "total_steps": total})
            if total == steps:
                checked(found)
                continue
            with pytest.raises(ConfigurationError, match=rf"^method.{name}.lr_schedule.total_steps .* {steps}, "):
                checked(found)


def test_the_schedule_of_a_base_lasts(cfg):
    steps = cfg["model"]["pretraining"]["max_steps"]
    options = {"max_lr": 0.1, "total_steps": steps - 1}
    cfg["model"]["pretraining"]["update"]["lr_schedule"] = group(f"{TORCH}OneCycleLR", options)
    with pytest.raises(ConfigurationError, match=rf"^model.pretraining.update.lr_schedule.total_steps .* {steps}, "):
        checked(cfg)


@pytest.mark.parametrize(
    ("optimizer", "lr_schedule", "sentence"),
    [
        ((SGD, {"nesterov": True}), None, r"the optimizer SGD cannot be made .*\(Nesterov momentum requires"),
        (("torch.optim.Muon", {}), None, r"the optimizer Muon cannot be made .*\(Muon only supports 2D"),
        ((ADAMW[0], {"fused": True, "foreach": True}), None, r"the optimizer AdamW cannot be made .*\(`fused` and"),
        ((ADAMW[0], {"capturable": True}), None, r"the optimizer AdamW cannot take a step .*\(If capturable=True"),
        (ADAMW, ("get_scheduler", {"name": "piecewise_constant"}), r"get_scheduler cannot be made .*'split'\)"),
        (ADAMW, ("get_scheduler", {"name": "linear", "num_warmup_steps": 0, "num_training_steps": None}),
         r"the learning rate schedule get_scheduler cannot be made .*requires `num_training_steps`"),
        (ADAMW, (f"{TORCH}LambdaLR", {}), r"the learning rate schedule LambdaLR cannot be made .*'lr_lambda'"),
        (ADAMW, (f"{TORCH}OneCycleLR", {"max_lr": 0.1}), r"OneCycleLR cannot be made .*You must define either total"),
        (ADAMW, ("torch.optim.SGD", {}), r"the learning rate schedule SGD cannot be made"),
        (("torch.optim.lbfgs.LBFGS", {}), None, r"the optimizer LBFGS cannot take a step .*'closure'"),
    ],
)  # fmt: skip
def test_what_the_library_refuses(accepted, optimizer, lr_schedule, sentence):
    """One sentence with its own words, when a method is made and nothing has been trained yet."""
    if lr_schedule is not None:
        target, options = lr_schedule
        lr_schedule = group(target if "." in target else DIFFUSERS + target, options)
    update = accepted(optimizer=group(*optimizer), lr_schedule=lr_schedule)
    with pytest.raises(ConfigurationError, match=sentence) as refused:
        instantiate(update, _convert_="all")(torch.nn.Linear(3, 2))
    assert "\n" not in str(refused.value)


def test_trying_a_step_leaves_weights_and_rate_alone():
    model = torch.nn.Linear(3, 2)
    before = copy.deepcopy(model.state_dict())
    state = torch.get_rng_state()
    schedule = partial(torch.optim.lr_scheduler.StepLR, step_size=1)
    made = Update(model, partial(torch.optim.AdamW, lr=0.1), lr_schedule=schedule)
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert all(weight.grad is None for weight in model.parameters())
    assert torch.equal(torch.get_rng_state(), state)
    assert not made.optimizer.state
    assert made.lr_schedule.get_last_lr() == [0.1]


def test_a_schedule_that_ends_in_the_run_says_so():
    """As where a longer run goes on from a checkpoint, whose schedule keeps its length."""
    schedule = partial(torch.optim.lr_scheduler.OneCycleLR, max_lr=0.1, total_steps=2)
    made = Update(torch.nn.Linear(1, 1, bias=False), partial(torch.optim.AdamW, lr=0.1), lr_schedule=schedule)
    for _ in range(2):
        made.apply(torch.ones(1))
    with pytest.raises(
        ConfigurationError, match=r"schedule OneCycleLR cannot take another step \(Tried to step 3 times"
    ):
        made.apply(torch.ones(1))
