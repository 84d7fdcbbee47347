"""Lambda controllers against the calculus that they rest on."""

import math
from functools import partial

import pytest
import torch
from scipy.optimize import minimize_scalar
from test_siss import method, unit_batch

from unlearn_runner.errors import ConfigurationError
from unlearn_runner.methods.siss.lambda_controllers import (
    LEAST,
    LEVELS,
    ClosedForm,
    Constant,
    Inferred,
    LambdaController,
    Mixing,
)
from unlearn_runner.methods.siss.lambda_objectives import (
    StepObservation,
    closed_form,
    kl_to_gaussian,
    kl_to_uniform,
    pathwise_slope,
    variance_slope,
)
from unlearn_runner.methods.siss.mixture import importance_weights
from unlearn_runner.methods.siss.siss import SISS
from unlearn_runner.models.model import denoising_loss

F64 = torch.float64
adam = partial(torch.optim.Adam, lr=3e-2)
OBJECTIVES = ("pathwise", "variance", "blend")


def inferred(objective="variance", **settings):
    return Inferred(objective, settings.pop("optimizer", adam), **settings)


def seen_of(w_retain, w_forget, square_retain, square_forget, losses=None, level=None, c_forget=1.0):
    """What a step saw whose two gradients are orthogonal at every sample."""
    b = len(w_retain)
    one = torch.ones((), dtype=w_retain.dtype)
    losses_retain, losses_forget = losses or (w_retain, w_forget)
    return StepObservation(
        level=torch.zeros(b) if level is None else level,
        w_retain=w_retain,
        w_forget=w_forget,
        losses_retain=losses_retain,
        losses_forget=losses_forget,
        square_retain=square_retain,
        square_forget=square_forget,
        inner_product=torch.zeros_like(w_retain),
        norm_retain=one,
        norm_forget=one,
        c_retain=one,
        c_forget=one * c_forget,
    )


X, A, SIGMA = -0.6, 0.8, 0.9  # q(.|x) and q(.|a) on a line


def draws(lambd: float, n: int = 400_000, seed: int = 0):
    """m ~ q_lambda."""
    g = torch.Generator().manual_seed(seed)
    from_forget = torch.rand(n, generator=g) < lambd
    return torch.where(from_forget, A, X) + SIGMA * torch.randn(n, generator=g, dtype=F64)


def at(m):
    """log q(m|a) - log q(m|x), two losses and a two-dimensional gradient of each, none of them simple."""
    log_ratio = ((m - X) ** 2 - (m - A) ** 2) / (2 * SIGMA**2)
    losses = (m.sin() ** 2 + 0.3, 0.5 * (m - 1) ** 2)
    gradients = (torch.stack([m.cos(), m], 1), torch.stack([m - 1, m**2 / 3], 1))
    return log_ratio, losses, gradients


def seen_at(lambd: float, m: torch.Tensor, c_forget: float = 0.7):
    log_ratio, losses, gradients = at(m)
    weights = importance_weights(log_ratio, lambd)
    u = [w[:, None] * gradient for w, gradient in zip(weights, gradients, strict=True)]
    weighted = [w * loss for w, loss in zip(weights, losses, strict=True)]
    return seen_of(
        *weights, *(part.square().sum(1) for part in u), losses=weighted, c_forget=c_forget
    )._replace(inner_product=(u[0] * u[1]).sum(1))  # fmt: skip


def test_pathwise_and_score_parts_cancel_at_every_sample():
    m = draws(0.3, n=1000)
    log_ratio, losses, _ = at(m)
    lambd = torch.full((1000,), 0.3, dtype=F64, requires_grad=True)
    w_retain, w_forget = importance_weights(log_ratio, lambd)
    loss = w_retain * losses[0] - w_forget * losses[1]
    (pathwise,) = torch.autograd.grad(loss.sum(), lambd)
    # log q_lambda less log q(.|x), which does not depend on lambda
    (score,) = torch.autograd.grad((1 - lambd + lambd * log_ratio.exp()).log().sum(), lambd)
    torch.testing.assert_close(score, (w_forget - w_retain).detach())
    torch.testing.assert_close(pathwise_slope(seen_at(0.3, m)), pathwise)
    torch.testing.assert_close(pathwise + score * loss.detach(), torch.zeros(1000, dtype=F64))


