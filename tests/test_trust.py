"""What a command takes from elsewhere is data: nothing of it is run, whatever way it comes in."""

import sys

import pytest
from conftest import ROOT
from hydra import compose, initialize_config_dir
from hydra.core.config_store import ConfigStore
from omegaconf import OmegaConf

from unlearn_runner.assembly import make
from unlearn_runner.errors import ConfigurationError
from unlearn_runner.trust import CONF, FROM_ELSEWHERE, arguments_for_hydra, data_of, literal

CALLBACK = "hydra: {callbacks: {evil: {_target_: os.system, command: 'touch owned'}}}\n"
PACKAGE = "# @package hydra.callbacks.evil\n_target_: os.system\n"


@pytest.fixture(autouse=True)
def script(monkeypatch):
    monkeypatch.setattr(sys, "argv", [str(ROOT / "train.py")])


@pytest.fixture
def elsewhere(tmp_path):
    """`elsewhere("config.yaml", text)`: a folder with such a file, and a harmless config.yaml."""

    def written(name: str, text: str):
        (tmp_path / "config.yaml").write_text("seed: 3\n")
        file = tmp_path / name
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(text, encoding="utf-8")
        return tmp_path

    return written


@pytest.mark.parametrize(
    "text",
    [
        CALLBACK,
        "defaults: [evil]\nseed: 0\n",
        f"a: !!python/object/apply:pathlib.PosixPath [tmp]\n{CALLBACK}",
        f"a: !!python/object/apply:os.system ['touch owned']\n{CALLBACK}",
        "seed: ${oc.env:HOME}\n",
        "seed: '${oc.create:{_target_: os.system}}'\n",
        r"seed: '\\${oc.create:{_target_: os.system}}'" + "\n",
        "seed: ${a${oc.env:HOME}}\n",
        "[1, 2]\n",
        "a: &a [x, x, x, x, x, x, x, x, x]\n"
        + "".join(f"{b}: &{b} [{', '.join([f'*{a}'] * 9)}]\n" for a, b in zip("abcdefgh", "bcdefghi", strict=True)),
        "a: [",
    ],
)
@pytest.mark.parametrize("options", [("--config-path", "--config-name"), ("-cp", "-cn"), ("--config-pa", "--config-n")])
def test_a_configuration_from_elsewhere_is_plain_data(elsewhere, text, options):
    folder = elsewhere("config.yaml", text)
    with pytest.raises(ConfigurationError, match=r"config\.yaml (sets|holds|must hold|is no configuration)") as refused:
        arguments_for_hydra([options[0], str(folder), options[1], "config"])
    assert "\n" not in str(refused.value)
    with pytest.raises(ConfigurationError):
        arguments_for_hydra([f"--config-dir={folder}", "--config-name=config"])


@pytest.mark.parametrize(
    ("name", "text"),
    [
        ("hydra/launcher/basic.yaml", "a: 1\n"),
        ("hydra.yaml", "# @package _name_\ncallbacks: {evil: {_target_: os.system}}\n"),
        ("method/mine.yaml", "defaults: [/local/evil@hydra.callbacks.evil]\n"),
        ("method/mine.yaml", "defaults: [{override /hydra/launcher: evil}]\n"),
        ("local/default.yaml", PACKAGE),
        ("local/default.yaml", f"# @a b\u2028{PACKAGE}"),
        ("tuned/model/ddpm_tiny/siss.yaml", f"# @package _global_\n{CALLBACK}"),
        ("local/default.yaml", "# @package _global_\nhydra: {job: {env_set: {PYTHONSTARTUP: evil.py}}}\n"),
        ("method/mine.yaml", f"# @package _global_\n{CALLBACK}"),
    ],
)
def test_what_lies_beside_it_is_not_composed(elsewhere, name, text):
    """Of --config-path nothing but the one file is taken; of --config-dir nothing that speaks to Hydra."""
    folder = elsewhere(name, text)
    arguments = arguments_for_hydra(["--config-path", str(folder), "--config-name", "config"])
    assert arguments == [f"--config-name={FROM_ELSEWHERE}"]
    with initialize_config_dir(str(CONF), version_base="1.3"):
        cfg = compose(FROM_ELSEWHERE, return_hydra_config=True)
    assert (cfg.seed, cfg.hydra.callbacks, cfg.hydra.launcher._target_.rpartition(".")[2]) == (3, {}, "BasicLauncher")
    with pytest.raises(ConfigurationError, match=rf"^\S+/{name} speaks to Hydra itself, by which"):
        arguments_for_hydra(["--config-dir", str(folder), "-m", "seed=1,2"])


def test_groups_from_elsewhere_may_be_used(elsewhere):
    folder = elsewhere("method/mine.yaml", "_target_: unlearn_runner.methods.neg_grad.NegGrad\n")
    arguments = ["--config-dir", str(folder), "method=mine", "hydra.run.dir=/tmp/a"]
    assert arguments_for_hydra(arguments) == [f"--config-dir={folder}", *arguments[2:]]


def test_a_configuration_from_elsewhere_trusts_nothing(elsewhere):
    folder = elsewhere("config.yaml", "seed: 0\nsecurity: {allow: [os.]}\n")
    assert data_of(folder / "config.yaml") == {"seed": 0, "security": {"allow": []}}


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        (["--experimental-rerun", "x.pickle"], "reads a pickle"),
        (["--config-name", "../../tmp/x"], "there is no configuration"),
        (
            ["--config-path", "/nowhere", "--config-name", "config"],
            r"there is no configuration config\.yaml in /nowhere",
        ),
        (["method=../../x"], "an option of a group lies in conf/"),
        (["-m", "method=siss,../../x"], "an option of a group lies in conf/"),
        (["+hydra/callbacks=../../x"], "an option of a group lies in conf/"),
        (
            ["--method", "siss"],
            "--method: there is no such option of the command; .* as in method=siss",
        ),
        (["--multirn", "seed=1"], "--multirn: .*; near it: multirun"),
        (["--cfg", "jobs"], "invalid choice: 'jobs'"),
    ],
)
def test_a_command_is_refused_with_one_sentence(arguments, sentence):
    with pytest.raises(ConfigurationError, match=sentence) as refused:
        arguments_for_hydra(arguments)
    assert "\n" not in str(refused.value)


def test_options_of_the_command_may_stand_anywhere():
    assert arguments_for_hydra(["seed=1", "-m", "method=siss,esd"]) == ["--multirun", "seed=1", "method=siss,esd"]
    assert arguments_for_hydra(["~dataset.x", "--cfg", "job"]) == ["--cfg=job", "~dataset.x"]
    assert arguments_for_hydra(["--info", "--config-path", str(CONF)]) == ["--info=all"]


@pytest.mark.parametrize("text", ["${oc.create:{_target_: os.system}}", r"\${x}", r"\\${x}", "a ${x", "$x {y}", "${"])
def test_a_text_stays_what_it_is(text):
    """Neither what is written into a run's configuration nor what parts are made of is resolved a second time."""
    assert OmegaConf.to_container(OmegaConf.create({"x": [literal(text)]}), resolve=True) == {"x": [text]}
    assert make({"_target_": "builtins.dict", "x": text, "y": {"z": [text]}}) == {"x": text, "y": {"z": [text]}}


def teardown_module():
    ConfigStore.instance().repo.pop(f"{FROM_ELSEWHERE}.yaml", None)
