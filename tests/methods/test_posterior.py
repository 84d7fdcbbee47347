"""Deletion by posterior targets: the mean against brute force, and what it makes of a model whose score is known."""

from functools import partial

import pytest
import torch
from torch.distributions import Normal
from toy import gaussian_flow, gaussian_model

from unlearn_runner.data.streams import Images, ImageSet
from unlearn_runner.methods import retained_images as module
from unlearn_runner.methods.denoising import draw_noise, drawn_loss
from unlearn_runner.methods.method import Setting, Update
from unlearn_runner.methods.posterior import Posterior
from unlearn_runner.methods.retained_images import RetainedImages, Subset, full_precision, posterior, trust
from unlearn_runner.methods.retrack import ReTrack
from unlearn_runner.methods.siss.lambda_controllers import ClosedForm
from unlearn_runner.methods.siss.mixture import mix
from unlearn_runner.methods.siss.siss import SISS
from unlearn_runner.models.model import Noising
from unlearn_runner.spec import Labels
from unlearn_runner.types import Batch, make_generator

F64 = torch.float64
adam = partial(Update, optimizer=partial(torch.optim.Adam, lr=0.03))


class Given(ImageSet):
    """A set of floating-point images."""

    labels = None

    def __init__(self, x0, labels=None, mirrored=False, resident=True):
        self.x0, self.labels, self.mirrored, self.resident = x0, labels, mirrored, resident

    def __len__(self):
        return len(self.x0)

    def take(self, rows, mirrored=False):
        x0 = self.x0[rows]
        return x0.flip(-1) if mirrored else x0, None if self.labels is None else self.labels[rows]


def images(n, shape=(1, 4, 4), seed=0, dtype=F64):
    return torch.rand((n, *shape), generator=torch.Generator().manual_seed(seed), dtype=dtype) * 2 - 1


def noisy(model, x0, timesteps, seed=1):
    """Samples of these images, and their noising."""
    noising = model.noising(x0, timesteps, None)
    return noising.sample(torch.randn(x0.shape, generator=torch.Generator().manual_seed(seed), dtype=x0.dtype)), noising


def brute_force(m, noising, candidates):
    """The mean of `candidates`, each weighed by the density of m as a noisy sample of it."""
    means = []
    for row, scale, std in zip(m, noising.scale, noising.std, strict=True):
        logs = torch.stack([Normal(scale * image, std.expand_as(image)).log_prob(row).sum() for image in candidates])
        weights = (logs - logs.max()).exp()
        means.append((weights[:, None, None, None] * candidates).sum(0) / weights.sum())
    return torch.stack(means)


def posterior_mean(retained, m, noising, cond=None, k=None):
    return retained.mean(posterior(retained.log_densities(m, noising, cond), k), m)


@pytest.fixture(params=[gaussian_model, gaussian_flow])
def model(request):
    """A diffusion model, and a flow; in double precision."""
    torch.set_default_dtype(F64)
    yield request.param([0.0, 0.0, 0.0], [1.0, 1.0, 1.0], side=4)
    torch.set_default_dtype(torch.float32)


@pytest.mark.parametrize("resident", [True, False])
@pytest.mark.parametrize("chunk", [16 * 5, 2**24])
def test_the_mean_is_that_of_brute_force(model, resident, chunk, monkeypatch):
    monkeypatch.setattr(module, "CHUNK", chunk)
    known = images(23)
    retained = RetainedImages(model, Given(known, resident=resident), {})
    timesteps = torch.tensor([0, 1, 50, 200, 500, 900, 999])
    m, noising = noisy(model, images(7, seed=5), timesteps)
    torch.testing.assert_close(posterior_mean(retained, m, noising), brute_force(m, noising, known))
    if not (noising.scale[-1] > 0).all():  # a flow's last sample is noise alone, which every image explains alike
        torch.testing.assert_close(posterior_mean(retained, m, noising)[-1], known.mean(0))