def test_expected_loss_does_not_depend_on_lambda_but_the_pathwise_gradient_is_not_zero():
    means, errors = [], []
    for lambd in (0.1, 0.5, 0.9):
        seen = seen_at(lambd, draws(lambd))
        loss = seen.losses_retain - seen.losses_forget
        means.append(loss.mean())
        errors.append(loss.std() / math.sqrt(len(loss)))
        score = (seen.w_forget - seen.w_retain) * loss
        assert abs((pathwise_slope(seen) + score).mean()) < 1e-9
    assert all(abs(mean - means[0]) < 4 * (error + errors[0]) for mean, error in zip(means, errors, strict=True))
    slope = pathwise_slope(seen_at(0.5, draws(0.5)))
    assert abs(slope.mean()) > 20 * slope.std() / math.sqrt(len(slope)), "the paper's gradient is biased"


@pytest.mark.parametrize("lambd", [0.2, 0.5, 0.85])
def test_variance_slope_is_the_derivative_of_the_second_moment(lambd):
    """Its mean over samples against central finite differences of M = E||G||^2, integrated over the line."""
    grid = torch.linspace(-9, 9, 20_001, dtype=F64)

    def second_moment(lambd):
        q_x, q_a = (torch.distributions.Normal(centre, SIGMA).log_prob(grid).exp() for centre in (X, A))
        density = (1 - lambd) * q_x + lambd * q_a
        return torch.trapezoid(density * seen_at(lambd, grid).square_norm(), grid).item()

    wanted = (second_moment(lambd + 1e-4) - second_moment(lambd - 1e-4)) / 2e-4
    seen = seen_at(lambd, draws(lambd))
    slopes = variance_slope(seen) * seen.square_norm().mean()
    error = slopes.std().item() / math.sqrt(len(slopes))
    assert slopes.mean().item() == pytest.approx(wanted, abs=4 * error)
    assert error < 0.05 * abs(wanted) + 0.05, "the test would notice a wrong sign or factor"


@pytest.mark.parametrize(("rms_retain", "rms_forget"), [(1.0, 1.0), (3.0, 0.2), (0.5, 4.0)])
def test_closed_form_is_the_minimiser_found_by_search(rms_retain, rms_forget):
    def second_moment(lambd):
        return rms_retain**2 / (1 - lambd) + rms_forget**2 / lambd

    found = minimize_scalar(second_moment, bounds=(1e-6, 1 - 1e-6), method="bounded", options={"xatol": 1e-9}).x
    assert closed_form(torch.tensor(rms_retain), torch.tensor(rms_forget)).item() == pytest.approx(found, abs=1e-4)
    assert closed_form(torch.zeros(()), torch.zeros(())).item() == 0.5


@pytest.mark.parametrize(("mean", "std"), [(0.0, 1.0), (1.3, 0.4), (-2.0, 2.0)])
def test_kl_against_monte_carlo(mean, std):
    g = torch.Generator().manual_seed(0)
    posterior = torch.distributions.Normal(torch.tensor(mean, dtype=F64), torch.tensor(std, dtype=F64))
    z = mean + std * torch.randn(400_000, generator=g, dtype=F64)
    gaussian = torch.distributions.Normal(torch.tensor(0.5, dtype=F64), torch.tensor(1.5, dtype=F64))
    lambd = torch.sigmoid(z)
    log_uniform = (lambd * (1 - lambd)).log()  # density of the logit of a uniform lambda
    for found, log_prior in (
        (kl_to_gaussian(posterior.loc, posterior.scale, 0.5, 1.5), gaussian.log_prob(z)),
        (kl_to_uniform(posterior.loc, posterior.scale), log_uniform),
    ):
        ratio = posterior.log_prob(z) - log_prior
        assert found.item() == pytest.approx(ratio.mean().item(), abs=4 * ratio.std().item() / math.sqrt(len(z)))
    assert kl_to_gaussian(posterior.loc, posterior.scale, mean, std).item() == pytest.approx(0, abs=1e-12)


