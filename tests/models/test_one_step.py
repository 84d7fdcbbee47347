"""The one-step generator: one network evaluation an image, saved and loaded, and what it cannot be asked."""

import pytest
import torch
from diffusers import DDPMScheduler, UNet2DModel
from test_train import summary

from unlearn_runner.errors import ConfigurationError
from unlearn_runner.models.ddpm import build_ddpm
from unlearn_runner.models.model import predict_eps, predict_x0
from unlearn_runner.models.one_step import OneStep, OneStepPipeline

LABELS = torch.tensor([4, 1, 9])


@pytest.mark.parametrize("prediction_type", ["epsilon", "v_prediction"])
def test_an_image_is_the_networks_guess_at_pure_noise(tiny_network, prediction_type):
    network = tiny_network(prediction_type=prediction_type)
    model = OneStep(network, 440)
    images = model.sample(3, LABELS, torch.Generator().manual_seed(5), num_inference_steps=25)
    assert model.network_evaluations == 3, "one each, however many steps are asked for"
    z = torch.randn(3, 1, 8, 8, generator=torch.Generator().manual_seed(5))
    prediction = network.backbone.unet(z, torch.full((3,), 440), class_labels=LABELS).sample
    gamma, sigma = network.path.amplitudes(torch.tensor([440]))
    x0 = gamma * z - sigma * prediction if prediction_type == "v_prediction" else (z - sigma * prediction) / gamma
    torch.testing.assert_close(images, x0.clamp(-1, 1))


def test_the_guess_of_x0_and_the_noise_agree(tiny_network):
    network = tiny_network(prediction_type="v_prediction")
    x0, eps = torch.randn(2, 3, 1, 8, 8, generator=torch.Generator().manual_seed(0))
    timesteps = torch.tensor([1, 300, 700])
    eps_pred, x_t = predict_eps(network, x0, eps, timesteps, LABELS)
    gamma, sigma = network.path.amplitudes(timesteps)
    torch.testing.assert_close(gamma * predict_x0(network, x_t, timesteps, LABELS) + sigma * eps_pred, x_t)


def test_saved_folder_draws_the_same_images(tiny_network, tmp_path):
    model = OneStep(tiny_network(), 440)
    model.save(tmp_path)
    ours = model.sample(3, LABELS, torch.Generator().manual_seed(5), 25)
    pipeline = OneStepPipeline.from_pretrained(tmp_path)
    assert torch.equal(pipeline(LABELS, torch.Generator().manual_seed(5)), ours)
    assert torch.equal(pipeline([4, 1, 9], torch.Generator().manual_seed(5)), ours)
    assert not torch.equal(pipeline(LABELS), pipeline(LABELS)), "without a generator each call draws anew"
    other = OneStep(tiny_network(seed=1), 7)
    other.load(tmp_path)
    assert torch.equal(other.sample(3, LABELS, torch.Generator().manual_seed(5), 25), ours)
    unet = UNet2DModel.from_pretrained(tmp_path, subfolder="unet")
    assert unet.config.num_class_embeds == 10
    assert DDPMScheduler.from_pretrained(tmp_path, subfolder="scheduler").config.num_train_timesteps == 1000


def test_a_generator_is_no_base(tiny_network, tmp_path):
    OneStep(tiny_network(), 440).save(tmp_path)
    with pytest.raises(ConfigurationError, match="got a one-step generator"):
        build_ddpm((1, 8, 8), tuple("0123456789"), 0, str(tmp_path), [8], [False])
    with pytest.raises(ConfigurationError, match=r"lie in 0\.\.999, got 1000"):
        OneStep(tiny_network(), 1000)


def test_ratios_are_the_papers_timesteps_on_its_schedule(tiny_network):
    linear, cosine = tiny_network(), tiny_network(beta_schedule="squaredcos_cap_v2")
    ratios = (2.502, 0.137, 13.01)
    assert [linear.path.timestep_with_ratio(ratio, "x") for ratio in ratios] == [440, 38, 711]
    for ratio in ratios:
        gamma, sigma = cosine.path.amplitudes(torch.tensor([cosine.path.timestep_with_ratio(ratio, "x")]))
        assert (sigma / gamma).item() == pytest.approx(ratio, rel=0.03)
    stable = tiny_network(beta_schedule="scaled_linear", beta_start=0.00085, beta_end=0.012)
    ours = [stable.path.timestep_with_ratio(ratio, "x") for ratio in ratios]
    assert ours == [625, 20, 980], "the paper has 625, 20, 979 on Stable Diffusion: the same noise"
    with pytest.raises(ConfigurationError, match=r"x must be a ratio .* 0\.01 to 157; got 200"):
        linear.path.timestep_with_ratio(200.0, "x")


@pytest.mark.slow
def test_a_run_of_distillation_is_evaluated_like_any_other(run):
    """Without what a model without a likelihood cannot be asked; the base has it."""
    folder = run("method=sfd", "evaluation=full", "evaluation.oracle=true")
    content = summary(folder)
    assert content["status"] == "finished"
    metrics = content["metrics"]
    for name in ("forget_rate", "retain_accuracy", "fid_retain", "ssim_retain"):
        assert {f"base/{name}", f"eval/{name}", f"oracle/{name}"} <= set(metrics)
    assert {"base/nll_retain", "base/mia_auc", "oracle/relearn_steps"} <= set(metrics)
    assert not {"eval/nll_retain", "eval/mia_auc", "eval/relearn_steps"} & set(metrics)
    assert metrics["cost/network_evaluations_per_sample"] == 1.0
    assert metrics["cost/images"] == 0
    assert OneStepPipeline.from_pretrained(folder / "model")([1, 7]).shape == (2, 1, 16, 16)
