"""The hybrids: their mixture against brute force, their weights against expectations, and what each of them learns."""

import math
from functools import partial

import pytest
import torch
from test_sfd import LABELS, NOTHING, adam, flat, images
from toy import drawn_gaussian, gaussian_model

from unlearn_runner.errors import ConfigurationError
from unlearn_runner.methods.distillation.hybrid import hybrid
from unlearn_runner.methods.distillation.multi_class import mixture_costs, mixture_guess, optimal_mixture
from unlearn_runner.methods.distillation.networks import NoiseRange, generator_loss
from unlearn_runner.methods.distillation.overrides import Fixed
from unlearn_runner.methods.distillation.student import student_losses
from unlearn_runner.methods.method import Setting
from unlearn_runner.methods.siss.lambda_controllers import ClosedForm, Inferred
from unlearn_runner.models.model import predict_x0
from unlearn_runner.spec import Labels
from unlearn_runner.types import make_generator

F64 = torch.float64


def build(variant, model, labels=LABELS, **settings):
    defaults = {
        "update": adam(1e-3), "fake_update": adam(1e-3), "generator_update": adam(1e-3),
        "override": partial(Fixed, label=1), "batch_size": 8, "max_steps": 4, "noise": NoiseRange(), "alpha": 1.2,
        "forget_samples": 1.0, "forget_weight": 1.0, "beta": 20.0,
        "prior": None, "target": "drawn", "num_draws": 1, "eta": 1.0, "distil_share": 0.5, "lambd": 0.3,
    }  # fmt: skip
    return hybrid(Setting(model, make_generator(0, "m"), labels), variant, **(defaults | settings))


def inferred(objective="variance"):
    return Inferred(objective, partial(torch.optim.Adam, lr=0.05), beta=0.1, prior_mean=-1.0)


def test_costs_by_hand():
    # two classes, one picture of two pixels: squared distances 1 + 4 and 0 + 1; omegas (1 + 2) / 2 and (2 + 0) / 2
    x0_teachers, x0_fake, x0 = images([2.0, 3.0], [3.0, 1.0])[None], images([3.0, 1.0]), images([1.0, 1.0])
    x0_fake = x0_fake - images([0.0, 0.0])
    assert mixture_costs(x0_teachers, x0_fake, x0)[0].tolist() == pytest.approx([5 / 1.5, 0.0])
    assert mixture_costs(x0_teachers, x0_fake + 1, x0)[0].tolist() == pytest.approx([(4 + 1) / 1.5, 2 / 1.0])


@pytest.mark.parametrize("beta", [0.3, 1.0, 20.0])
def test_the_mixture_is_the_brute_force_optimum(beta):
    """Over all mixtures of three classes on a fine grid: none is better, and the best of them is where it says."""
    costs = torch.tensor([[0.7, 0.2, 1.5], [0.1, 0.1, 0.4]], dtype=F64)
    prior = torch.tensor([0.5, 0.2, 0.3], dtype=F64)
    mixture = optimal_mixture(costs, prior, beta)
    torch.testing.assert_close(mixture.sum(1), torch.ones(2, dtype=F64))
    steps = torch.arange(1, 400, dtype=F64) / 400
    a, b = torch.meshgrid(steps, steps, indexing="ij")
    grid = torch.stack([a, b, 1 - a - b], -1).view(-1, 3)
    grid = grid[grid[:, 2] > 1e-9]

    def objective(pi, d):
        return (pi * d).sum(-1) + beta * (pi * (pi / prior).log()).sum(-1)

    for pi, d in zip(mixture, costs, strict=True):
        values = objective(grid, d)
        assert objective(pi, d) <= values.min() + 1e-12
        assert (grid[values.argmin()] - pi).abs().max() < 1 / 400


