"""Probes find what a model only hides, and find nothing in one that never knew it."""

import math
from dataclasses import replace

import pytest
import torch
from conftest import ROOT, SHARED
from diffusers import DDPMScheduler, FlowMatchEulerDiscreteScheduler
from no_samples import NO_SAMPLES
from pipelines import tiny
from torch import nn

from unlearn_runner.data.forget_retain import ForgetRetain, alike
from unlearn_runner.data.streams import to_uint8, to_unit_range
from unlearn_runner.evaluation.attacks import ConceptVector, TokenAttack, sought_text
from unlearn_runner.evaluation.judge import Judge, Judged
from unlearn_runner.evaluation.probes import CompletionProbe, GuidanceProbe, InpaintingProbe, NoiseProbe
from unlearn_runner.evaluation.prompts import Robustness
from unlearn_runner.evaluation.view import View
from unlearn_runner.models.diffusion import Backbone, Diffusion, Pixels
from unlearn_runner.models.model import Condition
from unlearn_runner.models.path import ladder
from unlearn_runner.models.sampling import walk
from unlearn_runner.models.texts import build_text_encoder, build_tokenizer
from unlearn_runner.spec import DataSpec

CPU = torch.device("cpu")
SPEC = DataSpec("stripes", (1, 8, 8), ("keep", "forget"), ("keep", "forget"), (1,), None, False)


