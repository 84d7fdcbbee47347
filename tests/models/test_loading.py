"""Weights as people have them: what is read, what is refused in one sentence, and that nothing of them is executed."""

import json
import pickle
import re
import shutil
from pathlib import Path

import pytest
import torch
from diffusers import DDIMScheduler, DDPMScheduler, FlowMatchEulerDiscreteScheduler, PNDMScheduler, UNet2DModel
from pipelines import foreign, tiny
from safetensors.torch import load_file, save_file

from unlearn_runner.errors import ConfigurationError
from unlearn_runner.models.ddpm import build_ddpm
from unlearn_runner.models.prompted import require_distinguished
from unlearn_runner.models.vae import build_vae
from unlearn_runner.spec import Labels
from unlearn_runner.weights import fetched

WEIGHTS = "diffusion_pytorch_model"


@pytest.fixture(scope="module")
def pipeline(tmp_path_factory):
    return foreign(tmp_path_factory.mktemp("pipeline"))


@pytest.fixture
def copied(pipeline, tmp_path):
    return shutil.copytree(pipeline, tmp_path / "copy")


def build(folder):
    return tiny(str(folder), image_shape=(3, 32, 32))


def edited(file: Path, **entries) -> None:
    file.write_text(json.dumps(json.loads(file.read_text()) | entries))


def rewritten(file: Path, change) -> None:
    save_file(change(load_file(file)), file)


def test_variants_shards_and_old_names_are_the_same_weights(pipeline, copied):
    """float16 rounds, nothing else does; parts saved by transformers 4 and by old versions of diffusers."""
    plain = build(pipeline)
    plain.load(pipeline)
    unet = copied / "unet" / f"{WEIGHTS}.safetensors"
    weights = load_file(unet)
    names = sorted(weights)
    for number, part in ((1, names[:9]), (2, names[9:])):
        save_file(
            {name: weights[name] for name in part}, unet.with_name(f"{WEIGHTS}-0000{number}-of-00002.safetensors")
        )
    unet.unlink()
    vae = copied / "vae" / f"{WEIGHTS}.safetensors"
    old = [(".to_q.", ".query."), (".to_k.", ".key."), (".to_v.", ".value."), (".to_out.0.", ".proj_attn.")]

    def aged(tensors):
        renamed = {}
        for name, tensor in tensors.items():
            for new, before in old:
                name = name.replace(new, before)
            renamed[name] = tensor
        assert renamed.keys() != tensors.keys()
        return renamed

    rewritten(vae, aged)
    text = copied / "text_encoder" / "model.safetensors"
    half = {f"text_model.{name.removeprefix('text_model.')}": part.half() for name, part in load_file(text).items()}
    save_file(half, text.with_name("model.fp16.safetensors"))
    text.unlink()
    model = build(copied)
    model.load(copied)
    for name, wanted in plain.state_dict().items():
        wanted = wanted.half().float() if name.startswith("backbone.texts.text_encoder.") else wanted
        assert torch.equal(model.state_dict()[name], wanted), name
        assert model.state_dict()[name].dtype == torch.float32


