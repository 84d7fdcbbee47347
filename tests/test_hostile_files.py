"""Files from elsewhere: none runs code, each is refused in one sentence, and nobody is advised to read it anyway."""

import json
import pickle

import pytest
import torch
from trainers import build_driven

from unlearn_runner.errors import ConfigurationError, first_line
from unlearn_runner.evaluation.features import feature_extractor
from unlearn_runner.training.checkpoint import Checkpoints, open_checkpoint


class Payload:
    """Makes a file when it is unpickled."""

    def __init__(self, marker):
        self.marker = marker

    def __reduce__(self):
        return open, (str(self.marker), "w")


FORMS = {
    "zip": lambda value, path: torch.save({"weight": value}, path),
    "legacy": lambda value, path: torch.save({"weight": value}, path, _use_new_zipfile_serialization=False),
    "pickle": lambda value, path: path.write_bytes(pickle.dumps(value)),
}


@pytest.fixture(params=["zip", *(pytest.param(form, marks=pytest.mark.slow) for form in ("legacy", "pickle"))])
def hostile(tmp_path, request):
    """`hostile(path)` writes the payload there; afterwards it must not have been run."""

    def write(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        FORMS[request.param](Payload(tmp_path / "marker"), path)
        return path

    yield write
    assert not (tmp_path / "marker").exists()


def assert_refused(raised, *said):
    sentence = str(raised.value)
    assert "\n" not in sentence
    assert "\x1b" not in sentence
    assert "weights_only" not in sentence
    assert "safe_globals" not in sentence
    for words in said:
        assert words in sentence


def test_inception(hostile, tmp_path, monkeypatch):
    monkeypatch.delenv("TORCH_FORCE_WEIGHTS_ONLY_LOAD")  # what cli.py sets: not needed here
    with pytest.raises(ConfigurationError) as raised:
        feature_extractor("inception", str(hostile(tmp_path / "evil.pth")))
    assert_refused(raised, "evil.pth is not torch-fidelity's InceptionV3", "a pickle that could run code")


@pytest.mark.parametrize("name", ["evil.pt", "evil.safetensors", "evil.npz"])
def test_open_clip(hostile, clip_weights, tmp_path, name):
    with pytest.raises(ConfigurationError) as raised:
        feature_extractor("open_clip", None, "tiny-for-tests", str(hostile(tmp_path / name)))
    assert_refused(raised, "judge.extractor.open_clip_pretrained=")


def test_a_checkpoint(hostile, tmp_path):
    path = Checkpoints(tmp_path / "run").save(1, {"weights": {}}, {})
    hostile(path / "state.pt")
    manifest = json.loads((path / "manifest.json").read_text())
    manifest["files"]["state.pt"] = (path / "state.pt").stat().st_size
    (path / "manifest.json").write_text(json.dumps(manifest))
    with pytest.raises(ConfigurationError) as raised:
        open_checkpoint(path)
    assert_refused(raised, "resume_from_checkpoint=", "damaged")


@pytest.mark.parametrize("manifest", ["[]", "{}", '{"files": 1}', '"text"', "[" * 100_000, "null"])
def test_a_manifest_that_is_none(tmp_path, manifest):
    path = Checkpoints(tmp_path).save(1, {"weights": {}}, {})
    (path / "manifest.json").write_text(manifest)
    with pytest.raises(ConfigurationError) as raised:
        open_checkpoint(path)
    assert_refused(raised, "damaged")


@pytest.fixture
def playing(composed, digits, tmp_path):
    """`playing()`: a run with the policy in tmp_path/policy, whose files are those of `build_driven`."""
    small = ("method=rl_lambda", "method.agent.batch_size=2", "method.update_every=2", "trainer.max_steps=2")

    def build(*overrides):
        return build_driven(composed(*small, *overrides), digits, tmp_path / "run")

    _, agent = build()
    agent.save(tmp_path / "policy")
    return lambda: build(f"method.policy={tmp_path / 'policy'}")


def test_a_policy(hostile, playing, tmp_path):
    playing()
    hostile(tmp_path / "policy" / "policy.safetensors")
    with pytest.raises(ConfigurationError) as raised:
        playing()
    assert_refused(raised, "method.policy=", "the policy is damaged")


@pytest.mark.parametrize(
    "change, said",
    [
        ([], "not of this runner"),
        ({"features": 3}, "not of this runner"),
        ({"features": {"mean": [0.0], "var": [1.0], "count": 1}}, "statistics of 1 features instead of 4"),
        ({"features": {"mean": [float("nan")] * 4, "var": [1.0] * 4, "count": 1}}, "no finite numbers"),
        ({"features": {"mean": ["x"] * 4, "var": [1.0] * 4, "count": 1}}, "not of this runner"),
        ({"method.low": {"_target_": "os.system"}}, "this run has 0.01"),
    ],
)
def test_a_policy_of_something_else(playing, tmp_path, change, said):
    path = tmp_path / "policy" / "policy.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | change if isinstance(change, dict) else change))
    with pytest.raises(ConfigurationError) as raised:
        playing()
    assert_refused(raised, "method.policy=", said)


@pytest.mark.parametrize(
    "part", ["text_encoder", *(pytest.param(part, marks=pytest.mark.slow) for part in ("vae", "unet"))]
)
def test_parts_of_a_pipeline(hostile, composed, tmp_path, part):
    from hydra.utils import instantiate

    from unlearn_runner.assembly import build_network

    cfg = composed("model=sd_tiny", "dataset=sd_concepts")
    spec = instantiate(cfg["dataset"], _convert_="all").spec
    network = build_network(cfg, spec, 0)
    network.save(tmp_path / "model")
    for weights in (tmp_path / "model" / part).glob("*.safetensors"):
        weights.unlink()
    name = "pytorch_model.bin" if part == "text_encoder" else "diffusion_pytorch_model.bin"
    hostile(tmp_path / "model" / part / name)
    with pytest.raises(ConfigurationError) as raised:
        network.load(tmp_path / "model")
    assert_refused(raised, part)


def test_no_library_reads_a_pickle_in_the_command(hostile, tmp_path):
    """torch-fidelity, for one, asks torch for weights_only=False."""
    with pytest.raises(pickle.UnpicklingError, match="Weights only load failed"):
        torch.load(hostile(tmp_path / "evil.pth"), weights_only=False)


@pytest.mark.parametrize(
    "said, wanted",
    [
        ("", "ValueError"),
        ("one\ntwo", "one"),
        ("\x1b[1mbold\x1b[0m", "bold"),
        ("Re-running `torch.load` with `weights_only` set to `False` will likely succeed.",
         "it holds more than tensors, a pickle that could run code"),
        ("Object arrays cannot be loaded when allow_pickle=False",
         "it holds more than tensors, a pickle that could run code"),
    ],
)  # fmt: skip
def test_advice_is_not_passed_on(said, wanted):
    assert first_line(ValueError(said)) == wanted