def test_uniform_prior_begins_where_its_kl_is_least():
    mean, std = inferred(prior="uniform").posterior(torch.zeros(1))
    (nearest,) = kl_to_uniform(mean, std).tolist()
    for factor in (0.95, 1.05):
        assert kl_to_uniform(mean, std * factor).item() > nearest
    assert nearest < 0.02


@pytest.mark.parametrize("per", ["batch", "timestep"])
@pytest.mark.parametrize("objective", OBJECTIVES)
def test_lambda_frozen_at_one_half_is_static_siss_to_the_bit(tiny_network, objective, per):
    frozen = inferred(objective, prior_std=1e-12, optimizer=partial(torch.optim.Adam, lr=0.0), per=per)
    weights = []
    for lambd in (0.5, Constant(0.5), frozen):
        siss = method(tiny_network(), SISS, lambd=lambd, rho=0.1)
        for step in range(3):
            siss.step(unit_batch(seed=step))
        weights.append(list(siss.model.parameters()))
    for static, constant, adaptive in zip(*weights, strict=True):
        assert torch.equal(static, constant)
        assert torch.equal(static, adaptive)


def one_hot(lambd, rms_retain, rms_forget, g, b=64, level=None):
    """A batch with one-hot weights, and gradients of these norms."""
    from_forget = torch.rand(b, generator=g) < lambd
    w_retain, w_forget = (~from_forget) / (1 - lambd), from_forget / lambd
    squares = (w_retain * rms_retain).square(), (w_forget * rms_forget).square()
    return seen_of(w_retain, w_forget, *squares, level=level)


def train(controller, steps=500, rms=(1.0, 3.0)):
    """Lambda over the last steps."""
    g, found = torch.Generator().manual_seed(1), []
    for _ in range(steps):
        level = torch.rand(64, generator=g)
        lambd, _, scale_forget = controller.next(level)
        found.append((lambd if scale_forget == 1.0 else scale_forget / 2) * torch.ones(64))
        controller.learn(one_hot(lambd, *rms, g, level=level))
    return torch.stack(found[-100:]).median().item()


def test_variance_objective_finds_the_lambda_of_least_variance():
    assert train(inferred("variance", beta=1e-3)) == pytest.approx(3 / 4, abs=0.06)
    assert train(inferred("variance", beta=1e-3), rms=(4.0, 1.0)) == pytest.approx(1 / 5, abs=0.06)


def test_pathwise_goes_to_zero_and_blend_to_one_where_the_prior_is_weak():
    assert train(inferred("pathwise", beta=1e-3)) < 0.15
    assert train(inferred("blend", beta=1e-3)) > 0.85


def test_a_strong_prior_holds_lambda():
    assert train(inferred("pathwise", beta=1e3, prior_mean=1.0, prior_std=0.05)) == pytest.approx(0.731, abs=0.02)


@pytest.mark.parametrize("per", ["batch", "timestep"])
def test_closed_form_tracks_the_norms(per):
    assert train(ClosedForm(per)) == pytest.approx(3 / 4, abs=0.05)
    assert train(ClosedForm(per, least_samples=0), rms=(1.0, 0.0)) == pytest.approx(LEAST)
    assert train(ClosedForm(per), rms=(1.0, 0.0)) == pytest.approx(2 / 64)


def gaussian_batch(lambd, g, b=256, d=400, mean=0.0, std=1.0):
    """Means over a batch with one-hot weights of its retain and forget samples' gradients, each N(mean, std^2 I_d)."""
    from_forget = torch.rand(b, generator=g) < lambd
    samples = mean + std * torch.randn(b, d, generator=g)
    w_retain, w_forget = (~from_forget) / (1 - lambd), from_forget / lambd
    squares = samples.square().sum(1)
    seen = seen_of(w_retain, w_forget, w_retain**2 * squares, w_forget**2 * squares)
    return seen, *((w[:, None] * samples).mean(0) for w in (w_retain, w_forget))