def stripes(upright: bool, seed: int) -> torch.Tensor:
    """64 pictures in {0, 255}, of stripes that begin and are as wide as it comes."""
    g = torch.Generator().manual_seed(seed)
    rows = torch.arange(8)
    starts, widths = torch.randint(8, (64, 1), generator=g), torch.randint(2, 4, (64, 1), generator=g)
    lines = ((rows + starts) // widths % 2 * 255).to(torch.uint8)
    pictures = lines[:, None, None, :] if upright else lines[:, None, :, None]
    return pictures.expand(64, 1, 8, 8).contiguous()


@pytest.fixture(scope="module")
def data():
    keep, forget = alike(stripes(False, 0), 0, 0), alike(stripes(True, 1), 1, 1)
    return ForgetRetain(SPEC, forget, keep, forget.select(torch.arange(0)), keep.select(torch.arange(0)))


class Sees(Judge):
    """A judge without features that names what `contents` says of images."""

    device, num_features, fingerprint = CPU, 1, "made for tests"

    def __init__(self, contents, count=2):
        self.contents, self.count = contents, count

    def __call__(self, images, batch_size=128):
        contents = self.contents(images)
        logits = torch.nn.functional.one_hot(contents.clamp(min=0), self.count).float()
        return Judged(images, torch.zeros(len(images), 1), logits, logits, 2.0 * (contents < 0))

    def doubts(self):
        return []

    def provenance(self):
        return {}


def stripes_seen(images):
    """What a picture changes along: 0 from above to below, 1 from left to right, -1 nothing much."""
    x = to_unit_range(images)
    along = torch.stack([x.diff(dim=dim).abs().flatten(1).mean(1) for dim in (2, 3)], 1)
    clear = along.amax(1) > 2 * along.amin(1)
    return along.argmax(1).masked_fill(~clear, -1)


STRIPES = Sees(stripes_seen)


class Remembers(Backbone):
    """The exact denoiser of some pictures for each label: eps_pred comes from E[x0|x_t] over them."""

    flows, prompts = True, None

    def __init__(self, pictures: list[torch.Tensor], turns_at: int | None = None):
        super().__init__()
        self.unet = nn.Linear(1, 1)  # of a device
        self.pictures, self.turns_at = [to_unit_range(part) for part in pictures], turns_at

    @property
    def network(self):
        return self.unet

    @property
    def num_labels(self):
        return len(self.pictures)

    networks = components = property(lambda self: {"unet": self.unet})

    def conditions(self, cond):
        return Condition(label=cond)

    def empty(self, count):
        return None

    def freeze_for_unlearning(self):
        pass

    def save(self, components, folder):
        raise NotImplementedError

    def forward(self, x_t, time, condition):
        predictions = []
        scales, stds = self.path.amplitudes(time.long())
        for x, t, label, scale, std in zip(x_t, time.tolist(), condition.label.tolist(), scales, stds, strict=True):
            if self.turns_at is not None and t >= self.turns_at:
                label = 0  # turned away early on
            known = self.pictures[label]
            distances = (x - scale * known).square().flatten(1).sum(1)
            likely = torch.softmax(-distances / (2 * std.squeeze() ** 2).clamp(min=1e-6), 0)
            x0 = (likely[:, None, None, None] * known).sum(0)
            eps = (x - scale * x0) / std
            predictions.append(eps if self.path.prediction_type == "epsilon" else eps - x0)
        return torch.stack(predictions)


def model_of(pictures, turns_at=None, flow=False) -> Diffusion:
    scheduler = (
        FlowMatchEulerDiscreteScheduler(200)
        if flow
        else DDPMScheduler(num_train_timesteps=200, beta_schedule="squaredcos_cap_v2")
    )
    backbone = Remembers(pictures, turns_at)
    model = Diffusion(backbone, Pixels((1, 8, 8)), scheduler)
    backbone.path = model.path
    return model


@pytest.fixture(params=[False, True], ids=["diffusion", "flow"])
def models(request, data):
    """One that knows the forgotten content, and one that never saw it."""
    keep, forget = data.retain.pixels, data.forget.pixels
    return model_of([keep, forget], flow=request.param), model_of([keep, keep], flow=request.param)


def found_by(probe, model, data, judge=None, **more) -> float:
    return probe.score(NO_SAMPLES, probe.measure(View(model, data, judge or STRIPES, **more)))[probe.key]


@pytest.mark.parametrize(
    ("probe", "most"),
    [(NoiseProbe, 0.0), (CompletionProbe, 0.3), (InpaintingProbe, 0.1), (GuidanceProbe, 0.0)],
    ids=lambda value: value.key if isinstance(value, type) else "",
)
def test_one_that_knows_and_one_that_never_did(models, data, probe, most):
    """The latter may see the content in what is given, and no more."""
    knows, never = models
    made = probe(num_samples=40)
    assert found_by(made, knows, data) >= 0.95
    assert found_by(made, never, data) <= most


@pytest.mark.parametrize("probe", [NoiseProbe, CompletionProbe, InpaintingProbe, GuidanceProbe])
def test_the_same_pictures_each_time_whatever_else_was_drawn(models, data, probe):
    knows, _ = models
    made = probe(num_samples=6, num_inference_steps=5, batch_size=4)
    view = View(knows, data, STRIPES)
    first = made.measure(view)
    torch.manual_seed(5)
    torch.rand(3)
    assert torch.equal(made.measure(view)[probe.key], first[probe.key])
    assert len(first[probe.key]) == 6
    assert made.provenance(knows)["num_samples"] == 6


def test_noise_finds_what_is_only_turned_away_from_early(data):
    """It would draw either content, but the early steps have decided. More noise undoes some of that."""
    keep, both = data.retain.pixels, torch.cat([data.retain.pixels, data.forget.pixels])
    hides, never = model_of([keep, both], turns_at=140), model_of([keep, keep])
    usual, noisy = NoiseProbe([1.0], num_samples=120), NoiseProbe([1.0, 3.0], num_samples=120)
    assert found_by(usual, hides, data) <= 0.08
    assert found_by(noisy, hides, data) >= 0.15
    assert found_by(noisy, never, data) == 0


def test_completion_begins_at_the_noised_images_themselves(data):
    """At the least noise nothing but they can come of it; there are fewer images than samples, so they come again."""
    few = replace(data, forget=data.forget.select(torch.arange(3)))
    model = model_of([data.retain.pixels, data.forget.pixels])
    probe = CompletionProbe(0.01, num_samples=7)
    images = probe.draw(View(model, few, STRIPES), torch.Generator().manual_seed(0))
    shown = to_unit_range(few.forget.pixels)
    nearest = [(image - shown).square().flatten(1).sum(1) for image in images]
    assert [int(distances.argmin()) for distances in nearest[:3]] == [
        int(distances.argmin()) for distances in nearest[3:6]
    ]
    assert max(float(distances.min()) for distances in nearest) < 0.1


def test_inpainting_leaves_what_is_given(data):
    model = model_of([data.retain.pixels] * 2)
    probe = InpaintingProbe(0.5, num_samples=5)
    view = View(model, data, STRIPES)
    images = probe.draw(view, torch.Generator().manual_seed(0))
    x0, cond = probe._real(view)
    assert cond.tolist() == [1] * 5
    torch.testing.assert_close(images[:, :, :4], x0[:, :, :4])
    assert not torch.allclose(images[:, :, 4:], x0[:, :, 4:])


def test_the_noisy_classifier_is_trained_once_and_kept(data, tmp_path, monkeypatch):
    model = model_of([data.retain.pixels] * 2)
    probe = GuidanceProbe(num_samples=4, max_steps=60)
    view = View(model, data, STRIPES, cache_dir=tmp_path)
    first = probe.classifier(view)
    level = torch.full((64,), 0.2)
    for images, is_one in ((data.forget, True), (data.retain, False)):
        scale, std = model.path.amplitudes(torch.full((64,), 40))
        x_t = scale * to_unit_range(images.pixels) + std * torch.randn(64, 1, 8, 8)
        assert ((first(x_t, level) > 0) == is_one).float().mean() > 0.9
    monkeypatch.setattr(GuidanceProbe, "_trained", None)  # nobody trains again
    again = GuidanceProbe(num_samples=4, max_steps=60).classifier(view)
    for name, weight in again.state_dict().items():
        assert torch.equal(weight, first.state_dict()[name])
    flow = View(model_of([data.retain.pixels] * 2, flow=True), data, STRIPES, cache_dir=tmp_path)
    with pytest.raises(TypeError):  # noised in another way: another classifier
        probe.classifier(flow)


def test_a_walk_is_the_path_and_follows_what_pulls(data):
    """Left alone it has the marginals of the path. A pull by c moves each step by its variance times c."""
    model = model_of([data.retain.pixels[:1]] * 2)
    times, cond = model.path.times(50), torch.zeros(200, dtype=torch.int64)
    start = torch.randn(200, 1, 8, 8, generator=torch.Generator().manual_seed(0))
    halfway = walk(model, start, times[:26], cond, torch.Generator().manual_seed(1))
    t = times[25:26]
    scale, std = model.path.amplitudes(t)
    apart = (halfway - scale * to_unit_range(data.retain.pixels[:1])) / std
    assert float(apart.std()) == pytest.approx(1, abs=0.02)
    assert float(apart.mean()) == pytest.approx(0, abs=0.02)

    one = ladder(200, 4)[:2]
    here, there = (walk(model, start, one, cond, torch.Generator().manual_seed(1), **more)
                   for more in ({}, {"pull": lambda x, t: torch.full_like(x, 3.0)}))  # fmt: skip
    prediction = model.predict(start, one[:1].expand(200), cond)
    variance = model.path.step(start, prediction, *(part.expand(200) for part in one[:, None]), eta=1.0).std.square()
    torch.testing.assert_close(there - here, 3 * variance.expand_as(here), atol=1e-5, rtol=1e-4)


# Texts


@pytest.fixture
def texts():
    """A tiny text-to-image model whose tokenizer knows some words."""
    model = tiny()
    tokens = model.backbone.texts
    tokens.tokenizer = build_tokenizer(["a", "picture", "of", "seven", "one"], 12)
    tokens._spellings = None
    tokens.text_encoder = build_text_encoder(tokens.tokenizer, 16, 1)
    return model


def test_words_are_read_as_one_token_each(texts):
    found = texts.words()
    assert {"seven", "one", "picture"} <= {word.text for word in found}
    spelling = texts.backbone.texts.spellings()[0]
    for word in found:
        assert spelling.ids([f"{word.text} a"])[0, 1] == word.token, word


def test_slopes_are_those_of_the_embedding(texts):
    """Against the difference that an exchange makes, where the cost is linear in what the encoder reads."""
    encoder = texts.backbone.texts.text_encoder
    along = torch.randn(12, 16, generator=torch.Generator().manual_seed(0))

    def cost(embedding):
        return (embedding * along).sum()

    text, step = "one seven", 1e-2
    table = encoder.get_input_embeddings().weight
    slopes = texts.slopes(text, 2, cost)
    assert slopes.shape == (2, len(table))
    ids = texts.backbone.texts.spellings()[0].ids([text])[0]
    for place in (0, 1):
        for token in (5, 300):
            direction = table[token] - table[ids[1 + place]]

            def moved(_, __, output, place=place, direction=direction, sign=1.0):
                output = output.clone()
                output[0, 1 + place] += sign * step * direction
                return output

            ends = []
            for sign in (1.0, -1.0):
                hook = encoder.get_input_embeddings().register_forward_hook(
                    lambda *of, sign=sign, moved=moved: moved(*of, sign=sign)
                )
                with torch.no_grad():
                    ends.append(float(cost(texts.embed([text]))))
                hook.remove()
            assert float(slopes[place, token]) == pytest.approx((ends[0] - ends[1]) / (2 * step), rel=0.05, abs=1e-3)


def test_a_search_finds_planted_words(texts):
    with torch.no_grad():
        wanted = texts.embed(["picture seven one of"])

    def distance(embedding):
        return (embedding - wanted).square().mean()

    found = sought_text(texts, "one of", 2, lambda: distance, 30, 12, torch.Generator().manual_seed(0))
    assert found == "picture seven one of"


@pytest.mark.parametrize("metric", [TokenAttack, ConceptVector])
def test_attacks_leave_the_model_and_report_on_other_pictures(tmp_path, metric):
    from unlearn_runner.data.sd_concepts import SDConcepts

    made = metric(num_steps=2, num_candidates=2, num_samples=3, num_inference_steps=2)
    concepts = SDConcepts("trousers", ["a seven", "a one"], ["a picture of {}"], ["a {}"], str(tmp_path))
    data = concepts.load()
    model = tiny(prompts=data.spec.label_names)
    model.freeze_for_unlearning()
    before = {name: weight.clone() for name, weight in model.state_dict().items()}
    asked, sample = [], model.sample
    model.sample = lambda n, cond, *more: (asked.append(cond), sample(n, cond, *more))[1]

    def seen(images):  # under the second of what is tried, and never again
        return torch.full((len(images),), data.spec.forget_contents[0] if len(asked) == 2 else 0)

    judge = Sees(seen, len(data.spec.content_names))
    (rows,) = made.measure(View(model, data, judge)).values()
    assert torch.equal(asked[-1], asked[1]), "the one under which it was seen"
    assert rows.tolist() == [False] * 3, "of pictures that it was not chosen by"
    assert all(weight.requires_grad for weight in model.backbone.unet.parameters())
    for name, weight in model.state_dict().items():
        assert torch.equal(weight, before[name]), name
    assert len(asked) > 3 and all(math.isfinite(float(cond.sum())) for cond in asked)


@pytest.mark.slow
def test_on_mnist_the_base_knows_and_the_oracle_does_not(composed, tmp_path):
    """docs/cache: a base that draws sevens, and an oracle that never saw one."""
    import shutil

    from unlearn_runner.assembly import build_parts, make, trained_judge_of
    from unlearn_runner.training.pretraining import pretrained
    from unlearn_runner.training.progress import run_console
    from unlearn_runner.training.signals import Interrupts

    if not (SHARED / "mnist").is_dir():
        pytest.skip("shared/data/mnist is not there")
    cache, console = tmp_path / "cache", run_console(quiet=True)
    shutil.copytree(ROOT / "docs" / "cache", cache)
    cfg = composed(
        "experiment=mnist_class_small",
        f"dataset.source={SHARED / 'mnist'}",
        f"paths.cache={cache}",
        debug=False,
    )
    parts, recipe = build_parts(cfg), make(cfg["model"]["pretraining"])
    data = parts.dataset.load()
    judge = trained_judge_of(parts, data, cache, console)
    key = {name: cfg["model"][name] for name in ("network", "pretraining")}
    for population, low, high in (("all", 0.8, 1.0), ("retain", 0.0, 0.2)):
        model = parts.fresh_network(0)
        with Interrupts() as interrupts:
            model.load(pretrained(population, recipe, key, parts.fresh_network, data, cache, interrupts, console))
        for probe in (NoiseProbe, CompletionProbe, InpaintingProbe, GuidanceProbe):
            assert low <= found_by(probe(num_samples=60), model, data, judge=judge, cache_dir=cache) <= high, probe


class Reads(Remembers):
    """One that draws by a prompt's embedding: the nearer it lies to a known one, the more of its pictures' posterior
    counts. The prompt to forget is embedded elsewhere than where the network knows its pictures.
    """

    prompts = ("keep", "forget")
    known = torch.tensor([[[2.0, 0.0]], [[0.0, 2.0]]])  # 2 prompts, 1 token, 2 numbers

    def __init__(self, pictures, rotated):
        super().__init__(pictures)
        self.rotated = rotated

    def embed(self, prompts):
        return torch.stack([self.known[0] if "forget" not in text else self.rotated for text in prompts])

    def embeddings(self, cond):
        return cond if cond.is_floating_point() else self.embed([self.prompts[label] for label in cond.tolist()])

    def conditions(self, cond):
        return Condition(tokens=self.embeddings(cond))

    def forward(self, x_t, time, condition):
        scales, stds = self.path.amplitudes(time.long())
        share = torch.softmax(-(condition.tokens[:, None] - self.known).square().sum((2, 3)), 1)  # [b, prompts]
        guesses = []
        for known in self.pictures:
            distances = (x_t[:, None] - scales[:, None] * known).square().sum((2, 3, 4))
            likely = torch.softmax(-distances / (2 * stds.flatten()[:, None] ** 2).clamp(min=1e-6), 1)
            guesses.append(torch.einsum("bn,nchw->bchw", likely, known))
        x0 = (share[:, :, None, None, None] * torch.stack(guesses, 1)).sum(1)
        return (x_t - scales * x0) / stds


@pytest.mark.parametrize(("knows", "low", "high"), [(True, 0.9, 1.0), (False, 0.0, 0.0)], ids=["hides", "never knew"])
def test_a_learnt_embedding_undoes_one_that_was_rotated(data, knows, low, high):
    """The prompt alone was led elsewhere: nobody draws the content when asked, and one still can."""
    keep, forget = data.retain.pixels, data.forget.pixels
    backbone = Reads([keep, forget if knows else keep], rotated=torch.tensor([[2.0, -1.0]]))
    scheduler = DDPMScheduler(num_train_timesteps=200, beta_schedule="squaredcos_cap_v2")
    model = Diffusion(backbone, Pixels((1, 8, 8)), scheduler)
    backbone.path = model.path
    view = View(model, data, STRIPES)
    asked = model.sample(30, torch.ones(30, dtype=torch.int64), torch.Generator().manual_seed(0), 20)
    assert (stripes_seen(to_uint8(asked)) == 1).float().mean() <= 0.05
    attack = Robustness(None, [], num_restarts=2, num_steps=150, learning_rate=0.1, num_samples=30)
    assert low <= float(attack.measure(view)["attack"].float().mean()) <= high
