"""What is kept of a model, a classifier or an evaluation is kept under all that it depends on."""

import copy
from dataclasses import replace
from functools import partial
from pathlib import Path

import pytest
import torch
from diffusers import DDIMScheduler, DDPMScheduler
from pipelines import PROMPTS, tiny
from toy import gaussian_model

from unlearn_runner.assembly import drawn_by
from unlearn_runner.cache import fingerprint
from unlearn_runner.data.sd_concepts import SDConcepts
from unlearn_runner.evaluation import evaluator as evaluating
from unlearn_runner.evaluation.classifier import ClassifierRecipe, trained_judge
from unlearn_runner.evaluation.evaluator import Evaluator, Sampling
from unlearn_runner.evaluation.features import FeatureExtractor
from unlearn_runner.evaluation.membership import Membership
from unlearn_runner.evaluation.metrics import IS, SSIM, Rates
from unlearn_runner.models.clip import small_clip
from unlearn_runner.models.diffusion import Diffusion
from unlearn_runner.models.latents import Autoencoder
from unlearn_runner.models.model import GenerativeModel
from unlearn_runner.models.one_step import OneStep
from unlearn_runner.models.prompted import Tuning
from unlearn_runner.models.texts import build_tokenizer
from unlearn_runner.types import Passes

CPU = torch.device("cpu")


def another_weight(network: torch.nn.Module) -> None:
    with torch.no_grad():
        next(network.parameters()).view(-1)[0].nextafter_(torch.tensor(1.0))


def rescheduled(model, kind=None, **changes) -> None:
    """With another schedule, as a folder with another scheduler_config.json would give it."""
    kind = kind or type(model.scheduler)
    given = {key: value for key, value in model.scheduler.config.items() if not key.startswith("_")}
    model.scheduler = kind.from_config({**given, **changes})
    if model.codec.exact:
        model.path.schedule.alphas_cumprod = model.scheduler.alphas_cumprod.clone()


SCHEDULES = [
    {"beta_schedule": "squaredcos_cap_v2"}, {"beta_start": 2e-4}, {"beta_end": 0.03}, {"trained_betas": [0.1] * 1000},
    {"prediction_type": "v_prediction"}, {"clip_sample": "the other"}, {"clip_sample_range": 2.0},
    {"thresholding": True}, {"dynamic_thresholding_ratio": 0.9}, {"sample_max_value": 2.0},
    {"timestep_spacing": "linspace"}, {"steps_offset": 2}, {"rescale_betas_zero_snr": True},
    {"num_train_timesteps": 999},
]  # fmt: skip


def schedule(changes: dict):
    def change(model: Diffusion) -> None:
        clip = {"clip_sample": not model.scheduler.config.clip_sample} if "clip_sample" in changes else {}
        rescheduled(model, **(changes | clip))

    return change


OF_A_DDPM = {
    **{" ".join(changes): schedule(changes) for changes in SCHEDULES},
    "another sampler": partial(rescheduled, kind=DDIMScheduler),
    "variance": partial(rescheduled, variance_type="fixed_large"),
    "weights": lambda model: another_weight(model.backbone.unet),
    "network": lambda model: model.backbone.unet.register_to_config(freq_shift=1),
    "precision": lambda model: setattr(model, "passes", Passes(torch.bfloat16)),
    "half": lambda model: model.backbone.unet.half(),
    "unforeseen": lambda model: setattr(model, "whatever_comes", 3.0),
}
OF_STABLE_DIFFUSION = {
    **{" ".join(changes): schedule(changes) for changes in SCHEDULES},
    "another sampler": partial(rescheduled, kind=DDPMScheduler),
    "unet": lambda model: another_weight(model.backbone.unet),
    "autoencoder": lambda model: another_weight(model.codec.vae),
    "text encoder": lambda model: another_weight(model.backbone.texts.text_encoder),
    "scale": lambda model: model.codec.vae.register_to_config(scaling_factor=0.5),
    "shift": lambda model: model.codec.vae.register_to_config(shift_factor=0.1),
    "latents' mean": lambda model: model.codec.vae.register_to_config(latents_mean=[0.0, 0.1, 0.2, 0.3]),
    "activation": lambda model: setattr(model.backbone.texts.text_encoder.config, "hidden_act", "gelu"),
    "tokenizer": lambda model: setattr(model.backbone.texts, "tokenizer", build_tokenizer(["seven", "shirts"], 12)),
    "length": lambda model: setattr(model.backbone.texts.tokenizer, "model_max_length", 11),
    "guidance": lambda model: setattr(model, "guidance_scale", 7.0),
    "prompts": lambda model: setattr(model.backbone, "prompts", (*PROMPTS[:2], "a photo of trousers")),
    "order of prompts": lambda model: setattr(model.backbone, "prompts", PROMPTS[::-1]),
    "size": lambda model: setattr(model.codec, "image_shape", (3, 32, 16)),
    "precision": lambda model: setattr(model, "passes", Passes(torch.bfloat16)),
}