DAMAGES = {
    "deleted": (lambda file: file.unlink(), "there must be weights as safetensors in .*, found none"),
    "truncated": (lambda file: file.write_bytes(file.read_bytes()[:-5]), "is no whole safetensors file"),
    "html": (lambda file: file.write_bytes(b"<html>not found</html>"), "is no whole safetensors file"),
    "keys": (
        lambda file: rewritten(file, lambda w: {f"ema.{k}": v for k, v in w.items()}),
        "the weights of another network: no .* are missing",
    ),
    "one more": (lambda file: rewritten(file, lambda w: w | {"extra": torch.ones(1)}), "extra, which the network"),
    "shape": (
        lambda file: rewritten(file, lambda w: {k: torch.stack([v, v]) for k, v in w.items()}),
        r"holds .* in the shape \(.*\), and the network has it in",
    ),
    "quantised": (
        lambda file: rewritten(file, lambda w: {k: v.to(torch.int8) for k, v in w.items()}),
        "as I8; weights are read in 16, 32 or 64 bits",
    ),
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_damaged_weights_are_refused_when_the_model_is_built(tiny_network, tiny_vae, copied, tmp_path, damage):
    break_it, reason = DAMAGES[damage]
    tiny_network(seed=1).save(tmp_path / "ddpm")
    tiny_vae(seed=1).save(tmp_path / "vae")
    for part, file, make in (
        ("unet", tmp_path / "ddpm" / "unet" / f"{WEIGHTS}.safetensors", build_ddpm_of(tmp_path / "ddpm")),
        ("vae", tmp_path / "vae" / "vae" / f"{WEIGHTS}.safetensors", build_vae_of(tmp_path / "vae")),
        ("text_encoder", copied / "text_encoder" / "model.safetensors", lambda: build(copied)),
    ):
        fine = make()
        source = tmp_path / "ddpm" if part == "unet" else tmp_path / "vae" if part == "vae" else copied
        break_it(file)
        sentence = rf"model\.weights={re.escape(str(source))}: expected .*; {part} could not be read: .*{reason}"
        with pytest.raises(ConfigurationError, match=sentence):
            make()
        with pytest.raises(ConfigurationError, match=rf"method\.weights={re.escape(str(source))}: .*{reason}"):
            fine.load(source, "method.weights")


def build_ddpm_of(folder):
    return lambda: build_ddpm((1, 8, 8), tuple("0123456789"), 0, str(folder), [8], [False])


def build_vae_of(folder):
    return lambda: build_vae((1, 8, 8), tuple("0123456789"), 0, str(folder))


class Malicious:
    """What a hostile file holds: unpickled, it leaves a mark."""

    def __init__(self, mark: Path):
        self.mark = mark

    def __reduce__(self):
        return Path.touch, (self.mark,)


def test_no_pickle_and_no_code_of_a_folder_is_run(pipeline, copied, tmp_path):
    mark = tmp_path / "mark"
    hostile = pickle.dumps(Malicious(mark))
    assert pickle.loads(hostile) is None
    assert mark.exists(), "the file is what it is meant to be"
    mark.unlink()
    code = f"open({str(mark)!r}, 'w')\nraise SystemExit\n"
    for name, stem in (("unet", WEIGHTS), ("vae", WEIGHTS), ("text_encoder", "pytorch_model")):
        (copied / name / f"{stem}.bin").write_bytes(hostile)
        (copied / name / "modeling.py").write_text(code)
        edited(copied / name / "config.json", auto_map={"AutoModel": "modeling.Model", "AutoConfig": "modeling.Config"})
    edited(copied / "text_encoder" / "config.json", trust_remote_code=True)
    edited(copied / "tokenizer" / "tokenizer_config.json", auto_map={"AutoTokenizer": ["modeling.T", "modeling.T"]})
    (copied / "tokenizer" / "modeling.py").write_text(code)
    model = build(copied)
    model.load(copied)
    plain = build(pipeline)
    plain.load(pipeline)
    assert all(torch.equal(value, plain.state_dict()[name]) for name, value in model.state_dict().items())

    for name, stem in (("text_encoder", "model"), ("vae", WEIGHTS), ("unet", WEIGHTS)):
        file = copied / name / f"{stem}.safetensors"
        whole = file.read_bytes()
        file.unlink()
        for load in (lambda: build(copied), lambda: model.load(copied)):
            with pytest.raises(ConfigurationError, match=f"{name} could not be read: .*a pickle, which can run code"):
                load()
        file.write_bytes(whole)
    (copied / "pipeline.py").write_text(code)
    for own in (["pipeline", "Pipeline"], "Pipeline"):
        edited(copied / "model_index.json", _class_name=own)
        with pytest.raises(ConfigurationError, match=r"model_index\.json could not be read: it is a"):
            build(copied)
    assert not mark.exists()


def test_a_pixel_models_pickle_is_not_read(tiny_network, tmp_path):
    tiny_network().save(tmp_path / "model")
    (tmp_path / "model" / "unet" / f"{WEIGHTS}.safetensors").unlink()
    (tmp_path / "model" / "unet" / f"{WEIGHTS}.bin").write_bytes(pickle.dumps(Malicious(tmp_path / "mark")))
    with pytest.raises(ConfigurationError, match=r"only diffusion_pytorch_model\.bin, a pickle") as raised:
        build_ddpm_of(tmp_path / "model")()
    assert "weights_only" not in str(raised.value)
    assert not (tmp_path / "mark").exists()


@pytest.mark.parametrize("name", ["model.safetensors", "v1-5.ckpt", "nowhere.safetensors", "https://x.org/m"])
def test_a_single_file_is_refused_with_how_to_convert_it(tmp_path, name):
    source = name if "://" in name else str(tmp_path / name)
    if "nowhere" not in name and "://" not in name:
        Path(source).write_bytes(b"x")
    for make in (lambda: build(source), build_ddpm_of(source)):
        with pytest.raises(
            ConfigurationError, match=r"model\.weights=.* got a single file or a link; .*from_single_file"
        ):
            make()


def test_config_files_that_say_nothing_are_refused(pipeline, copied):
    for name, reason in (
        ("model_index.json", r"model_index\.json could not be read"),
        ("unet/config.json", "unet could not be read"),
        ("text_encoder/config.json", "text_encoder could not be read"),
        ("scheduler/scheduler_config.json", "scheduler could not be read"),
        ("tokenizer/tokenizer_config.json", "tokenizer could not be read"),
    ):
        for content, what in (("{", "is not JSON"), ("[]", "holds no settings"), (None, "there is no")):
            (copied / name).write_text(content) if content else (copied / name).unlink()
            with pytest.raises(ConfigurationError, match=rf"model\.weights=.*{reason}: .*{what}"):
                build(copied)
        shutil.copy(pipeline / name, copied / name)
    (copied / "tokenizer" / "tokenizer.json").write_text("{}")
    with pytest.raises(ConfigurationError, match=r"tokenizer could not be read: the vocabulary in .* is damaged"):
        build(copied)


def test_parts_must_fit_each_other(copied):
    def refused(match, part, **entries):
        file = copied / part / "config.json"
        before = file.read_text()
        edited(file, **entries)
        with pytest.raises(
            ConfigurationError, match=rf"model\.weights=.*: expected parts that fit each other; .*{match}"
        ):
            build(copied)
        file.write_text(before)

    refused("sees 7 channels, the noisy samples have 3: .*inpainting", "unet", in_channels=7)
    refused("predicts 6 channels for 3: .*variance", "unet", out_channels=6)
    refused("turns 2 channels into 3, the noisy samples have 3", "unet", in_channels=2)
    refused("sees 3 channels, the noisy samples have 2", "vae", latent_channels=2)
    refused("reads conditions of 16 numbers, its text encoder makes them of 24", "unet", cross_attention_dim=16)
    refused("makes them of 32", "text_encoder", hidden_size=32)
    refused(r"tokenizer knows \d+ tokens, its text encoder 300", "text_encoder", vocab_size=300)
    refused("addition_embed_type: text", "unet", addition_embed_type="text")
    edited(copied / "vae" / "config.json", _class_name="AutoencoderTiny")
    with pytest.raises(ConfigurationError, match="vae holds a AutoencoderTiny, and only a AutoencoderKL"):
        build(copied)


def test_a_pixel_model_with_a_learnt_variance_is_refused(tiny_network, tmp_path):
    tiny_network().save(tmp_path)
    edited(tmp_path / "unet" / "config.json", out_channels=2)
    with pytest.raises(ConfigurationError, match=r"predicts 2 channels for 1: .*variance"):
        build_ddpm_of(tmp_path)()


def test_schedules_that_would_be_misread_are_refused(tiny_network, copied, tmp_path):
    tiny_network().save(tmp_path / "ddpm")
    for folder, make in ((copied, lambda: build(copied)), (tmp_path / "ddpm", build_ddpm_of(tmp_path / "ddpm"))):
        for name, entries, reason in (
            (
                "FlowMatchEulerDiscreteScheduler",
                {"use_karras_sigmas": True},
                r"(this network is known on no flow|whose times are not known here \(use_karras_sigmas)",
            ),
            ("os.system", {}, "diffusers has no scheduler called os.system"),
            ("DiffusionPipeline", {}, "diffusers has no scheduler called DiffusionPipeline"),
            ("DDPMScheduler", {"prediction_type": "sample"}, "prediction_type must be one of"),
            ("DDPMScheduler", {"variance_type": "learned_range"}, "learnt variance"),
            ("DDPMScheduler", {"num_train_timesteps": 1}, "no schedule on which the noise grows"),
            ("DDPMScheduler", {"beta_schedule": "linear", "beta_start": -5.0}, "no schedule on which the noise"),
            ("DPMSolverMultistepScheduler", {"use_flow_sigmas": True}, "is not that of a diffusion model"),
            (
                "DDPMScheduler",
                {"prediction_type": "epsilon", "rescale_betas_zero_snr": True},
                "zero terminal SNR .*v_prediction, got 'epsilon'",
            ),
        ):
            scheduler = folder / "scheduler" / "scheduler_config.json"
            before = scheduler.read_text()
            if name.startswith("Flow"):
                FlowMatchEulerDiscreteScheduler().save_pretrained(folder / "scheduler")
            edited(scheduler, _class_name=name, **entries)
            edited(folder / "model_index.json", scheduler=["diffusers", name])
            with pytest.raises(ConfigurationError, match=rf"model\.weights=.*{reason}"):
                make()
            scheduler.write_text(before)


@pytest.mark.parametrize("kind", [DDIMScheduler, PNDMScheduler, DDPMScheduler])
def test_a_pixel_models_scheduler_keeps_its_class(tiny_network, tmp_path, kind):
    source = tiny_network()
    source.save(tmp_path / "given")
    kind(beta_schedule="scaled_linear").save_pretrained(tmp_path / "given" / "scheduler")
    edited(tmp_path / "given" / "model_index.json", scheduler=["diffusers", kind.__name__])
    model = build_ddpm_of(tmp_path / "given")()
    model.load(tmp_path / "given")
    torch.testing.assert_close(model.path.schedule.alphas_cumprod, kind(beta_schedule="scaled_linear").alphas_cumprod)
    model.save(tmp_path / "saved")
    index = json.loads((tmp_path / "saved" / "model_index.json").read_text())
    assert index["scheduler"] == ["diffusers", kind.__name__]
    assert type(kind.from_pretrained(tmp_path / "saved", subfolder="scheduler")) is kind
    again = build_ddpm_of(tmp_path / "saved")()
    again.load(tmp_path / "saved")
    draw = (2, torch.tensor([1, 2]))
    for sampler in ("ddim", "ddpm"):
        assert torch.equal(
            model.sample(*draw, torch.Generator().manual_seed(0), 3, sampler),
            again.sample(*draw, torch.Generator().manual_seed(0), 3, sampler),
        )


def test_latents_are_not_cut(pipeline, copied):
    """Neither clipped nor thresholded, whatever the folder's sampler does with pixels."""
    edited(copied / "scheduler" / "scheduler_config.json", thresholding=True, clip_sample=True)
    draw = (2, torch.tensor([0, 1]))
    for sampler in ("ddim", "ddpm"):
        a, b = (
            model.sample(*draw, torch.Generator().manual_seed(0), 2, sampler)
            for model in (build(pipeline), build(copied))
        )
        assert torch.equal(a, b)


def test_a_tokenizer_is_saved_as_it_came(pipeline, tmp_path):
    model = build(pipeline)
    model.save(tmp_path / "before")
    model.embed(["a zebra"])
    model.save(tmp_path / "after")
    files = sorted((tmp_path / "before" / "tokenizer").iterdir())
    assert files
    for file in files:
        assert (tmp_path / "after" / "tokenizer" / file.name).read_bytes() == file.read_bytes(), file.name


def test_prompts_that_are_not_read_to_their_end_are_said(caplog):
    model = tiny(prompts=("seven", "a very long winded way to ask for trousers", "a very long winded picture", "SEVEN"))
    said = [record.getMessage() for record in caplog.records]
    assert sum("only the first 12 tokens of a prompt are read" in line for line in said) == 1
    assert any("one condition to the text encoder: 'SEVEN', 'seven'" in line for line in said)
    assert any("'a very long winded picture', 'a very long winded way" in line for line in said)
    require_distinguished(model, Labels(retain=(0, 3), forget=(1, 2)))
    with pytest.raises(ConfigurationError, match="prompts 'SEVEN', to forget, and 'seven', to retain, as the same"):
        require_distinguished(model, Labels(retain=(0, 1), forget=(3,)))


def test_of_the_hub_only_configs_are_fetched_first_and_then_the_plain_weights(pipeline, tmp_path, monkeypatch):
    """With a hub that is a folder: what is asked for is copied into the cache."""
    from fnmatch import fnmatch

    hub = shutil.copytree(pipeline, tmp_path / "hub")
    for name in ("unet", "vae"):
        (hub / name / f"{WEIGHTS}.fp16.safetensors").write_bytes(b"half")
        (hub / name / f"{WEIGHTS}.bin").write_bytes(b"pickle")
    (hub / "unet" / f"{WEIGHTS}.safetensors").rename(hub / "unet" / f"{WEIGHTS}.fp16.safetensors")
    (hub / "v1-5-pruned.safetensors").write_bytes(b"all in one")

    def snapshot_download(source, allow_patterns):
        assert source == "some/model"
        for file in hub.rglob("*"):
            name = str(file.relative_to(hub))
            if file.is_file() and any(fnmatch(name, pattern) for pattern in allow_patterns):
                (tmp_path / "cache" / name).parent.mkdir(parents=True, exist_ok=True)
                shutil.copy(file, tmp_path / "cache" / name)
        return str(tmp_path / "cache")

    monkeypatch.setattr("huggingface_hub.snapshot_download", snapshot_download)
    model = build("some/model")
    assert not list((tmp_path / "cache").rglob("*.safetensors"))
    model.load("some/model")
    there = {str(file.relative_to(tmp_path / "cache")) for file in (tmp_path / "cache").rglob("*.safetensors")}
    assert there == {
        f"unet/{WEIGHTS}.fp16.safetensors", f"vae/{WEIGHTS}.safetensors", "text_encoder/model.safetensors"
    }  # fmt: skip
    assert not list((tmp_path / "cache").rglob("*.bin"))
    assert fetched(hub, weights=True) == hub
    wanted = UNet2DModel  # the wrong kind of folder for a pixel model
    with pytest.raises(ConfigurationError, match=f"only a {wanted.__name__} can be read there"):
        build_ddpm_of("some/model")()