def test_closed_form_under_a_norm_fix_ends_at_rho_squared():
    """As docs/adaptive_lambda.md derives where noise rules: lambda / (1 - lambda) = rho^2, though R_x = R_a."""
    controller, g, rho, found = ClosedForm(least_samples=0), torch.Generator().manual_seed(0), 0.5, []
    for _ in range(300):
        lambd = controller.next(torch.zeros(256)).lambd
        seen, grad_retain, grad_forget = gaussian_batch(lambd, g)
        tau = rho * grad_retain.norm()
        norms = {"norm_retain": grad_retain.norm(), "norm_forget": grad_forget.norm()}
        controller.learn(seen._replace(**norms, c_forget=tau / grad_forget.norm()))
        found.append(lambd)
    assert torch.cat(found[-150:]).mean().item() == pytest.approx(rho**2 / (1 + rho**2), abs=0.02)


def test_forget_part_under_a_norm_fix_has_its_mean_from_lambda_but_not_its_second_moment():
    b, d, tau, g = 64, 400, 3.0, torch.Generator().manual_seed(0)
    wanted, means, surrogates = [], [], []
    for lambd in (0.1, 0.8):
        parts, frozen = [], []
        for _ in range(200):
            seen, _, grad_forget = gaussian_batch(lambd, g, b, d, mean=0.15)
            parts.append(tau * grad_forget / grad_forget.norm())
            frozen.append(seen.square_forget.mean())
        parts = torch.stack(parts)
        assert parts.square().sum(1).mean().item() == pytest.approx(tau**2)
        square = d * 0.15**2
        wanted.append(tau * math.sqrt(square / (square + d / (lambd * b))))
        means.append(parts.mean(0).norm().item())
        surrogates.append(torch.stack(frozen).mean().item())
    assert means == pytest.approx(wanted, rel=0.03)
    assert wanted[1] > 1.5 * wanted[0]
    assert surrogates[0] / surrogates[1] == pytest.approx(8, rel=0.1), "what M says of it falls with lambda"


def test_closed_form_knows_levels_apart():
    controller, g = ClosedForm(per="timestep", num_levels=2, least_samples=0), torch.Generator().manual_seed(0)
    for _ in range(60):
        level = torch.rand(256, generator=g)
        lambd = controller.next(level).lambd
        from_forget = torch.rand(256, generator=g) < lambd
        w_retain, w_forget = (~from_forget) / (1 - lambd), from_forget / lambd
        rms_forget = torch.where(level < 0.5, 0.25, 4.0)
        logged = controller.learn(
            seen_of(w_retain, w_forget, w_retain.square(), (w_forget * rms_forget).square(), level=level)
        )
    low, high = controller.next(torch.tensor([0.1, 0.9])).lambd
    assert low.item() == pytest.approx(0.2, abs=0.05)
    assert high.item() == pytest.approx(0.8, abs=0.05)
    assert [key for key in logged] == [f"lambda/at/{level:.2f}" for level in LEVELS.tolist()]
    assert logged["lambda/at/0.05"] == low


def test_variance_tells_images_apart_by_their_features():
    """Two kinds of pairs, whose forget gradients are 1/4 and 4 times their retain gradients: lambda* 0.2 and 0.8."""
    controller, g = inferred("variance", beta=1e-3, per="image", image_features=True), torch.Generator().manual_seed(0)
    controller.begin(num_features=3)
    marks = torch.eye(6)[[0, 3]]
    for _ in range(400):
        kind = torch.randint(2, (64,), generator=g)
        level = torch.rand(64, generator=g)
        lambd = controller.next(level, marks[kind]).lambd
        from_forget = torch.rand(64, generator=g) < lambd
        w_retain, w_forget = (~from_forget) / (1 - lambd), from_forget / lambd
        rms_forget = torch.where(kind == 0, 0.25, 4.0)
        logged = controller.learn(
            seen_of(w_retain, w_forget, w_retain.square(), (w_forget * rms_forget).square(), level=level)
        )
    mean, _ = controller.posterior(torch.full((2,), 0.5), marks)
    assert torch.sigmoid(mean).tolist() == pytest.approx([0.2, 0.8], abs=0.08)
    assert logged["lambda/std_over_images"] > 0.15
    assert "lambda/at/0.05" not in logged


