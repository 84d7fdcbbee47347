"""One command for what other tools made: the commands that it composes, and one of them run."""

import json
import shlex
import subprocess
import sys

import measure
import pytest
from conftest import ROOT
from pipelines import tiny
from safetensors.torch import save_file

from unlearn_runner.errors import ConfigurationError


@pytest.fixture
def base(tmp_path):
    tiny(num_tokens=40).save(tmp_path / "base")
    return tmp_path / "base"


def test_commands(base, tmp_path):
    found = measure.commands(
        ["esd.safetensors", "a/lora/", "b/lora"],
        str(base),
        ["Van Gogh", "it's"],
        ["Monet"],
        tmp_path / "out",
        ["seed=3"],
    )
    assert [command.label for command in found] == ["esd", "lora", "lora_2"]
    words = shlex.split(found[0].line)
    assert words[:2] == [sys.executable, str(ROOT / "train.py")]
    assert {
        "method=given", "method.weights='esd.safetensors'", "model=sd15", f"model.weights='{base}'",
        "evaluation=probes",
        "dataset.source=base", "dataset.image_size=16", "dataset.concept=['Van Gogh','it\\'s']",
        "dataset.retain_concepts=['Monet']", "judge=clip", "label='esd'", "seed=3",
    } <= set(words)  # fmt: skip
    assert words[-1] == "seed=3", "what is said by hand wins"


def test_rows_have_names_of_their_own(tmp_path):
    asked = ["p1/a_2.safetensors", "p1/a.safetensors", "p2/a.safetensors", "p3/a.pt", str(tmp_path)]
    assert measure.labels_of(asked) == ["a_2", "a", "a_3", "a_4", tmp_path.name]


def test_what_is_an_override(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "a=b.safetensors").touch()
    assert measure.is_override("evaluation.num_samples=5", "--concept")
    assert measure.is_override("+evaluation/relearning=adamw", "")
    assert not measure.is_override("a=b.safetensors", ""), "a file"
    assert not measure.is_override("out=1", "--out")
    assert not measure.is_override("x = y", "--concept"), "a concept"
    assert not measure.is_override("E=mc2", "Monet"), "another"


def test_mistakes(base, tmp_path, capsys):
    asked = ["--concept", "trousers", "--retain", "a seven"]
    assert measure.main(["a.safetensors", "--base", str(tmp_path / "no"), *asked]) == 2
    assert "of a hub id say what it is with model=<sd15, sdxl" in capsys.readouterr().err
    index = base / "model_index.json"
    content = json.loads(index.read_text())
    for kind, sentence in (
        ("DDPMPipeline", "expected a text-to-image pipeline"),
        ("Other", "expected a pipeline .*, got a Other"),
    ):
        index.write_text(json.dumps(content | {"_class_name": kind}))
        with pytest.raises(ConfigurationError, match=sentence):
            measure.commands(["a"], str(base), ["x"], ["y"], tmp_path, [])
    with pytest.raises(SystemExit):
        measure.main(["seed=1", "--base", str(base), *asked])
    hub = ["model=sdxl", "dataset.image_size=1024"]
    assert measure.main(["a", "--base", "org/name", *asked, "--dry-run", *hub]) == 0
    assert "model=sdxl" in capsys.readouterr().out


def test_a_file_is_measured_by_every_probe(base, tmp_path):
    weights = {
        name: value * 0.5 for name, value in tiny(num_tokens=40).backbone.unet.state_dict().items() if ".attn2." in name
    }
    save_file(weights, tmp_path / "esd.safetensors")
    done = subprocess.run(
        [
            sys.executable, str(ROOT / "scripts" / "measure.py"), str(tmp_path / "esd.safetensors"), f"--base={base}",
            "debug=default", "dataset.source=embedded", "judge=classifier", "logger=jsonl", "hardware=cpu",
            f"paths.cache={tmp_path / 'cache'}", "--concept", "trousers", "--retain", "a seven", "a one",
            "--out", str(tmp_path / "out"),
        ],
        capture_output=True, text=True,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr
    metrics = json.loads((tmp_path / "out" / "esd" / "summary.json").read_text())["metrics"]
    probes = {
        f"{of}/probe_{name}" for of in ("base", "eval") for name in ("noise", "completion", "inpainting", "guidance")
    }
    attacks = {f"{of}/attack_{name}" for of in ("base", "eval") for name in ("success", "tokens", "vector")}
    assert probes | attacks | {"eval/relearn_steps", "eval/forget_rate"} <= metrics.keys()
    assert "tensors of unet; " in done.stderr + done.stdout
    assert "esd" in done.stdout and "probe_completion" in done.stdout
