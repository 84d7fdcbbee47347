"""Score Forgetting Distillation: its losses, who learns from them, and that it reads no image."""

import math
from functools import partial

import pytest
import torch
from conftest import assert_same_bits
from toy import drawn_gaussian, gaussian_flow, gaussian_model
from trainers import build_trainer, flat_state

from unlearn_runner.data.forget_retain import ForgetRetain, LabelledImages
from unlearn_runner.errors import ConfigurationError, NonFiniteError
from unlearn_runner.methods.distillation.networks import (
    DistillationNetworks,
    LabelSampler,
    NoiseRange,
    fake_score_loss,
    generator_loss,
)
from unlearn_runner.methods.distillation.overrides import (
    Classifier,
    Fixed,
    Override,
    OverrideBatch,
    RandomOther,
    class_costs,
)
from unlearn_runner.methods.distillation.sfd import SFD, two_stage_rate
from unlearn_runner.methods.method import Setting, Update
from unlearn_runner.models.model import predict_eps, predict_x0
from unlearn_runner.spec import Labels
from unlearn_runner.training.checkpoint import open_checkpoint
from unlearn_runner.types import Batch, make_generator

F64 = torch.float64
NOTHING = Batch(None, None, None, None, 0.1)
LABELS = Labels(retain=(0, 1), forget=(2,))


@pytest.fixture
def double():
    """Everything in float64, for what is compared to many digits."""
    torch.set_default_dtype(F64)
    yield
    torch.set_default_dtype(torch.float32)


def adam(lr, **settings):
    return lambda model: Update(model, lambda weights: torch.optim.Adam(weights, lr, (0.0, 0.999)), **settings)


USUAL = adam(1e-3)


def sfd(model, labels=LABELS, update=USUAL, fake_update=USUAL, override=RandomOther, **settings):
    settings = {"batch_size": 8, "max_steps": 4, "noise": NoiseRange(), **settings}
    return SFD(Setting(model, make_generator(0, "m"), labels), update, fake_update, override, **settings)


def flat(network) -> torch.Tensor:
    return torch.cat([weight.detach().flatten() for weight in network.parameters()])


def images(*rows) -> torch.Tensor:
    return torch.tensor(rows, dtype=F64)[:, None, None, :]


def test_losses_by_hand():
    eps_pred, eps = images([1.0, 3.0], [0.0, 0.0]), images([0.0, 1.0], [2.0, 0.0])
    assert fake_score_loss(eps_pred, eps).tolist() == [5.0, 4.0]
    # D = (1, -1), f_phi - x = (2, 0), omega = 1: 1 (2 - 1.2) + (-1)(0 + 1.2)
    x0_teacher, x0_fake, x0 = images([3.0, 1.0]), images([2.0, 2.0]), images([1.0, 1.0])
    assert generator_loss(x0_teacher, x0_fake, x0, 1.2).item() == pytest.approx(0.8 - 1.2)
    assert generator_loss(x0_teacher, x0_fake, x0, 1.0).item() == pytest.approx(1 - 1)
    # omega is a mean over pixels, for each image its own, and never zero
    both = generator_loss(
        torch.cat([x0_teacher, 2 * x0_teacher]), torch.cat([x0_fake, 2 * x0_fake]), torch.cat([x0, 2 * x0]), 1.2
    )
    assert both.tolist() == pytest.approx([-0.4, -0.8])
    assert generator_loss(x0, x0 + 1, x0, 1.2).item() == pytest.approx(-1.2 * 2 / 1e-5)