def test_limits_of_beta():
    costs, prior = torch.tensor([[3.0, 1.0, 2.0]]), torch.tensor([0.5, 0.2, 0.3])
    torch.testing.assert_close(optimal_mixture(costs, prior, 1e6)[0], prior, rtol=1e-4, atol=0)
    torch.testing.assert_close(optimal_mixture(costs, prior, 1e-3)[0], torch.tensor([0.0, 1.0, 0.0]))
    assert torch.isfinite(optimal_mixture(costs * 1e30, prior, 1e-3)).all()


def test_mixture_guess_is_the_score_of_the_mixture_itself():
    """x0 from the gradient of log sum_r pi_r p(x_t|c_r) by Tweedie's formula; the average of the guesses is another."""
    means, stds = torch.tensor([-1.0, 1.0], dtype=F64), torch.tensor([0.3, 0.5], dtype=F64)
    pi = torch.tensor([0.7, 0.3], dtype=F64)
    abar = torch.tensor(0.6, dtype=F64)
    gamma, sigma = abar.sqrt(), (1 - abar).sqrt()
    x_t = torch.randn(6, 1, 1, 2, generator=torch.Generator().manual_seed(0), dtype=F64).requires_grad_()
    densities = torch.stack(
        [
            torch.distributions.Normal(gamma * mean, (abar * std**2 + sigma**2).sqrt()).log_prob(x_t).flatten(1).sum(1)
            for mean, std in zip(means, stds, strict=True)
        ],
        1,
    )
    (score,) = torch.autograd.grad((densities + pi.log()).logsumexp(1).sum(), x_t)
    wanted = (x_t + sigma**2 * score) / gamma
    guesses = torch.stack(
        [
            mean + gamma * std**2 / (abar * std**2 + sigma**2) * (x_t - gamma * mean)
            for mean, std in zip(means, stds, strict=True)
        ],
        1,
    )
    constant = 123.0  # shared by all classes
    found = mixture_guess(guesses, constant - densities, pi.expand(6, 2))
    torch.testing.assert_close(found, wanted, rtol=1e-9, atol=1e-9)
    assert ((guesses * pi[:, None, None, None]).sum(1) - wanted).abs().max() > 0.1


def test_one_drawn_class_is_the_whole_sum_on_average():
    """E over the drawn r of l(f_phi(c_r), f_psi(c_f)) = sum_r pi_r l, at one picture."""
    method = build("multi_class", gaussian_model([-1.0, 1.0, 0.0], [0.6, 0.8, 0.7]), beta=0.1)
    trio, g, many = method.trio, make_generator(1, "t"), 20_000
    trio.begin()
    noised = trio.draw(torch.tensor([2]), torch.tensor([500]), g)
    forget = torch.tensor([2])
    mixture, told = method._mixture(noised, forget)
    assert told["mixture/kl"] > 0.01
    with torch.no_grad():
        losses = torch.cat([trio.generator_losses(noised, torch.tensor([r]), forget, 1.2) for r in LABELS.retain])
        repeated = type(noised)(*(part.expand(many, *part.shape[1:]) for part in noised))
        found = method._forget_losses(repeated, forget.expand(many), mixture.expand(many, -1))
    error = found.std() / math.sqrt(many)
    assert abs(found.mean() - (mixture[0] * losses).sum()) < 4 * error
    assert abs(losses[0] - losses[1]) > 20 * error, "another mixture would be noticed"