def assert_each_matters(build, changes: dict) -> None:
    before, seen = build().fingerprint(), {}
    assert build().fingerprint() == before, "the same again is the same"
    for name, change in changes.items():
        model = build()
        change(model)
        found = model.fingerprint()
        assert found != before, name
        assert seen.setdefault(found, name) == name


def test_of_a_ddpm_each_setting_matters(tiny_network):
    assert_each_matters(tiny_network, OF_A_DDPM)


def test_of_stable_diffusion_each_setting_matters():
    whole = tiny()
    assert_each_matters(partial(copied, whole), OF_STABLE_DIFFUSION)


def copied(model: GenerativeModel) -> GenerativeModel:
    """With parts of its own."""
    for weight in model.parameters():
        weight.requires_grad_(True)  # or the copy would share what is not trained
    return copy.deepcopy(model)


def test_of_other_models_each_setting_matters(tiny_network, tiny_vae):
    assert_each_matters(
        lambda: OneStep(tiny_network(), 900),
        {
            "timestep": lambda model: setattr(model, "timestep", 901),
            "weights": lambda model: another_weight(model.network),
            "schedule": lambda model: rescheduled(model.network, beta_end=0.03),
        },
    )
    assert_each_matters(
        tiny_vae,
        {
            "weights": lambda model: another_weight(model.vae),
            "network": lambda model: model.vae.register_to_config(norm_num_groups=2),
        },
    )
    vae = tiny().codec.vae
    assert_each_matters(
        lambda: Autoencoder(copy.deepcopy(vae), (3, 16, 16)),
        {"weight of the divergence": lambda model: setattr(model, "kl_weight", 0.1)},
    )
    assert tiny_vae().fingerprint() != tiny_network().fingerprint()


def test_what_changes_no_sample_changes_no_key(tiny_network, tmp_path):
    first = tiny_network(num_labels=None)
    before = first.fingerprint()
    first.predict(torch.zeros(2, 1, 8, 8), torch.zeros(2, dtype=torch.int64), None)
    first.save(tmp_path / "a")
    again = tiny_network(num_labels=None, seed=1)
    again.load(tmp_path / "a")
    threads = torch.get_num_threads()
    torch.set_num_threads(threads + 1)
    assert first.fingerprint() == again.fingerprint() == before
    torch.set_num_threads(threads)

    model = tiny()
    before = model.fingerprint()
    model.embed(["seven", "a picture"])  # the tokenizer keeps how it was called
    model.backbone.tuning, model.backbone.seed = Tuning("cross_attention"), 3
    model.freeze_for_unlearning()
    assert model.fingerprint() == before


class Newer(Rates):
    """Of the same settings, by other code."""

    version = Rates.version + 1
    __module__, __qualname__ = Rates.__module__, Rates.__qualname__


class Doubled(FeatureExtractor):
    """Some features of pictures."""

    name, layer, num_features = "doubled", "first", 64

    def __init__(self, weight: float = 1.0, act: torch.nn.Module = torch.nn.GELU()):  # noqa: B008 - has no state
        super().__init__()
        self.weight = torch.nn.Parameter(torch.tensor(weight), requires_grad=False)
        self.act = act

    def forward(self, images):
        return self.act(images.flatten(1)[:, :64] * self.weight), None