def test_generator_loss_is_the_formula_with_its_weight_held_fixed():
    x0_teacher, x0_fake, x0 = torch.randn(3, 5, 2, 3, 3, generator=torch.Generator().manual_seed(0), dtype=F64)
    x0.requires_grad_()
    (gradient,) = torch.autograd.grad(generator_loss(x0_teacher, x0_fake, x0, 1.2).sum(), x0)
    for row in range(5):
        t, p, x = x0_teacher[row].flatten(), x0_fake[row].flatten(), x0[row].detach().flatten()
        omega = sum(abs(a - b) for a, b in zip(t.tolist(), x.tolist(), strict=True)) / len(x)
        value = sum(
            (a - b) * ((a - c) - 1.2 * (a - b)) for a, b, c in zip(*(v.tolist() for v in (t, p, x)), strict=True)
        )
        assert generator_loss(x0_teacher, x0_fake, x0, 1.2)[row].item() == pytest.approx(value / omega, rel=1e-12)
        torch.testing.assert_close(gradient[row].flatten(), -(t - p) / omega, rtol=1e-12, atol=0)


def test_generators_gradient_flows_through_both_frozen_scores(tiny_network, double):
    """Against central differences of the formula, omega held at its value."""
    network = tiny_network().double()
    network.path.schedule.alphas_cumprod = network.path.schedule.alphas_cumprod.double()
    trio = DistillationNetworks(network, NoiseRange())
    trio.begin()
    for weight in (*trio.fake.parameters(), *trio.generator.parameters()):
        weight.data += 0.05 * torch.randn(weight.shape, generator=torch.Generator().manual_seed(1))
    labels, timesteps = torch.tensor([0, 1, 7]), torch.tensor([100, 400, 700])

    def parts():
        noised = trio.draw(labels, timesteps, make_generator(0, "m"))
        targets = torch.tensor([0, 1, 3])
        return (
            noised,
            predict_x0(trio.teacher, noised.x_t, timesteps, targets),
            predict_x0(trio.fake, noised.x_t, timesteps, labels),
        )

    noised, x0_teacher, x0_fake = parts()
    weights = list(trio.generator.parameters())
    gradients = torch.autograd.grad(generator_loss(x0_teacher, x0_fake, noised.x0, 1.2).sum(), weights)
    omega = (x0_teacher - noised.x0).detach().abs().flatten(1).mean(1)

    def formula():
        with torch.no_grad():
            noised, x0_teacher, x0_fake = parts()
            d = x0_teacher - x0_fake
            return ((d * (x0_teacher - noised.x0 - 1.2 * d)).flatten(1).sum(1) / omega).sum().item()

    for weight, gradient in list(zip(weights, gradients, strict=True))[::7]:
        index = gradient.abs().flatten().argmax()
        values = []
        for step in (1e-5, -2e-5):
            weight.data.view(-1)[index] += step
            values.append(formula())
        weight.data.view(-1)[index] += 1e-5
        assert gradient.flatten()[index].item() == pytest.approx((values[0] - values[1]) / 2e-5, rel=1e-5, abs=1e-7)


@pytest.mark.parametrize("learns", ["generator", "fake"])
def test_each_part_of_a_step_moves_its_own_network_only(tiny_network, learns):
    still = adam(0.0)
    method = sfd(tiny_network(), Labels((0, 1), (7,)), **{"fake_update" if learns == "generator" else "update": still})
    trio = method.trio
    trio.begin()
    before = {name: flat(getattr(trio, name)) for name in ("teacher", "fake", "generator")}
    metrics = method.step(NOTHING)
    assert {"loss/fake_retain", "loss/fake_forget", "loss/retain", "loss/forget"} <= set(metrics)
    for name, old in before.items():
        assert torch.equal(flat(getattr(trio, name)), old) == (name != learns), name
        assert all(weight.grad is None for weight in getattr(trio, name).parameters()), name


def test_all_three_begin_with_the_weights_that_are_loaded_after_construction(tiny_network):
    network = tiny_network()
    method = sfd(network, Labels((0, 1), (7,)), update=adam(1e-3, ema_decay=0.5))
    network.load_state_dict(tiny_network(seed=5).state_dict())
    method.begin(None)
    loaded = flat(network)
    assert torch.equal(flat(method.model), loaded), "the average too"
    assert torch.equal(flat(method.trio.fake), loaded)