def test_mixture_score_asks_the_posterior(monkeypatch):
    """Its loss is the generator's with E[x0|x_t] of the batch's mean mixture; the costs are those of class_costs."""
    method = build("multi_class", gaussian_model([-1.0, 1.0, 0.0], [0.6, 0.8, 0.7]), target="mixture_score", beta=2.0)
    trio = method.trio
    trio.begin()
    forget, timesteps = torch.full((3,), 2), torch.tensor([200, 500, 700])
    noised = trio.draw(forget, timesteps, make_generator(1, "t"))
    mixture = torch.tensor([[0.9, 0.1], [0.5, 0.5], [0.1, 0.9]])
    costs = torch.tensor([[1.0, 2.0], [0.5, 0.1], [3.0, 3.0]])
    monkeypatch.setattr("unlearn_runner.methods.distillation.multi_class.class_costs", lambda *_: costs)
    found = method._forget_losses(noised, forget, mixture)
    posterior = torch.softmax(torch.tensor([0.5, 0.5]).log() - costs, 1)
    target = sum(
        posterior[:, r, None, None, None]
        * predict_x0(trio.teacher, noised.x_t, timesteps, torch.full((3,), LABELS.retain[r]))
        for r in range(2)
    )
    wanted = generator_loss(target, predict_x0(trio.fake, noised.x_t, timesteps, forget), noised.x0, 1.2)
    torch.testing.assert_close(found, wanted)


@pytest.mark.parametrize(
    ("variant", "settings"),
    [
        ("multi_class", {"beta": 3.0}),
        ("siss_sfd_labels", {"lambd": ClosedForm(initial=0.3)}),
        ("siss_sfd_labels", {"lambd": 0.5}),
    ],
    ids=["multi_class", "labels closed_form", "labels constant"],
)
@pytest.mark.slow
def test_known_gaussians_converge(variant, settings):
    """The nearest of the kept classes, or the override: N(1, .8); the forgotten one begins at N(.5, .7)."""
    method = build(
        variant, gaussian_model([-1.0, 1.0, 0.5], [0.6, 0.8, 0.7], side=4), update=adam(1e-2, ema_decay=0.99),
        fake_update=adam(5e-2), batch_size=64, **settings,
    )  # fmt: skip
    for _ in range(600):
        method.step(NOTHING)
    for label, (mean, std) in enumerate([(-1.0, 0.6), (1.0, 0.8), (1.0, 0.8)]):
        found = drawn_gaussian(method.model, label)
        assert found[0] == pytest.approx(mean, abs=0.08), label
        assert found[1] == pytest.approx(std, abs=0.08), label


@pytest.mark.slow
def test_a_student_answers_as_the_teacher_does_of_another_class():
    method = build(
        "siss_sfd_student", gaussian_model([-1.0, 1.0, 0.0], [0.6, 0.8, 0.7]), update=adam(2e-2, ema_decay=0.95),
        generator_update=adam(1e-2, ema_decay=0.9), fake_update=adam(5e-2), batch_size=64, max_steps=600,
    )  # fmt: skip
    before = {}
    for step in range(600):
        if step == 300:
            assert torch.equal(flat(method.student), flat(method.trio.teacher)), "it waits for the generator"
            averaged = flat(method.generator_update.model)
            assert drawn_gaussian(method.trio.generator, 2)[0] == pytest.approx(0.0, abs=0.08), (
                "nothing is forgotten yet"
            )
            before = {name: flat(getattr(method.trio, name)) for name in ("teacher", "fake")} | {"generator": averaged}
            assert not torch.equal(averaged, flat(method.trio.generator))
        method.step(NOTHING)
    for name, old in before.items():
        assert torch.equal(flat(getattr(method.trio, name)), old), f"{name} is frozen"
    assert method.model is not method.trio.generator
    unet = method.model.backbone.unet
    assert unet.means.tolist() == pytest.approx([-1.0, 1.0, 1.0], abs=0.1)
    assert unet.log_stds.exp().tolist() == pytest.approx([0.6, 0.8, 0.8], abs=0.1)


def test_student_losses_by_hand():
    teacher = images([1.0, 2.0]).requires_grad_()
    losses = student_losses(images([0.0, 0.0]).requires_grad_(), teacher, 0.5)
    assert losses.tolist() == [2.5]
    losses.sum().backward()
    assert teacher.grad is None


