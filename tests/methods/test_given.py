"""A model that was unlearned elsewhere: what its folder holds is what is measured."""

import json
import shutil

import pytest
import torch
from conftest import weights_of
from diffusers import EDMEulerScheduler, FlowMatchEulerDiscreteScheduler
from pipelines import foreign, tiny
from trainers import build_trainer, flat_state

from unlearn_runner.errors import ConfigurationError
from unlearn_runner.methods.given import Given
from unlearn_runner.methods.method import Setting
from unlearn_runner.models.one_step import OneStep
from unlearn_runner.training.checkpoint import open_checkpoint
from unlearn_runner.types import Batch, make_generator


def scores(folder) -> dict[str, float]:
    """Of the model; when in its run the content was gone is none."""
    metrics = json.loads((folder / "summary.json").read_text())["metrics"]
    return {name: value for name, value in metrics.items() if name.startswith("eval/") and "deletion" not in name}


@pytest.mark.parametrize("method", ["siss", "sfd"])
def test_a_runs_model_is_measured_as_in_the_run(run, method):
    """A diffusion model, and a one-step generator with its one evaluation a sample."""
    first = run(f"method={method}", "evaluation.relearning=null", folder="first")
    again = run("method=given", f"method.weights={first / 'model'}", "evaluation.relearning=null", folder="again")
    assert scores(first) == scores(again)
    assert weights_of(first).keys() == weights_of(again).keys()
    summary = json.loads((again / "summary.json").read_text())["metrics"]
    assert summary["cost/network_evaluations"] == 0
    assert (summary["cost/network_evaluations_per_sample"] == 1) == (method == "sfd")


def test_the_base_stays_the_base_until_the_step(composed, digits, tiny_network, tmp_path):
    cfg = composed("method=siss")
    trainer = build_trainer(cfg, digits, tmp_path)
    trainer.method.networks[0].save(tmp_path / "unlearned")
    trainer.step()
    trainer.method.networks[0].save(tmp_path / "base")
    cfg = composed("method=given", f"method.weights={tmp_path / 'unlearned'}", "trainer.max_steps=1")
    given = build_trainer(cfg, digits, tmp_path / "given", base=tmp_path / "base")
    probe = (torch.ones(2, 1, 16, 16), torch.tensor([10, 500]), torch.tensor([0, 1]))
    with torch.no_grad():
        assert torch.equal(given.method.model.predict(*probe), trainer.method.networks[0].predict(*probe))
        given.step()
        trainer.method.networks[0].load(tmp_path / "unlearned")
        assert torch.equal(given.method.model.predict(*probe), trainer.method.networks[0].predict(*probe))
    given.save()
    resumed = build_trainer(cfg, digits, tmp_path / "given", base=tmp_path / "base")
    resumed.resume(open_checkpoint(tmp_path / "given"))
    assert resumed.done
    with torch.no_grad():
        assert torch.equal(resumed.method.model.predict(*probe), given.method.model.predict(*probe))
    assert flat_state(resumed).keys() == flat_state(given).keys()


def test_every_part_of_a_pipeline_is_the_given_ones(tmp_path):
    """Also the text encoder, in which others unlearn, and which copies of a model share."""
    tiny(seed=1).save(tmp_path / "given")
    base = tiny(seed=0)
    base.save(tmp_path / "base")
    base.freeze_for_unlearning()
    method = Given(Setting(base, make_generator(0, "method")), str(tmp_path / "given"))
    base.load(tmp_path / "base")
    before = next(base.backbone.texts.text_encoder.parameters()).clone()
    method.step(Batch(None, None, None, None, 0.5))
    after = next(method.model.backbone.texts.text_encoder.parameters())
    assert not torch.equal(before, after)
    wanted = tiny(seed=1).state_dict()
    assert all(torch.equal(value, wanted[name]) for name, value in method.model.state_dict().items())