def test_single_precision_is_enough():
    """Also at the least noise, where densities differ by tens of thousands."""
    torch.manual_seed(0)
    known = images(500, (1, 28, 28))
    deep, plain = (gaussian_model([0.0], [1.0], side=28) for _ in range(2))
    timesteps = torch.arange(0, 1000, 37)
    m, noising = noisy(deep, images(len(timesteps), (1, 28, 28), seed=5), timesteps)
    wanted = brute_force(m, noising, known)
    retained = RetainedImages(plain, Given(known.float()), {})
    found = posterior_mean(retained, m.float(), Noising(*(part.float() for part in noising)))
    torch.testing.assert_close(found.double(), wanted, atol=2e-3, rtol=0)


def test_products_that_tell_images_apart_are_of_full_precision():
    torch.set_float32_matmul_precision("high")
    try:
        with full_precision():
            assert torch.get_float32_matmul_precision() == "highest"
        assert torch.get_float32_matmul_precision() == "high"
    finally:
        torch.set_float32_matmul_precision("highest")


def test_mirrored_images_are_among_them(model):
    known = images(9)
    retained = RetainedImages(model, Given(known, mirrored=True), {})
    assert len(retained) == 18
    m, noising = noisy(model, known[:4].flip(-1), torch.tensor([20, 100, 300, 600]))
    both = torch.cat([known, known.flip(-1)])
    torch.testing.assert_close(posterior_mean(retained, m, noising), brute_force(m, noising, both))
    x0, _ = retained.take(torch.tensor([0, 8, 9, 17]))
    torch.testing.assert_close(x0, both[[0, 8, 9, 17]])


@pytest.mark.parametrize("stand_in", [{1: 1}, {1: 1, 2: None}, {0: 0, 1: 1, 2: 0}])
def test_images_of_the_label_that_stands_in_explain_a_condition(model, stand_in):
    """No image has label 2."""
    known, labels = images(20), torch.arange(20) % 2
    retained = RetainedImages(model, Given(known, labels), stand_in)
    assert len(retained) == (10 if stand_in == {1: 1} else 20)
    timesteps, cond = torch.tensor([100, 400, 800]), torch.tensor([1, max(stand_in), 1])
    m, noising = noisy(model, images(3, seed=5), timesteps)
    found = posterior_mean(retained, m, noising, cond)
    for row, label in enumerate(cond.tolist()):
        those = known if stand_in[label] is None else known[labels == stand_in[label]]
        part = Noising(noising.scale[row : row + 1], None, noising.std[row : row + 1])
        torch.testing.assert_close(found[row : row + 1], brute_force(m[row : row + 1], part, those))


def test_nearest_images_only(model):
    known = images(12)
    retained = RetainedImages(model, Given(known), {})
    m, noising = noisy(model, images(4, seed=5), torch.tensor([100, 300, 600, 900]))
    every = posterior_mean(retained, m, noising)
    for k in (12, 100):
        torch.testing.assert_close(posterior_mean(retained, m, noising, k=k), every, atol=0, rtol=0)
    squares = (m[:, None] - noising.scale[:, None] * known).square().flatten(2).sum(2)
    torch.testing.assert_close(posterior_mean(retained, m, noising, k=1), known[squares.argmin(1)])
    for row, near in enumerate(squares.topk(3, largest=False).indices):
        part = Noising(noising.scale[row : row + 1], None, noising.std[row : row + 1])
        wanted = brute_force(m[row : row + 1], part, known[near])
        torch.testing.assert_close(posterior_mean(retained, m, noising, k=3)[row : row + 1], wanted)


def test_of_some_images_the_mean_is_that_of_these(model):
    known = images(12)
    retained = RetainedImages(model, Given(known), {})
    g = make_generator(0, "method")
    assert retained.subset(None, g) is retained.subset(12, g) is None
    subset = retained.subset(5, g)
    assert len(subset.numbers) == 5
    m, noising = noisy(model, images(4, seed=5), torch.tensor([100, 300, 600, 900]))
    found = retained.mean(posterior(retained.log_densities(m, noising, None, subset)), m, subset)
    torch.testing.assert_close(found, brute_force(m, noising, known[subset.numbers]))