@pytest.mark.parametrize("norms", [True, False])
@pytest.mark.parametrize("build", ["tiny_network", "tiny_vae"])
def test_lambda_of_an_image_sees_its_own_losses_and_features(request, build, norms):
    network = request.getfixturevalue(build)()
    network.freeze_for_unlearning()
    settings = {"context": "current", "per": "image", "norms": norms}
    plain, both = (inferred("pathwise", image_features=features, **settings) for features in (False, True))
    siss = method(network, SISS, lambd=both, rho=0.1)
    siss.begin(None)
    method(network, SISS, lambd=plain, rho=0.1).begin(None)
    first = 2 * (1 + norms) + 2 + 2
    assert plain.network[0].in_features == first
    assert both.network[0].in_features == first + 2 * network.num_features
    before = network.network_evaluations
    metrics = siss.step(unit_batch())
    b = len(unit_batch().x0_retain)
    assert network.network_evaluations - before >= 2 * b + b
    assert both.losses.shape == (b, 2)
    assert len({tuple(row) for row in both.losses.tolist()}) == b
    assert metrics["lambda/std_over_images"].item() > 0


def test_features_are_those_of_the_middle_block(tiny_network):
    model = tiny_network()
    x0, cond = torch.rand(5, 1, 8, 8), torch.arange(5)
    found = model.features(x0, cond)
    assert found.shape == (5, model.num_features) == (5, 8)
    assert not found.requires_grad
    assert not model.backbone.middle._forward_hooks
    assert torch.equal(model.features(x0, cond), found)
    assert not torch.allclose(model.features(x0.flip(0), cond), found)
    model.backbone.unet.up_blocks.requires_grad_(True).zero_grad()
    for weight in model.backbone.unet.up_blocks.parameters():
        weight.data.zero_()
    assert torch.equal(model.features(x0, cond), found), "nothing after it counts"


def test_features_of_a_model_that_has_none_are_refused():
    controller = inferred("variance", per="image", image_features=True)
    with pytest.raises(ConfigurationError, match="image_features=true needs a model whose network has a middle block"):
        controller.begin(None)


@pytest.mark.parametrize(
    ("settings", "says"),
    [
        ({"per": "image"}, "nothing to tell images apart by"),
        ({"image_features": True}, "needs method.lambd.per=image, got batch"),
        ({"per": "timestep", "image_features": True}, "needs method.lambd.per=image, got timestep"),
    ],
)
def test_what_a_lambda_of_an_image_needs(settings, says):
    with pytest.raises(ConfigurationError, match=says):
        inferred("variance", **settings)


class Spy(LambdaController):
    """Static, and remembers what it was shown."""

    def next(self, level, features=None):
        return Mixing(torch.full((1,), 0.4))

    def learn(self, seen):
        self.seen = seen
        return {}

    def state_dict(self):
        return {}

    load_state_dict = None


@pytest.mark.parametrize("one_label", [False, True], ids=["split", "plain"])
def test_gradients_over_the_answer_are_those_of_autograd(tiny_network, one_label):
    """||c_x w_x grad l_x - c_a w_a grad l_a||^2 for squared errors: 4 ||c_x w_x (f - y_x) - c_a w_a (f - y_a)||^2."""
    shown = []
    for split in (True, False):
        spy = Spy()
        method(tiny_network(), SISS, lambd=spy, rho=0.1, split=split).step(unit_batch(one_label=one_label))
        shown.append(spy.seen)
    for part, plain in zip(*shown, strict=True):
        torch.testing.assert_close(part, plain, rtol=1e-4, atol=1e-4)
    seen = shown[0]
    # w l = ||w (f - y)||^2 / w, summed over the 64 pixels; the gradient's square is 4 w^2 ||f - y||^2
    torch.testing.assert_close(seen.square_retain, 4 * 64 * seen.w_retain * seen.losses_retain, rtol=1e-3, atol=1e-3)
    torch.testing.assert_close(seen.square_forget, 4 * 64 * seen.w_forget * seen.losses_forget, rtol=1e-3, atol=1e-3)
    assert (seen.inner_product**2 <= seen.square_retain * seen.square_forget * 1.001 + 1e-6).all()
    assert (seen.square_norm() >= -1e-3).all()