def test_alpha_one_without_forget_weight_is_plain_distillation(tiny_network, double):
    """SiD (2404.04057) with alpha = 1 on the kept classes: D . (f_psi - x_g) / omega; no other label is asked."""
    network = tiny_network().double()
    network.path.schedule.alphas_cumprod = network.path.schedule.alphas_cumprod.double()
    labels = Labels((0, 1), (7,))
    settings = {"update": lambda m: Update(m, partial(torch.optim.SGD, lr=1e-3))}
    method = sfd(network, labels, **settings, fake_update=settings["update"], forget_weight=0.0, alpha=1.0)
    reference = sfd(tiny_network().double(), labels, **settings).trio  # for its networks alone
    for part in (reference.teacher, reference.fake, reference.generator.network):
        part.path.schedule.alphas_cumprod = network.path.schedule.alphas_cumprod
    reference.begin()

    metrics = method.step(NOTHING)
    assert not [key for key in metrics if "forget" in key]
    assert sum(part.network_evaluations for part in method.networks) == 5 * 8, "G, psi; G, phi, psi"

    g = make_generator(0, "m")
    for part in ("fake", "generator"):
        cond = torch.tensor(labels.retain)[torch.randint(2, (8,), generator=g)]
        torch.randint(1, (0,), generator=g)
        timesteps = torch.randint(reference.first, reference.last + 1, (8,), generator=g)
        z, eps = torch.randn((2, 8, 1, 8, 8), generator=g)
        x0 = predict_x0(reference.generator.network, z, torch.full((8,), reference.generator.timestep), cond)
        if part == "fake":
            loss = (predict_eps(reference.fake, x0.detach(), eps, timesteps, cond)[0] - eps).square().sum() / 8
            trained = reference.fake
        else:
            gamma, sigma = reference.teacher.path.amplitudes(timesteps)
            x_t = gamma * x0 + sigma * eps
            f_phi, f_psi = (predict_x0(p, x_t, timesteps, cond) for p in (reference.teacher, reference.fake))
            omega = (f_phi - x0).detach().abs().mean((1, 2, 3), keepdim=True)
            loss = ((f_phi - f_psi) * (f_psi - x0) / omega).sum() / 8
            trained = reference.generator
        gradients = torch.autograd.grad(loss, list(trained.parameters()))
        with torch.no_grad():
            for weight, gradient in zip(trained.parameters(), gradients, strict=True):
                weight -= 1e-3 * gradient
    torch.testing.assert_close(flat(method.trio.fake), flat(reference.fake), rtol=1e-9, atol=1e-12)
    torch.testing.assert_close(flat(method.trio.generator), flat(reference.generator), rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("alpha", [pytest.param(1.0, marks=pytest.mark.slow), 1.2])
def test_known_gaussians_converge_to_the_override(alpha):
    """Three classes N(-1, .6), N(1, .8), N(0, .7); the third is to become the second. The generator starts narrow."""
    method = sfd(
        gaussian_model([-1.0, 1.0, 0.0], [0.6, 0.8, 0.7], side=4),
        update=adam(1e-2, ema_decay=0.99), fake_update=adam(5e-2),
        override=partial(Fixed, label=1), batch_size=64, forget_samples=1.0, forget_weight=1.0, alpha=alpha,
    )  # fmt: skip
    assert drawn_gaussian(method.model, 2)[1] < 0.3
    for _ in range(600):
        method.step(NOTHING)
    for label, (mean, std) in enumerate([(-1.0, 0.6), (1.0, 0.8), (1.0, 0.8)]):
        found = drawn_gaussian(method.model, label)
        assert found[0] == pytest.approx(mean, abs=0.05), label
        assert found[1] == pytest.approx(std, abs=0.05), label


@pytest.mark.parametrize("num_forget", [1, 3, 16])
def test_sub_batches_weigh_what_whole_ones_do(num_forget):
    """Mean over many steps of the weighted sum of a loss that knows the label, against the expectation."""
    labels, weight = Labels((0, 1, 2), (3, 4)), 0.4
    losses = torch.tensor([1.0, 2.0, 6.0, 10.0, 20.0])
    g = torch.Generator().manual_seed(0)
    found = []
    sampler = LabelSampler(labels, 16, num_forget / 16, weight)
    for _ in range(4000):
        drawn = sampler.draw(g, torch.device("cpu"))
        assert drawn.kept == 16
        assert drawn.weights[16:].sum().item() == pytest.approx(weight)
        found.append((drawn.weights * losses[drawn.labels]).sum())
    found = torch.stack(found)
    error = found.std().item() / math.sqrt(len(found))
    assert abs(found.mean().item() - (3.0 + weight * 15.0)) < 4 * error
    assert error < 0.05, "a wrong weight would be noticed"


def test_forget_terms_do_not_take_half_of_a_step(tiny_network):
    method = sfd(tiny_network(), Labels((0, 1), (7,)), batch_size=64)
    method.step(NOTHING)
    assert sum(network.network_evaluations for network in method.networks) == 5 * (64 + 8)


def test_two_stages(tiny_network):
    """Nothing is forgotten in the first; in the second the fake score learns faster."""

    def fake_update(model):
        schedule = partial(two_stage_rate, distil_share=0.5, max_steps=4, factor=3.0)
        return Update(model, lambda weights: torch.optim.Adam(weights, 1e-3), lr_schedule=schedule)

    method = sfd(tiny_network(), Labels((0, 1), (7,)), fake_update=fake_update, distil_share=0.5)
    forgets, rates = [], []
    for _ in range(4):
        rates.append(method.fake_update.optimizer.param_groups[0]["lr"])
        forgets.append("loss/forget" in method.step(NOTHING))
    assert forgets == [False, False, True, True]
    assert rates == pytest.approx([1e-3, 1e-3, 3e-3, 3e-3])


@pytest.mark.parametrize("second_teacher", ["base", "fake_score"])
def test_who_teaches_in_the_second_stage(tiny_network, second_teacher):
    """The base, or the fake score as it was when that began, whatever it learns later."""
    settings = {"distil_share": 0.5, "max_steps": 4, "second_teacher": second_teacher}
    method = sfd(tiny_network(), Labels((0, 1), (7,)), **settings)
    base, fakes, teachers = flat(method.trio.teacher), [], []
    for _ in range(4):
        method.step(NOTHING)
        fakes.append(flat(method.trio.fake))
        teachers.append(flat(method.trio.teacher))
    assert not torch.equal(fakes[1], base)
    after = base if second_teacher == "base" else fakes[1]
    for found, wanted in zip(teachers, (base, base, after, after), strict=True):
        assert torch.equal(found, wanted)
    assert not any(weight.requires_grad for weight in method.trio.teacher.parameters())


class Untouchable(torch.Tensor):
    """Pixels of which only shape and type may be known."""

    @classmethod
    def __torch_function__(cls, func, types, args=(), kwargs=None):
        if func in (torch.Tensor.shape.__get__, torch.Tensor.dtype.__get__):
            return super().__torch_function__(func, types, args, kwargs or {})
        raise AssertionError(f"an image was read: {func}")


DATA_FREE = [
    ("sfd",), ("sfd", "method/override=classifier"), ("sfd_two_stage",), ("hybrid",),
    ("hybrid", "method.variant=siss_sfd_labels"),
    ("hybrid", "method.variant=siss_sfd_student", "method.distil_share=0.25"),
]  # fmt: skip


@pytest.mark.parametrize("method", [*DATA_FREE, ("siss",)], ids=" ".join)
def test_no_image_is_read(composed, digits, tmp_path, method):
    parts = (digits.forget, digits.retain, digits.forget_test, digits.retain_test)
    sealed = (LabelledImages(part.pixels.as_subclass(Untouchable), part.labels, part.contents) for part in parts)
    data = ForgetRetain(digits.spec, *sealed)
    cfg = composed(f"method={method[0]}", *method[1:])
    if method == ("siss",):  # which does read: the seal holds
        with pytest.raises(AssertionError, match="an image was read"):
            build_trainer(cfg, data, tmp_path).step()
        return
    trainer = build_trainer(cfg, data, tmp_path)
    while not trainer.done:
        trainer.step()
    assert trainer.clock.images == 0
    assert trainer.clock.network_evaluations > 0


@pytest.mark.parametrize("second_teacher", ["base", "fake_score"])
def test_resume_brings_both_networks_and_both_optimizers_back(composed, digits, tmp_path, second_teacher):
    cfg = composed("method=sfd_two_stage", "trainer.max_steps=6", f"method.second_teacher={second_teacher}")
    whole = build_trainer(cfg, digits, tmp_path / "a")
    for _ in range(4):
        whole.step()
    whole.save()
    resumed = build_trainer(cfg, digits, tmp_path / "a", resettable=False)
    for network in resumed.method.networks[: 2 if second_teacher == "base" else 3]:
        for weight in network.parameters():
            weight.data.normal_()
    resumed.resume(open_checkpoint(tmp_path / "a"))
    for trainer in (whole, resumed):
        trainer.step()
    state = flat_state(whole)
    for part in ("weights", "optimizer", "ema", "fake_weights", "fake_optimizer", "fake_lr_schedule", "steps"):
        assert any(f"/method/{part}/" in key for key in state), part
    assert_same_bits(flat_state(resumed), state)


@pytest.mark.parametrize(
    "setting", ["method.fake_update.optimizer.lr=1e30", "method.update.optimizer.lr=1e30"], ids=["fake", "generator"]
)
def test_exploding_networks_stop_the_run_with_the_step_named(run, setting):
    with pytest.raises(NonFiniteError, match=r"loss/\w+ became (nan|inf|-inf) at step [123]"):
        run("method=sfd", "trainer.max_steps=4", "evaluation.every=null", setting, folder="bad")


def test_overrides_choose_among_what_is_kept(tiny_network):
    x0 = torch.zeros(200, 1, 8, 8)
    asked = OverrideBatch(x0, torch.full((200,), 7), tiny_network(), make_generator(0, "m"))
    labels = Labels((0, 3, 5), (7,))
    assert Fixed(labels, 3)(asked).unique().tolist() == [3]
    counts = RandomOther(labels)(asked).bincount()
    assert counts.nonzero().flatten().tolist() == [0, 3, 5]
    assert (counts[[0, 3, 5]] > 40).all()
    assert set(Classifier(labels)(asked).tolist()) <= {0, 3, 5}
    with pytest.raises(ConfigurationError, match=r"one of the labels that are kept, 0, 3, 5; got 7"):
        Fixed(labels, 7)


def test_no_override_is_a_forgotten_label(tiny_network):
    """Of several, each of them is asked about."""
    labels = Labels((0, 3, 5), (2, 7, 9))
    asked_about, chosen = [], []

    def noted(rule):
        class Noted(Override):
            def __init__(self, labels):
                self.rule = rule(labels)

            def __call__(self, asked):
                found = self.rule(asked)
                asked_about.extend(asked.forget.tolist())
                chosen.extend(found.tolist())
                return found

        return Noted

    for rule in (RandomOther, Classifier, partial(Fixed, label=3)):
        method = sfd(tiny_network(), labels, override=noted(rule), batch_size=16, forget_samples=1.0)
        before = flat(method.trio.generator)
        for _ in range(2):
            metrics = method.step(NOTHING)
        assert all(torch.isfinite(value) for value in metrics.values())
        assert not torch.equal(flat(method.trio.generator), before)
    assert set(asked_about) == {2, 7, 9}
    assert set(chosen) <= {0, 3, 5}
    for label in labels.forget:
        with pytest.raises(ConfigurationError, match=f"one of the labels that are kept, 0, 3, 5; got {label}"):
            Fixed(labels, label)


def test_the_classifiers_choice_is_the_likeliest_class_that_is_kept():
    model = gaussian_model([-1.0, 1.0, 0.0], [0.3, 0.3, 0.3], side=4)
    x0 = torch.tensor([-0.4, 0.4, -1.0, 1.0])[:, None, None, None].expand(-1, 1, 4, 4)  # the third class is likeliest
    asked = OverrideBatch(x0, torch.full((4,), 2), model, make_generator(0, "m"))
    assert Classifier(LABELS, num_draws=8)(asked).tolist() == [0, 1, 0, 1]


def test_a_rule_of_ones_own_is_a_few_lines(tiny_network):
    """As docs/sfd.md has it."""

    class Next(Override):
        def __init__(self, labels):
            self.count = len(labels.retain) + len(labels.forget)

        def __call__(self, asked):
            chosen.append((asked.forget + 1) % self.count)
            return chosen[-1]

    chosen = []
    sfd(tiny_network(), Labels((0, 1, 2), (3,)), override=Next).step(NOTHING)
    assert [labels.tolist() for labels in chosen] == [[0]], "asked once a step, for the forget samples"


@pytest.mark.parametrize("make", [gaussian_model, gaussian_flow])
@pytest.mark.parametrize("timestep", [-1, 200, 500])
def test_class_costs_are_log_likelihoods(double, timestep, make):
    """Differences between classes against the Gaussians' own, of a clean picture and of noisy ones."""
    means, stds = [-0.5, 0.4, 0.3], [0.5, 0.5, 0.6]
    model = make(means, stds, side=1)
    scale, noise = (part.flatten() for part in model.path.amplitudes(torch.tensor([timestep])))
    x_t = torch.linspace(-1, 1, 5)
    many = 4000
    costs = class_costs(
        model, x_t.repeat_interleave(many)[:, None, None, None], torch.full((5 * many,), timestep), (0, 1, 2), 8,
        make_generator(0, "m"),
    )  # fmt: skip
    costs = costs.view(5, many, 3)
    found = costs - costs[:, :, :1]
    exact = torch.stack(
        [
            -torch.distributions.Normal(scale * mean, (scale**2 * std**2 + noise**2).sqrt()).log_prob(x_t)
            for mean, std in zip(means, stds, strict=True)
        ],
        1,
    )
    exact = exact - exact[:, :1]
    error = found.std(1) / math.sqrt(many)
    assert ((found.mean(1) - exact).abs() < 4 * error + 0.03).all(), (found.mean(1), exact, error)
    assert error.max() < 0.15


@pytest.mark.parametrize("make", [gaussian_model, gaussian_flow])
@pytest.mark.parametrize("timestep", [997, 998, 999])
def test_at_the_end_of_the_schedule_no_class_is_likelier(double, timestep, make):
    model = make([-0.5, 0.4, 0.3], [0.5, 0.5, 0.6], side=1)
    x_t = torch.linspace(-1, 1, 5)[:, None, None, None]
    costs = class_costs(model, x_t, torch.full((5,), timestep), (0, 1, 2), 8, make_generator(0, "m"))
    assert costs.isfinite().all()
    assert (costs - costs[:, :1]).abs().max() < 0.05


@pytest.mark.parametrize(
    "settings",
    [{"noise": NoiseRange(init=1e-4)}, {"noise": NoiseRange(most=1e9)}],
)
def test_refuses(tiny_network, settings):
    with pytest.raises(ConfigurationError, match=r"method\.[a-z_.]+ must"):
        sfd(tiny_network(), **settings)


def test_refuses_what_it_cannot_distil(run):
    with pytest.raises(ConfigurationError, match=r"trainer\.init must be base"):
        run("method=sfd", "trainer.init=scratch")
    with pytest.raises(ConfigurationError, match=r"less than method\.noise\.most"):
        NoiseRange(least=2.0, most=1.0)
