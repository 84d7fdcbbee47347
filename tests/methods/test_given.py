"""A model that was unlearned elsewhere: what its folder holds is what is measured."""

import json
import re
import shutil
from pathlib import Path

import pytest
import torch
from conftest import assert_same_bits, weights_of
from diffusers import EDMEulerScheduler, FlowMatchEulerDiscreteScheduler
from pipelines import foreign, tiny
from safetensors.torch import load_file, save_file
from trainers import build_trainer, flat_state, make

from unlearn_runner.errors import ConfigurationError
from unlearn_runner.methods.given import Given
from unlearn_runner.methods.method import Setting
from unlearn_runner.models.one_step import OneStep
from unlearn_runner.training.checkpoint import open_checkpoint
from unlearn_runner.types import Batch, make_generator
from unlearn_runner.weights import LORA, weights_identity


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


def kohya(lora: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """LoRA of a UNet under the names of kohya's scripts; with an alpha of half the rank, and so twice the addition."""
    found = {}
    for name, value in lora.items():
        layer, kind = re.fullmatch(r"unet\.(.*)\.lora(?:_|\.)(A|B|down|up)\.weight", name).groups()
        layer = f"lora_unet_{layer.replace('.processor', '').replace('.', '_')}"
        down = kind in ("A", "down")
        found[f"{layer}.lora_{'down' if down else 'up'}.weight"] = value if down else 2 * value
        found[f"{layer}.alpha"] = torch.tensor(value.shape[0] / 2) if down else found[f"{layer}.alpha"]
    return found


def lora_of(folder: Path) -> Path:
    """A tiny model's LoRA, with additions that are not 0, in the folder of a run; the base is tiny(seed=0)."""
    model = tiny(seed=0, trainable="lora")
    model.freeze_for_unlearning()
    g = torch.Generator().manual_seed(0)
    for name, weight in model.named_parameters():
        if ".lora_" in name:
            weight.data = torch.randn(weight.shape, generator=g) * 0.1
    model.save(folder)
    return folder


def part_of(tmp_path: Path, layout: str) -> Path:
    """What another tool leaves, of tiny(seed=1) or, for LoRA, of a tuned tiny(seed=0)."""
    other = tiny(seed=1).backbone
    unet, encoder = dict(other.unet.state_dict()), dict(other.texts.text_encoder.state_dict())
    crossing = {name: value for name, value in unet.items() if ".attn2.to_" in name}
    place = tmp_path / layout
    place.mkdir()
    if layout in ("unet", "outer folder", "checkpoint-N"):
        other.unet.save_pretrained(place if layout == "unet" else place / "unet")
        if layout == "checkpoint-N":  # accelerate's, as SISS saves it
            other.unet.save_pretrained(place / "unet_ema")
            (place / "optimizer.bin").write_bytes(b"not read")
    elif layout == "some weights":  # ESD, UCE
        save_file(crossing, place / "esd.safetensors")
        return place / "esd.safetensors"
    elif layout == "checkpoint":
        torch.save(
            {"state_dict": {f"module.unet.{name}": value for name, value in unet.items()}, "step": 3}, place / "a.pt"
        )
        return place / "a.pt"
    elif layout == "text encoder":  # AdvUnlearn
        other.texts.text_encoder.save_pretrained(place)
    elif layout == "text encoder's weights":
        torch.save(
            {f"text_model.{name.removeprefix('text_model.')}": value for name, value in encoder.items()}, place / "a.pt"
        )
        return place / "a.pt"
    elif layout == "lora":
        return lora_of(place) / "lora"
    elif layout == "kohya":
        save_file(kohya(load_file(lora_of(tmp_path / "run") / "lora" / LORA)), place / "kohya.safetensors")
        return place / "kohya.safetensors"
    return place


PARTS = {
    "unet": "unet", "outer folder": "unet", "checkpoint-N": "unet", "checkpoint": "unet", "some weights": "attn2.to_",
    "text encoder": "text_encoder", "text encoder's weights": "text_encoder", "lora": "unet", "kohya": "unet",
}  # fmt: skip


@pytest.mark.parametrize("layout", PARTS)
def test_a_part_of_the_base_is_taken_and_the_rest_stays(tmp_path, caplog, layout):
    base, other = tiny(seed=0), tiny(seed=1)
    before = {name: value.clone() for name, value in base.state_dict().items()}
    base.freeze_for_unlearning()
    source = part_of(tmp_path, layout)
    method = Given(Setting(base, make_generator(0, "method")), str(source))
    assert all(torch.equal(value, before[name]) for name, value in base.state_dict().items()), "nothing yet"
    metrics = method.step(Batch(None, None, None, None, 0.5))
    wanted = other.state_dict()
    if layout in ("lora", "kohya"):
        wanted = tiny(seed=0).state_dict()
        fused = load_file(
            (source.parent if layout == "lora" else tmp_path / "run") / "unet" / "diffusion_pytorch_model.safetensors"
        )
        wanted |= {f"backbone.unet.{name}": value for name, value in fused.items()}
    moved = 0
    for name, value in method.model.state_dict().items():
        torch.testing.assert_close(value, wanted[name] if PARTS[layout] in name else before[name], msg=name)
        moved += not torch.equal(value, before[name])
    assert metrics["given/moved"] == moved > 0
    assert f"{moved} tensors of the model are not what the base has" in caplog.text


def test_a_part_resumes(composed, tmp_path):
    """LoRA, which is added: once, though a resumed run has it in its weights already."""
    tiny(seed=0).save(tmp_path / "base")
    source = lora_of(tmp_path / "tuned") / "lora"
    cfg = composed(
        "method=given", f"method.weights={source}", f"model.weights={tmp_path / 'base'}", "model=sd15",
        "dataset=sd_concepts", "dataset.image_size=16", "trainer.max_steps=1",
    )  # fmt: skip
    data = make(cfg["dataset"]).load()
    given, resumed = (build_trainer(cfg, data, tmp_path / "given", base=tmp_path / "base") for _ in range(2))
    given.step()
    resumed.resume(open_checkpoint(given.save()))
    assert_same_bits(flat_state(resumed), flat_state(given))


def test_identities_of_parts(tmp_path):
    """A run with other weights is another run: of each layout some byte of the weights counts."""
    found = {layout: weights_identity(part_of(tmp_path, layout)) for layout in PARTS if layout != "outer folder"}
    assert len(set(found.values())) == len(found)
    lora = tmp_path / "lora" / "lora" / LORA
    save_file({name: value * 2 for name, value in load_file(lora).items()}, lora)
    assert weights_identity(lora.parent) != found["lora"]


def test_a_pixel_models_checkpoint(tiny_network, tmp_path):
    tiny_network(seed=1).backbone.unet.save_pretrained(tmp_path / "checkpoint-100" / "unet")
    base = tiny_network()
    method = Given(Setting(base, make_generator(0, "method")), str(tmp_path / "checkpoint-100"))
    method.step(Batch(None, None, None, None, 0.5))
    assert_same_bits(dict(base.state_dict()), dict(tiny_network(seed=1).state_dict()))


def test_a_whole_model_that_is_not_finite_is_refused_before_anything_is_measured(tiny_network, tmp_path):
    network = tiny_network(seed=1)
    with torch.no_grad():
        next(iter(network.parameters()))[0] = torch.inf
    network.save(tmp_path / "broken")
    with pytest.raises(ConfigurationError, match=r"the weight \S+ in unet/\S+ has values that are not finite"):
        Given(Setting(tiny_network(), make_generator(0, "method")), str(tmp_path / "broken"))


def test_damaged_parts_are_refused(tmp_path):
    weights = dict(tiny(seed=1).backbone.unet.state_dict())
    name = next(iter(weights))
    lora = load_file(lora_of(tmp_path / "run") / "lora" / LORA)
    key = next(iter(lora))
    pair = [name for name in lora if name.partition(".lora")[0] == key.partition(".lora")[0]]
    files = {
        "unknown.safetensors": (
            weights | {"extra": torch.ones(1)},
            r"it holds extra, which is no weight of the base \(1 of",
        ),
        "shape.safetensors": ({name: torch.ones(2)}, r"in the shape \(2,\), and the base has it in"),
        "whole.safetensors": ({name: weights[name].to(torch.int8)}, "as torch.int8; F64, F32, F16, BF16 are read"),
        "none.safetensors": ({"text_projection.weight": torch.ones(1)}, "it holds no weight of the base"),
        "lora.safetensors": (
            lora | {name.replace("unet.", "unet.no."): lora[name].clone() for name in pair},
            "it adds to 57 layers, 56 of which fit the base",
        ),
        "other.safetensors": (
            {name.replace("unet.", "unet.no."): value for name, value in lora.items()},
            "it adds to 56 layers, 0 of which fit the base",
        ),
        "original.safetensors": (
            {"model.diffusion_model.x": torch.ones(1)},
            "names of Stable Diffusion's original code",
        ),
        "weights.npz": ({name: weights[name]}, "the name of a file of weights ends in .safetensors or one of .bin"),
    }
    for file, (content, wrong) in files.items():
        save_file(content, tmp_path / file)
        refused(tmp_path / file, wrong)
    (tmp_path / "cut.safetensors").write_bytes((tmp_path / "shape.safetensors").read_bytes()[:-3])
    refused(tmp_path / "cut.safetensors", "incomplete|Error|header")
    half = {name: value for name, value in lora.items() if not name.endswith((".up.weight", "lora_B.weight"))}
    save_file(half | {key: lora[key]}, tmp_path / "half.safetensors")
    refused(tmp_path / "half.safetensors", "half of an addition is missing")
    save_file({name: torch.full_like(weights[name], torch.nan)}, tmp_path / "nan.safetensors")
    refused(tmp_path / "nan.safetensors", f"it holds values in {name} that are not finite numbers")
    save_file({name: weights[name], f"unet.{name}": weights[name] + 1}, tmp_path / "twice.safetensors")
    refused(tmp_path / "twice.safetensors", "it holds one weight under several names")
    torch.save({"unet": weights, "text_encoder": weights}, tmp_path / "two.pt")
    refused(tmp_path / "two.pt", r"it holds several sets of weights \(unet, text_encoder\)")
    torch.save({"state_dict": weights, "ema": weights}, tmp_path / "ema.pt")
    refused(tmp_path / "ema.pt", r"it holds several sets of weights \(state_dict, ema\)")
    torch.save({}, tmp_path / "nothing.pt")
    refused(tmp_path / "nothing.pt", "it holds no tensor")
    (tmp_path / "empty.pt").touch()
    refused(tmp_path / "empty.pt", "it is empty")
    (tmp_path / "folder").mkdir()
    save_file({name: weights[name]}, tmp_path / "folder" / "esd.safetensors")
    refused(tmp_path / "folder", "a folder with files of weights; give one of them, as .*esd")
    both = lora_of(tmp_path / "again") / "lora"
    tiny(seed=1).backbone.unet.save_pretrained(both / "unet")
    refused(both, "it holds pytorch_lora_weights.safetensors and unet/: give the one that counts alone")
    torch.save({"state_dict": weights, "code": print}, tmp_path / "code.pt")
    refused(tmp_path / "code.pt", "it holds more than tensors, a pickle that could run code")
    with pytest.raises(ConfigurationError, match=r"method\.weights=nowhere\.safetensors: there is no such file"):
        Given(Setting(tiny(), make_generator(0, "method")), "nowhere.safetensors")
    torch.save([1, 2], tmp_path / "list.ckpt")
    refused(tmp_path / "list.ckpt", "it holds something else than tensors by name")
    tiny_unet = tiny(seed=1, block_out_channels=[8, 16]).backbone.unet
    tiny_unet.save_pretrained(tmp_path / "wider")
    refused(tmp_path / "wider", "describes another network: block_out_channels")


def refused(source: Path, wrong: str) -> None:
    with pytest.raises(
        ConfigurationError, match=rf"method\.weights={re.escape(str(source))}: expected .*; .*{wrong}"
    ) as error:
        Given(Setting(tiny(), make_generator(0, "method")), str(source))
    assert "\n" not in str(error.value)


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