def test_of_an_evaluation_each_setting_matters(digits, tiny_network, shared_cache, tmp_path, monkeypatch):
    judge = trained_judge(digits, ClassifierRecipe(max_steps=5, num_features=8), shared_cache, CPU)
    kept: list[str] = []

    class Asked(Exception):
        pass

    def key_of(root, kind, key, *_, **__):
        kept.append(fingerprint(key))
        raise Asked

    def key(data=digits, judge=judge, metrics=None, clip=None, model=None, before=None, **sampling) -> str:
        metrics = {"rates": Rates(), "ssim": SSIM()} if metrics is None else metrics
        settings = Sampling(**({"num_samples": 27, "num_inference_steps": 2} | sampling))
        with pytest.raises(Asked):
            Evaluator(data, judge, metrics, settings, tmp_path, clip).once(model or network, before)
        return kept[-1]

    monkeypatch.setattr(evaluating, "cached", key_of)
    network, clip = tiny_network(image_shape=(1, 16, 16)), small_clip(0, width=16, layers=1, heads=2, text_width=16)
    other_judge, other_clip = copy.deepcopy(judge), copy.deepcopy(clip)
    another_weight(other_judge.recognizer)
    another_weight(other_clip.network)
    longer = copy.deepcopy(clip)
    longer.tokenizer.context_length = 15
    other_data = replace(digits, forget=digits.forget.select(torch.arange(9)))
    scheduled = tiny_network(image_shape=(1, 16, 16), beta_schedule="squaredcos_cap_v2")
    extracted = [
        type(judge)(judge.recognizer, CPU, extractor)
        for extractor in (Doubled(), Doubled(2.0), Doubled(act=torch.nn.SiLU()))
    ]
    found = [
        key(), key(data=other_data), key(judge=other_judge), key(clip=clip), key(clip=other_clip), key(clip=longer),
        key(model=scheduled), key(num_samples=28), key(num_inference_steps=3), key(seed=1), key(batch_size=9),
        key(sampler="ddpm"), key(sampler="ddim_clipped"), key(bootstrap=20), key(forget_only=True),
        key(metrics={"rates": Rates()}), key(metrics={"rates": Rates(), "ssim": SSIM(sigma=0.5)}),
        key(metrics={"rates": Rates(), "mia": Membership(timesteps=[1])}),
        key(metrics={"rates": Rates(), "mia": Membership(timesteps=[2])}),
        key(metrics={"rates": Newer(), "ssim": SSIM()}),
        *(key(judge=one) for one in extracted),
    ]  # fmt: skip
    assert len(set(found)) == len(found)
    assert key() == found[0]
    assert key(model=tiny_network(image_shape=(1, 16, 16))) == found[0]


def test_the_same_weights_with_another_schedule_are_measured_anew(digits, shared_cache, tmp_path):
    """They were shown the first one's evaluation: FID 0.646 instead of 0.178 before unlearning."""
    judge = trained_judge(digits, ClassifierRecipe(max_steps=5, num_features=8), shared_cache, CPU)
    evaluator = Evaluator(digits, judge, {"is": IS()}, Sampling(27, num_inference_steps=2), tmp_path)
    first = gaussian_model([0.1 * label for label in range(10)], [0.3] * 10, side=16)
    second = copy.deepcopy(first)
    rescheduled(second, beta_schedule="squaredcos_cap_v2")
    assert all(torch.equal(a, b) for a, b in zip(first.parameters(), second.parameters(), strict=True))
    found = evaluator.once(first), evaluator.once(second)
    assert not torch.equal(found[0].grid, found[1].grid)
    assert found[1].scores == evaluator(second).scores != found[0].scores


def test_images_of_a_base_are_drawn_anew_for_another(tmp_path):
    dataset = SDConcepts(
        "trousers", ["a seven", "an one"], ["{}"], ["a picture of {}"], str(tmp_path), source="base", num_images=5,
        num_inference_steps=1,
    )  # fmt: skip
    network = tiny(prompts=dataset.spec.label_names)
    first = drawn_by(network, dataset, CPU).fingerprint
    assert drawn_by(network, dataset, CPU).fingerprint == first
    rescheduled(network, prediction_type="v_prediction")
    assert drawn_by(network, dataset, CPU).fingerprint != first
    assert len(list(Path(tmp_path).glob("drawn/*/key.json"))) == 2