@pytest.mark.parametrize("resident", [True, False])
def test_of_some_images_the_nearest_are_always_there(model, resident):
    """Against brute force; little noise then leaves the target as it is of all images, and much noise on average."""
    known, forget = images(400), images(3, seed=5)
    retained = RetainedImages(model, Given(known, resident=resident), {})
    retained.always_nearest(Given(forget), 31)
    distances = (forget[:, None] - known).square().flatten(2).sum(2)
    assert set(retained.near.tolist()) == set(distances.argsort(1)[:, :10].flatten().tolist())
    g = make_generator(0, "method")
    subset = retained.subset(80, g)
    assert set(retained.near.tolist()) <= set(subset.numbers.tolist())
    assert subset.log_counts.exp().sum().item() == pytest.approx(400), "together they stand for all"
    m, noising = noisy(model, forget, torch.tensor([1, 5, 10]))
    torch.testing.assert_close(retained.target(m, noising, None, m, subset=subset), brute_force(m, noising, known))
    m, noising = noisy(model, forget, torch.tensor([500, 700, 900]))
    wanted = brute_force(m, noising, known)
    parts = [retained.target(m, noising, None, m, subset=retained.subset(80, g)) for _ in range(60)]
    assert (torch.stack(parts).mean(0) - wanted).square().mean() < 0.1 * (parts[0] - wanted).square().mean()


def test_with_more_forget_images_than_places_none_is_near(model):
    retained = RetainedImages(model, Given(images(40)), {})
    retained.always_nearest(Given(images(20, seed=5)), 10)
    assert len(retained.near) == 0
    assert len(retained.subset(20, make_generator(0, "method")).numbers) == 20


def test_a_part_without_an_image_of_a_label_explains_it_all_the_same(model):
    known, labels = images(6), torch.tensor([0, 0, 0, 1, 1, 1])
    retained = RetainedImages(model, Given(known, labels), {0: 0, 1: 1})
    subset, cond = Subset(torch.tensor([0, 1]), torch.zeros(2)), torch.tensor([0, 1])
    m, noising = noisy(model, images(2, seed=5), torch.tensor([300, 600]))
    found = retained.mean(posterior(retained.log_densities(m, noising, cond, subset)), m, subset)
    torch.testing.assert_close(found, brute_force(m, noising, known[:2]))


def test_duplicates_count_as_often_as_they_are_there(model):
    known = images(5)[[0, 0, 0, 1, 2]]
    retained = RetainedImages(model, Given(known), {})
    m, noising = noisy(model, images(3, seed=5), torch.tensor([200, 600, 900]))
    torch.testing.assert_close(posterior_mean(retained, m, noising), brute_force(m, noising, known))


def test_the_posteriors_of_a_vae_are_its_encoders(tiny_vae):
    """Standard deviations differ between images, and the conditions that images were encoded under are their own."""
    vae = tiny_vae((1, 8, 8), num_labels=3).double()
    known, labels = images(14, (1, 8, 8)), torch.arange(14) % 2
    retained = RetainedImages(vae, Given(known, labels), {2: None})
    z = torch.randn((6, 3), generator=torch.Generator().manual_seed(2), dtype=F64)
    with torch.no_grad():
        q = vae.noising(known, torch.zeros(14, dtype=torch.int64), labels)
        logs = Normal(q.center, q.std).log_prob(z[:, None]).sum(2)
        weights = posterior(retained.log_densities(z, Noising(1.0, z, z), torch.full((6,), 2)))
        torch.testing.assert_close(weights, logs.softmax(1))
        wanted = (weights[..., None, None, None] * known).sum(1)
        torch.testing.assert_close(retained.mean(weights, known[:6]), wanted)


def trained(model, retain, forget, steps=250, labels=None, build=Posterior, **options):
    """A model after so many steps of Adam; all images have label 0 where no labels are given."""
    g = make_generator(0, "method")
    conds = labels or [torch.zeros(len(part), dtype=torch.int64) for part in (retain, forget)]
    setting = Setting(model, g, Labels(*(tuple(part.unique().tolist()) for part in conds)))
    decay = partial(torch.optim.lr_scheduler.CosineAnnealingLR, T_max=steps)
    update = partial(adam, lr_schedule=decay)
    method = build(setting, update, **options)
    method.begin(Images(Given(retain, conds[0]), Given(forget, conds[1])))
    for _ in range(steps):
        rows = [torch.randint(len(part), (128,), generator=g) for part in (retain, forget)]
        images, labels = (
            [part[these] for part, these in zip(both, rows, strict=True)] for both in ((retain, forget), conds)
        )
        method.step(Batch(*images, *labels, 0.1))
    return method