@pytest.mark.parametrize("forget_weight", [0.2, 1.0])
def test_lambda_does_not_move_the_mean_of_mixed_labels(forget_weight):
    """Both terms and the fake score's loss, for three shares of forget labels in a large batch."""
    found = {}
    for lambd in (0.2, 0.5, 0.9):
        method = build(
            "siss_sfd_labels", gaussian_model([-1.0, 1.0, 0.0], [0.6, 0.8, 0.7]), lambd=lambd, batch_size=40_000,
            forget_weight=forget_weight, update=adam(0.0), fake_update=adam(0.0),
        )  # fmt: skip
        method.trio.begin()
        method.trio.fake.backbone.unet.means.data += 0.4
        found[lambd] = {key: value.item() for key, value in method.step(NOTHING).items()}
    for key in ("loss/fake", "loss/retain", "loss/forget", "grad_norm/forget"):
        wanted = found[0.5][key]
        assert abs(wanted) > 1e-3
        for lambd in (0.2, 0.9):
            assert found[lambd][key] == pytest.approx(wanted, rel=0.06), (key, lambd)


@pytest.mark.parametrize("variant", ["siss_sfd_labels", "siss_sfd_student"])
@pytest.mark.parametrize("lambd", [0.0, 1.0])
def test_the_ends_of_lambda(tiny_network, variant, lambd):
    method = build(variant, tiny_network(), Labels((0, 1), (7,)), lambd=lambd, distil_share=0.25)
    for _ in range(2):
        metrics = method.step(NOTHING)
    assert all(torch.isfinite(value) for value in metrics.values())
    mine, other = ("retain", "forget") if lambd == 0 else ("forget", "retain")
    assert metrics[f"grad_norm/{mine}"] > 0
    assert metrics[f"grad_norm/{other}"] == 0


@pytest.mark.parametrize("variant", ["siss_sfd_labels", "siss_sfd_student"])
@pytest.mark.parametrize(
    "make", [inferred, partial(ClosedForm, initial=0.3, least_samples=0)], ids=["variance", "closed_form"]
)
def test_controllers_learn_lambda(tiny_network, variant, make):
    controller = make()
    method = build(variant, tiny_network(), Labels((0, 1), (7,)), lambd=controller, distil_share=0.25, batch_size=16)
    steps = [method.step(NOTHING) for _ in range(7)]  # in the first of them a student only distils
    values = [metrics["lambda/value"].item() for metrics in steps if "lambda/value" in metrics]
    assert len({round(value, 6) for value in values}) > 2
    assert all(0 < value < 1 for value in values)


@pytest.mark.parametrize("variant", ["multi_class", "siss_sfd_labels", "siss_sfd_student"])
def test_several_forgotten_labels(tiny_network, variant):
    method = build(variant, tiny_network(), Labels((0, 1), (3, 7)), distil_share=0.25, batch_size=16, lambd=0.5)
    logged = [method.step(NOTHING) for _ in range(3)]
    assert all(torch.isfinite(value) for metrics in logged for value in metrics.values())
    assert any(metrics.get("loss/forget", torch.zeros(())).item() for metrics in logged)
    shares = {key for metrics in logged for key in metrics if key.startswith("mixture/share/")}
    assert shares == ({"mixture/share/0", "mixture/share/1"} if variant == "multi_class" else set())


@pytest.mark.parametrize("objective", ["pathwise", "blend"])
def test_objectives_of_an_ascended_term_are_refused(tiny_network, objective):
    for variant in ("siss_sfd_labels", "siss_sfd_student"):
        with pytest.raises(ConfigurationError, match=f"method/lambd={objective} speaks of a forget loss"):
            build(variant, tiny_network(), lambd=inferred(objective))


@pytest.mark.parametrize(
    ("variant", "settings"),
    [
        ("multi_class", {"prior": [0.5, 0.4]}),
        ("multi_class", {"prior": [1.0]}),
        ("siss_sfd_student", {"override": partial(Fixed, label=2)}),
    ],
)
def test_refuses(tiny_network, variant, settings):
    with pytest.raises(ConfigurationError, match=r"method\.[a-z_.]+ must"):
        build(variant, tiny_network(), **settings)