def test_the_given_models_schedule_and_prediction_are_its_own(composed, digits, tiny_network, tmp_path):
    """An epsilon model under a base that predicts v, on another schedule; also after a resumption."""
    cfg = composed("method=siss", "model.network.prediction_type=v_prediction")
    build_trainer(cfg, digits, tmp_path).method.networks[0].save(tmp_path / "base")
    other = composed("method=siss", "model.network.beta_schedule=linear")
    unlearned = build_trainer(other, digits, tmp_path).method.networks[0]
    unlearned.save(tmp_path / "unlearned")
    cfg["method"], cfg["trainer"]["max_steps"] = (
        composed("method=given", f"method.weights={tmp_path / 'unlearned'}")["method"],
        1,
    )
    given = build_trainer(cfg, digits, tmp_path / "given", base=tmp_path / "base")
    assert given.method.model.scheduler.config.prediction_type == "v_prediction"

    def drawn(model):
        return model.sample(2, torch.tensor([0, 1]), torch.Generator().manual_seed(0), 3)

    given.step()
    assert torch.equal(drawn(given.method.model), drawn(unlearned))
    given.save()
    resumed = build_trainer(cfg, digits, tmp_path / "given", base=tmp_path / "base")
    resumed.resume(open_checkpoint(tmp_path / "given"))
    assert torch.equal(drawn(resumed.method.model), drawn(unlearned))
    given.method.model.save(tmp_path / "saved")
    again = build_trainer(other, digits, tmp_path).method.networks[0]
    again.load(tmp_path / "saved")
    assert torch.equal(drawn(again), drawn(unlearned))


def test_what_shapes_do_not_tell_is_compared_too(tiny_network, tmp_path):
    """The number of attention heads, and a schedule of no diffusion model."""
    attending = {"attention": [False, True], "block_out_channels": [8, 16]}
    tiny_network(**attending, attention_head_dim=4).save(tmp_path / "heads")
    with pytest.raises(ConfigurationError, match="describes another network: attention_head_dim is 4, not 8"):
        Given(Setting(tiny_network(**attending), make_generator(0, "method")), str(tmp_path / "heads"))
    for scheduler, wrong in (
        (EDMEulerScheduler(), "holds a EDMEulerScheduler, whose noise is not that of a diffusion model"),
        (FlowMatchEulerDiscreteScheduler(invert_sigmas=True), r"whose times are not known here \(invert_sigmas"),
    ):
        folder = tmp_path / type(scheduler).__name__
        tiny_network().save(folder)
        shutil.rmtree(folder / "scheduler")
        (folder / "model_index.json").unlink()
        scheduler.save_pretrained(folder / "scheduler")
        with pytest.raises(ConfigurationError, match=rf"method\.weights=.*{wrong}"):
            Given(Setting(tiny_network(), make_generator(0, "method")), str(folder))


def test_a_generator_keeps_its_timestep(tiny_network, tmp_path):
    OneStep(tiny_network(seed=1), 123).save(tmp_path)
    method = Given(Setting(tiny_network(), make_generator(0, "method")), str(tmp_path))
    assert method.model.timestep == 123


def test_what_cannot_be_the_bases_is_refused(tiny_network, tmp_path):
    tiny_network(num_labels=None).save(tmp_path / "unconditional")
    tiny_network(block_out_channels=[8, 16]).save(tmp_path / "wider")
    (tmp_path / "empty").mkdir()
    foreign(tmp_path / "pipeline")
    with pytest.raises(ConfigurationError, match=r"method\.weights=/nowhere: there is no such folder"):
        Given(Setting(tiny_network(), make_generator(0, "method")), "/nowhere")
    for name in ("unconditional", "wider", "empty", "pipeline"):
        with pytest.raises(ConfigurationError, match=f"{name}: expected a model of the base's architecture"):
            Given(Setting(tiny_network(), make_generator(0, "method")), str(tmp_path / name))