@pytest.mark.parametrize("objective", ["pathwise", "blend"])
def test_the_current_context_is_this_batchs_losses_and_norms(tiny_network, objective):
    """log1p of the losses at the noisy x and a, by the step's own t and eps, and of the norms of their gradients,
    before lambda is drawn; nothing is kept of it.
    """
    controller = inferred(objective, context="current")
    siss = method(tiny_network(), SISS, lambd=controller, rho=0.1)
    posterior, contexts = controller.posterior, []
    controller.posterior = lambda *seen: (contexts.append(controller.context.clone()), posterior(*seen))[1]
    for step in range(2):
        batch, network = unit_batch(seed=step), siss.trained
        g = torch.Generator()
        g.set_state(siss.generator.get_state())
        timesteps = torch.randint(network.num_train_timesteps, (32,), generator=g)
        eps = torch.randn(batch.x0_retain.shape, generator=g)
        wanted = []
        for x0, cond in ((batch.x0_retain, batch.cond_retain), (batch.x0_forget, batch.cond_forget)):
            losses = denoising_loss(network, x0, cond, timesteps, eps)
            wanted.append((losses.mean() / 64, siss.update.gradient(losses.mean()).norm()))
        passes = network.network_evaluations
        siss.step(batch)
        assert network.network_evaluations - passes >= 3 * 32
        (loss_x, norm_x), (loss_a, norm_a) = wanted
        torch.testing.assert_close(contexts[step], torch.stack([loss_x, loss_a, norm_x, norm_a]).detach().log1p())
    assert torch.equal(controller.context, contexts[1])


def test_variance_refuses_the_current_context():
    with pytest.raises(ConfigurationError, match="context must be previous with objective=variance"):
        inferred("variance", context="current")


@pytest.mark.parametrize("prior_mean", [-60.0, 60.0])
@pytest.mark.parametrize("per", ["batch", "timestep"])
def test_lambda_at_its_clamps(tiny_network, prior_mean, per):
    controller = inferred("variance", prior_mean=prior_mean, per=per)
    siss = method(tiny_network(), SISS, lambd=controller, rho=0.1)
    wanted = LEAST if prior_mean < 0 else 1 - LEAST
    for step in range(2):
        metrics = siss.step(unit_batch(seed=step))
        assert metrics["lambda/value"].item() == pytest.approx(wanted)
        assert all(torch.isfinite(value) for value in metrics.values())


def test_lambda_and_its_diagnostics_are_logged(tiny_network):
    siss = method(tiny_network(), SISS, lambd=inferred(per="timestep"), rho=0.1, gradient_variance=True)
    first, second = siss.step(unit_batch()), siss.step(unit_batch(seed=1))
    assert {"lambda/value", "lambda/posterior_mean", "lambda/posterior_std", "lambda/kl", "weights/ess_retain",
            "weights/ess_forget", "weights/one_hot", "lambda/at/0.05", "lambda/at/0.95"} <= set(first)  # fmt: skip
    assert {"grad_variance/retain", "grad_variance/forget", "grad_variance/update"} <= set(second) - set(first)
    assert first["lambda/kl"].item() == pytest.approx(0, abs=1e-6), "before the first step, the prior"
    assert 0 <= first["weights/one_hot"] <= 1


def test_one_hot_share(tiny_network):
    far = method(tiny_network(), SISS, lambd=0.3).step(unit_batch())
    near = method(tiny_network(), SISS, lambd=0.3).step(unit_batch(one_label=True))
    assert far["weights/one_hot"] > 0.85  # other labels
    assert near["weights/one_hot"] < 0.5