def spread(mean, std, n=2000):
    """Images of one pixel with the quantiles of a Gaussian."""
    return Normal(mean, std).icdf((torch.arange(n) + 0.5) / n).view(n, 1, 1, 1)


@pytest.mark.parametrize("build", [gaussian_model, gaussian_flow])
@pytest.mark.parametrize(
    "options",
    [{"lambd": 0.25, "follow": 0.0}, {"lambd": 0.9, "follow": 0.0}, {"lambd": 1.0, "follow": 0.5}, {"lambd": 0.0}],
)
def test_whatever_the_proposal_the_minimiser_is_the_retained_images_score(build, options):
    """The base knows both; even without a single retained sample what is learnt is their distribution alone."""
    model = build([-0.2], [0.5], side=1)
    method = trained(model, spread(-0.5, 0.3), spread(0.3, 0.1, 200), cap=None, **options)
    unet = method.trained.backbone.unet
    assert unet.means.item() == pytest.approx(-0.5, abs=0.03)
    assert unet.log_stds.exp().item() == pytest.approx(0.3, abs=0.03)


@pytest.mark.parametrize("without_images, wanted", [("nearest", (0.3, 0.1)), ("all", (-0.1, 0.41))])
def test_under_a_condition_that_keeps_no_image_the_nearest_labels_are_drawn_or_all(without_images, wanted):
    """Of two kept ones of which the second is nearer."""
    model = gaussian_model([-0.5, 0.3, 0.2], [0.1, 0.1, 0.1], side=1)
    retain, labels = torch.cat([spread(-0.5, 0.1), spread(0.3, 0.1)]), torch.arange(2).repeat_interleave(2000)
    method = trained(
        model, retain, spread(0.2, 0.1, 200), labels=(labels, torch.full((200,), 2)), lambd=0.5, cap=None,
        without_images=without_images,
    )  # fmt: skip
    unet = method.trained.backbone.unet
    assert unet.means[2].item() == pytest.approx(wanted[0], abs=0.05)
    if without_images == "nearest":  # two peaks are no Gaussian, whose width would be theirs
        assert unet.log_stds[2].exp().item() == pytest.approx(wanted[1], abs=0.05)
    assert (unet.means[0].item(), unet.means[1].item()) == (pytest.approx(-0.5, abs=0.05), pytest.approx(0.3, abs=0.05))


@pytest.mark.parametrize("resident", [True, False])
def test_what_follows_begins_at_any_image_that_explains_its_condition(resident):
    """Alike often, mirrored ones among them; under a label that nothing stands in for, and without labels, at any."""
    model = gaussian_model([0.0] * 3, [1.0] * 3, side=2)
    x0, labels = images(30, (1, 2, 2), 0, torch.float32), torch.tensor([0, 1, 1]).repeat(10)
    stand_in = {0: 0, 2: 1}
    retained = RetainedImages(model, Given(x0, labels, mirrored=True, resident=resident), stand_in)
    drawn, found = retained.drawn_for(torch.tensor([0, 2]).repeat_interleave(4000), 8000, make_generator(0, "test"))
    assert found.tolist() == [0] * 4000 + [1] * 4000
    for part, label, n in ((drawn[:4000], 0, 20), (drawn[4000:], 1, 40)):
        kinds, counts = part.flatten(1).unique(dim=0, return_counts=True)
        both = torch.cat([x0[labels == label], x0[labels == label].flip(-1)]).flatten(1)
        torch.testing.assert_close(kinds, both.unique(dim=0))
        expected = 4000 / n
        assert ((counts - expected).square().sum() / expected).item() < 2 * n, "chi squared, about n"
    for cond, among in ((torch.full((2000,), 2), {2: None}), (None, {})):
        everything = RetainedImages(model, Given(x0, labels if among else None, resident=resident), among)
        drawn, found = everything.drawn_for(cond, 2000, make_generator(0, "test"))
        assert len(drawn.flatten(1).unique(dim=0)) == 30


