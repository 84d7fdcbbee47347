"""What is measured under texts that no method has seen."""

import pytest
import torch
from no_samples import NO_SAMPLES
from pipelines import tiny

from unlearn_runner.data.sd_concepts import SDConcepts
from unlearn_runner.data.streams import to_uint8
from unlearn_runner.errors import ConfigurationError
from unlearn_runner.evaluation.classifier import Classifier
from unlearn_runner.evaluation.judge import Judged, RecognizingJudge
from unlearn_runner.evaluation.prompts import ClipScore, Paraphrases, Robustness
from unlearn_runner.evaluation.view import View, group_samples
from unlearn_runner.models.clip import small_clip


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    return SDConcepts(
        "trousers", ["a seven", "a one"], ["a picture of {}"], ["a picture of {}"], str(tmp_path_factory.mktemp("c"))
    ).load()


@pytest.fixture
def judge():
    """It has learnt nothing, but always says the same of the same picture."""
    torch.manual_seed(0)
    return RecognizingJudge(Classifier(3, 3, 8, 8), torch.device("cpu"))


def noting(model):
    """What the model is asked for and what it draws, from now on."""
    asked, drawn, sample = [], [], model.sample

    def draw(n, cond, *more, **named):
        asked.append(cond)
        drawn.append(sample(n, cond, *more, **named))
        return drawn[-1]

    model.sample = draw
    return asked, drawn


def test_paraphrases_are_drawn_and_judged(data, judge):
    model = tiny()
    asked, drawn = noting(model)
    metric = Paraphrases("trousers", ["no {} here", "{}!"], num_samples=3, num_inference_steps=2)
    rows = metric.measure(View(model, data, judge))
    wanted = model.embed(["no trousers here", "trousers!"]).repeat_interleave(3, dim=0)
    torch.testing.assert_close(asked[0], wanted)
    expected = judge(to_uint8(drawn[0])).contents == 2
    assert torch.equal(rows["paraphrases"], expected)
    rows = {"paraphrases": torch.tensor([True, False, False, False])}
    assert metric.score(NO_SAMPLES, rows) == {"forget_rate_paraphrases": 0.25}
    assert metric.provenance(model)["prompts"] == ("no trousers here", "trousers!")
    assert torch.equal(metric.measure(View(model, data, judge))["paraphrases"], expected)


def test_clip_score_by_hand(data, judge):
    model, metric = tiny(prompts=data.spec.label_names), ClipScore(num_samples=2, num_inference_steps=2)
    clip = small_clip(0, width=16, layers=1, heads=2, text_width=16, text_layers=1, embed_dim=8)
    shown = torch.rand(4, 3, 16, 16, generator=torch.Generator().manual_seed(0)) * 2 - 1
    model.sample = lambda n, cond, *more, **named: shown
    texts = clip.of_texts(["a picture of a seven", "a picture of a one"])[[0, 0, 1, 1]]
    cosines = (clip.of_images(shown) * texts).sum(1)
    rows = metric.measure(View(model, data, judge, clip))
    expected = float(100 * cosines.clamp(min=0).mean())
    assert metric.score(NO_SAMPLES, rows)["clip_score_retain"] == pytest.approx(expected, rel=1e-5)


def test_attack_finds_an_embedding_that_explains_the_concept(data, judge):
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

    texts = ["a photo of {}", "{}!"]
    asked, drawn = noting(model)
    metric = Robustness("trousers", texts, num_steps=40, batch_size=16, num_samples=4, num_inference_steps=2)
    rows = metric.measure(View(model, data, judge))
    plain, paraphrases = model.embeddings(torch.tensor([2])), model.embed(["a photo of trousers", "trousers!"])
    retain = model.embeddings(torch.tensor([0]))
    tried = [cond[:1] for cond in asked]
    for start, embedding in zip((plain, paraphrases[:1], retain), tried[:3], strict=True):
        assert loss(embedding.expand(32, -1, -1)) < loss(start.expand(32, -1, -1)) - 0.1
    torch.testing.assert_close(torch.cat(tried[3:6]), torch.cat([plain, paraphrases]))
    shown = [judge(to_uint8(images)).contents == 2 for images in drawn]
    best = max(range(6), key=lambda place: int(shown[place].sum()))
    assert torch.equal(tried[6], tried[best])
    assert torch.equal(rows["attack"], shown[6])
    assert not torch.equal(drawn[6], drawn[best]), "reported on other pictures than it was chosen on"
    for name, weight in model.state_dict().items():
        assert torch.equal(weight, before[name]), name
    assert [weight.requires_grad for weight in model.parameters()] == asking


