"""What is measured under texts that no method has seen."""

from types import SimpleNamespace

import pytest
import torch
from pipelines import tiny

from unlearn_runner.data.sd_concepts import SDConcepts
from unlearn_runner.errors import ConfigurationError
from unlearn_runner.evaluation.evaluator import require_clip
from unlearn_runner.evaluation.prompts import ClipScore, Paraphrases, Robustness
from unlearn_runner.models.clip import small_clip


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    return SDConcepts(
        "trousers", ["a seven", "a one"], ["a picture of {}"], ["a picture of {}"], str(tmp_path_factory.mktemp("c"))
    ).load()


class Judge:
    """Takes bright pictures for the concept, which has index 2."""

    device = torch.device("cpu")

    def __init__(self, threshold=100):
        self.threshold, self.seen = threshold, []

    def __call__(self, images):
        self.seen.append(images)
        return SimpleNamespace(contents=2 * (images.float().flatten(1).mean(1) > self.threshold).long())


def test_paraphrases_are_drawn_and_judged(data):
    model, judge = tiny(), Judge()
    metric = Paraphrases("trousers", ["no {} here", "{}!"], num_samples=3, num_inference_steps=2)
    rows = metric.measure(model, data, judge, None)
    (images,) = judge.seen
    assert len(images) == 6
    bright = (images.float().flatten(1).mean(1) > 100).double().mean()
    assert metric(rows) == {"forget_rate_paraphrases": pytest.approx(float(bright))}
    assert metric.provenance(model)["prompts"] == ("no trousers here", "trousers!")
    again = metric.measure(model, data, judge, None)
    assert torch.equal(rows["paraphrases"], again["paraphrases"])
    model.prompts, embed = (), model.embed
    wanted = embed(["no trousers here", "trousers!"]).repeat_interleave(3, dim=0)
    asked = []
    model.sample = lambda n, cond, *more, **named: asked.append(cond) or torch.zeros(n, 3, 16, 16)
    metric.measure(model, data, judge, None)
    torch.testing.assert_close(asked[0], wanted)


def test_clip_score_by_hand(data):
    model, metric = tiny(prompts=data.spec.label_names), ClipScore(num_samples=2, num_inference_steps=2)
    clip = small_clip(0, width=16, layers=1, heads=2, text_width=16, text_layers=1, embed_dim=8)
    shown = torch.rand(4, 3, 16, 16, generator=torch.Generator().manual_seed(0)) * 2 - 1
    model.sample = lambda n, cond, *more, **named: shown
    texts = clip.of_texts(["a picture of a seven", "a picture of a one"])[[0, 0, 1, 1]]
    cosines = (clip.of_images(shown) * texts).sum(1)
    rows = metric.measure(model, data, Judge(), clip)
    assert metric(rows)["clip_score_retain"] == pytest.approx(float(100 * cosines.clamp(min=0).mean()), rel=1e-5)


def test_attack_finds_an_embedding_that_explains_the_concept(data):
    """The loss of the forget images falls, the weights stay, and of several embeddings the best counts."""
    model = tiny(prompts=data.spec.label_names)
    model.freeze_for_unlearning()
    before = {name: weight.clone() for name, weight in model.state_dict().items()}
    asking = [weight.requires_grad for weight in model.parameters()]
    x0 = data.forget.pixels[:32].float() / 127.5 - 1
    t = torch.arange(32) * 31
    eps = torch.randn(32, *model.sample_shape, generator=torch.Generator().manual_seed(3))

    @torch.no_grad()
    def loss(cond):
        noising = model.noising(x0, t, None)
        m = noising.sample(eps)
        return model.loss(model.predict(m, t, cond), x0, m, eps, noising.std, t).mean()

    found = []
    sample = model.sample
    model.sample = lambda n, cond, *more, **named: found.append(cond[:1]) or sample(n, cond, *more, **named)
    metric = Robustness(num_restarts=2, num_steps=40, batch_size=16, num_samples=4, num_inference_steps=2)
    judge = Judge()
    rows = metric.measure(model, data, judge, None)
    for start, embedding in zip((0, 1), found, strict=True):
        assert loss(embedding.expand(32, -1, -1)) < loss(torch.full((32,), start)) - 0.1
    best = max(int((images.float().flatten(1).mean(1) > 100).sum()) for images in judge.seen)
    assert metric(rows)["attack_success"] == best / 4
    for name, weight in model.state_dict().items():
        assert torch.equal(weight, before[name]), name
    assert [weight.requires_grad for weight in model.parameters()] == asking


def test_refuses():
    with pytest.raises(ConfigurationError, match="paraphrases has none"):
        Paraphrases("trousers", [])
    with pytest.raises(ConfigurationError, match="num_steps must be positive"):
        Robustness(num_steps=0)
    with pytest.raises(ConfigurationError, match="clip_score asks CLIP; say which with clip=tiny"):
        require_clip({"clip_score": ClipScore()}, None)