def test_far_targets_cost_at_most_the_cap():
    """A network that predicts the noise that led to a sample: its loss is ||astray||^2 before the weight."""
    astray = torch.randn((500, 1, 4, 4), generator=torch.Generator().manual_seed(0))
    astray *= torch.logspace(-3, 3, 500)[:, None, None, None]
    squares = astray.square().flatten(1).mean(1)
    weights = trust(astray, 0.1)
    torch.testing.assert_close(weights * squares, squares.clamp(max=0.1))
    assert weights[0] == 1
    assert trust(torch.zeros(1, 1, 4, 4), 0.1).item() == 1, "a target that is the sample's own image"


@pytest.mark.parametrize("follow", [0.0, 1.0])
def test_only_noisy_forget_images_count_less(monkeypatch, follow):
    """What begins at a retained image counts as it is, whatever the cap."""
    model = gaussian_model([-0.2], [0.5], side=2)
    seen = []
    monkeypatch.setattr(Update, "gradient", lambda self, loss: seen.append(loss.item()) or torch.zeros(2))
    losses = {}
    retain, forget = images(150, (1, 2, 2), 0, torch.float32), images(150, (1, 2, 2), 3, torch.float32)
    for cap in (None, 1e9, 1e-3):
        trained(model, retain, forget, 1, cap=cap, lambd=1.0, follow=follow)
        losses[cap] = seen.pop()
    assert losses[None] == losses[1e9]
    assert losses[1e-3] < 0.2 * losses[None] if follow == 0.0 else losses[1e-3] == losses[None]


def test_retrack_weighs_the_nearest_of_the_clean_image(model):
    """Which retained images count is decided without noise, how much at the noisy sample (2509.13007, its code)."""
    known, forget = images(23), images(6, seed=5)
    method = ReTrack(Setting(model, make_generator(0, "m")), adam, k=4)
    method.begin(Images(Given(known), Given(forget)))
    timesteps = torch.tensor([0, 5, 100, 400, 700, 950])
    m, noising = noisy(model, forget, timesteps)
    found = method._weights(m, noising, forget, None)
    for row in range(len(forget)):
        nearest = (known - forget[row]).square().flatten(1).sum(1).argsort()[:4]
        assert set(found[row].nonzero()[:, 0].tolist()) <= set(nearest.tolist())
        scale, std = noising.scale[row], noising.std[row]
        logs = torch.stack([Normal(scale * known[i], std.expand_as(known[i])).log_prob(m[row]).sum() for i in nearest])
        torch.testing.assert_close(found[row, nearest], logs.softmax(0))


def test_retracks_gradient_is_that_of_its_papers_loss():
    """lambda sum_i w_i ||eps_theta - v_i||^2 + (1 - lambda) ||eps_theta - eps||^2, v_i the noise that leads from the
    i-th neighbour: here the squared distance to their mean, which differs by what no weight changes.
    """
    model = gaussian_model([-0.2], [0.5], side=2)
    known, forget = images(30, (1, 2, 2), 0, torch.float32), images(8, (1, 2, 2), 3, torch.float32)
    method = ReTrack(Setting(model, make_generator(0, "m")), adam, lambd=0.3, k=5)
    method.begin(Images(Given(known), Given(forget)))
    moved = []
    method.update.apply = moved.append
    method.step(Batch(known[:8], forget, torch.zeros(8, dtype=torch.int64), torch.zeros(8, dtype=torch.int64), 0.1))

    g, labels = make_generator(0, "m"), torch.zeros(8, dtype=torch.int64)
    retain = drawn_loss(model, known[:8], labels, g).mean()
    timesteps, eps = draw_noise(model, forget, g)
    noising = model.noising(forget, timesteps, labels)
    m = noising.sample(eps)
    weights = method._weights(m, noising, forget, labels)
    v = (m[:, None] - noising.scale[:, None] * known) / noising.std[:, None]
    distances = (model.predict(m, timesteps, labels)[:, None] - v).square().flatten(2).sum(2)
    loss = (0.3 * (weights * distances).sum(1).mean() + 0.7 * retain) / 4
    by_hand = torch.cat([part.flatten() for part in torch.autograd.grad(loss, method.update.weights)])
    torch.testing.assert_close(moved[0], by_hand, rtol=1e-4, atol=1e-6)