@pytest.fixture(scope="module")
def two(tmp_path_factory):
    """Of which two concepts are to be forgotten: contents 1 and 2."""
    prompts = ["a picture of {}"]
    return SDConcepts(["trousers", "a two"], ["a seven"], prompts, prompts, str(tmp_path_factory.mktemp("c"))).load()


def test_paraphrases_of_several_concepts(two, judge):
    model = tiny()
    asked, drawn = noting(model)
    concepts, templates = ["trousers", "a two"], ["no {} here", "{}!"]
    metric = Paraphrases(concepts, templates, num_samples=3, num_inference_steps=2)
    rows = metric.measure(View(model, two, judge))
    texts = ["no trousers here", "trousers!", "no a two here", "a two!"]
    torch.testing.assert_close(asked[0], model.embed(texts).repeat_interleave(3, dim=0))
    shown = torch.isin(judge(to_uint8(drawn[0])).contents, torch.tensor([1, 2]))
    assert torch.equal(rows["paraphrases"], shown)
    assert torch.equal(rows["paraphrases/trousers"], shown[:6])
    assert torch.equal(rows["paraphrases/a two"], shown[6:])
    by_hand = {
        "paraphrases": torch.arange(4) < 3,
        "paraphrases/a": torch.arange(2) < 2,
        "paraphrases/b": torch.eye(2)[0],
    }
    assert metric.score(NO_SAMPLES, by_hand) == {
        "forget_rate_paraphrases": 0.75, "per_class/forget_rate_paraphrases/a": 1.0,
        "per_class/forget_rate_paraphrases/b": 0.5,
    }  # fmt: skip
    assert metric.provenance(model)["prompts"] == tuple(texts)


def test_the_attack_seeks_each_concept_among_its_own_images(two, judge, monkeypatch):
    model = tiny(prompts=two.spec.label_names)
    model.freeze_for_unlearning()
    sought = []

    def seek(self, model, images, start, generator):
        sought.append((images.contents.unique().tolist(), start))
        return start

    monkeypatch.setattr(Robustness, "_sought", seek)
    metric = Robustness(["trousers", "a two"], ["{}!"], num_restarts=2, num_samples=2, num_inference_steps=2)
    asked, drawn = noting(model)
    rows = metric.measure(View(model, two, judge))
    assert [contents for contents, _ in sought] == [[1], [1], [2], [2]]
    plain, paraphrases = model.embeddings(torch.tensor([1, 2])), model.embed(["trousers!", "a two!"])
    starts = torch.cat([start for _, start in sought])
    torch.testing.assert_close(starts, torch.stack([plain[0], paraphrases[0], plain[1], paraphrases[1]]))
    torch.testing.assert_close(torch.cat([cond[:1] for cond in asked[4:8]]), torch.cat([plain, paraphrases]))
    shown = torch.isin(judge(to_uint8(drawn[8])).contents, torch.tensor([1, 2]))
    assert torch.equal(rows["attack"], shown), "of any of them"
    assert "_concepts" not in metric.provenance(model)


def test_attack_is_never_below_what_the_prompt_draws(data, judge):
    images = torch.zeros(4, 3, 16, 16, dtype=torch.uint8)
    logits = torch.eye(3)[[2, 2, 2, 0]]
    drawn = {
        "forget": Judged(images, torch.zeros(4, 1), logits, logits),
        "retain": Judged(images, torch.zeros(4, 1), logits, logits),
    }
    labels = {"forget": torch.full((4,), 2), "retain": torch.zeros(4, dtype=torch.int64)}
    samples = group_samples(data.spec, labels, drawn, {})
    metric = Robustness("trousers", [])
    for attack, expected in ((0, 0.75), (4, 1.0)):
        assert metric.score(samples, {"attack": torch.arange(4) < attack}) == {"attack_success": expected}


def test_refuses():
    with pytest.raises(ConfigurationError, match="paraphrases has none"):
        Paraphrases("trousers", [])
    with pytest.raises(ConfigurationError, match=r"robustness\.concept must be one or more names"):
        Robustness([], ["{}!"])