def test_retrack_turns_the_forget_image_into_its_neighbours():
    """Data of two points that are kept and one between them that is not: it is answered by the nearer of the two."""
    model = gaussian_model([0.0], [0.3], side=1)
    points = torch.tensor([-0.6, 0.2]).repeat(50)[:, None, None, None]
    forget = torch.full((20, 1, 1, 1), 0.1)
    method = ReTrack(Setting(model, make_generator(0, "m")), adam, k=50)
    method.begin(Images(Given(points), Given(forget)))
    weights = method._weights(*noisy(model, forget, torch.full((20,), 900)), forget, None)
    torch.testing.assert_close(weights @ points.flatten(1), torch.full((20, 1), 0.2))


@pytest.mark.parametrize("seed", [0, 1])
def test_retrack_under_a_condition_asks_its_own_images_or_all(seed):
    model = gaussian_model([0.0, 0.0, 0.0], [0.3] * 3, side=1)
    known, labels = images(40, (1, 1, 1), seed, torch.float32), torch.arange(40) % 2
    forget, conds = images(6, (1, 1, 1), seed + 7, torch.float32), torch.tensor([1, 1, 1, 2, 2, 2])
    names = Labels(retain=(0,), forget=(1, 2), names=("a", "b", "c"), contents=(0, 1, 1))
    method = ReTrack(Setting(model, make_generator(0, "m"), names), adam, k=3)
    method.begin(Images(Given(known, labels), Given(forget, conds)))
    x0, m = forget, noisy(model, forget, torch.full((6,), 300))
    weights = method._weights(*m, x0, conds)
    for row in range(3):  # label 1 has images of its own
        assert not weights[row, labels == 0].any()
    distances = (known - forget[3]).square().flatten()
    assert set(weights[3].nonzero()[:, 0].tolist()) <= set(distances.argsort()[:3].tolist())


@pytest.mark.parametrize(
    ("build", "options"),
    [
        (gaussian_model, {"lambd": 0.1, "rho": 0.5}),
        (gaussian_flow, {"lambd": ClosedForm()}),
        pytest.param(gaussian_model, {"lambd": 0.5}, marks=pytest.mark.slow),
        pytest.param(gaussian_model, {"lambd": 0.5, "population": "all", "superfactor": 2.0}, marks=pytest.mark.slow),
    ],
    ids=["norm fix", "closed form", "static", "all images"],
)
def test_siss_with_posterior_targets_comes_to_the_retained_images_score(build, options):
    """Nothing is ascended: it stays there, whatever the forget term weighs."""
    model = build([-0.2], [0.5], side=1)
    method = trained(model, spread(-0.5, 0.3), spread(0.3, 0.1, 200), build=SISS, forget_target="posterior", **options)
    unet = method.trained.backbone.unet
    assert unet.means.item() == pytest.approx(-0.5, abs=0.04)
    assert unet.log_stds.exp().item() == pytest.approx(0.3, abs=0.04)


def test_sisss_forget_term_is_the_loss_at_the_posterior_mean(model):
    """At the mixture's own samples; its weight there by trust, and its sign such that it is descended."""
    known, forget = images(23), images(8, seed=5)
    method = SISS(Setting(model, make_generator(0, "m")), adam, forget_target="posterior")
    method.begin(Images(Given(known), Given(forget)))
    timesteps, eps = torch.arange(8) * 120 + 20, torch.randn(forget.shape, generator=torch.Generator().manual_seed(3))
    batch = Batch(known[:8], forget, None, None, 0.1)
    noisings = [model.noising(x0, timesteps, None) for x0 in (batch.x0_retain, batch.x0_forget)]
    mixture = mix(batch, timesteps, *noisings, eps, torch.arange(8) % 2 == 0, 0.5)
    found = method._explained(mixture, noisings[1])
    wanted = brute_force(mixture.m, noisings[1], known)
    torch.testing.assert_close(found.x0, wanted)
    torch.testing.assert_close(noisings[1].scale * found.x0 + noisings[1].std * found.eps, mixture.m)
    astray = (found.eps - mixture.forget.eps).square().flatten(1).mean(1)
    torch.testing.assert_close(found.weight, mixture.forget.weight * (0.1 / astray).clamp(max=1))
    assert method.factors(batch) == (1.0, -1.0)
    assert SISS(Setting(model, make_generator(0, "m")), adam).factors(batch) == (1.0, 1.0)
