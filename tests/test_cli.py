"""Mistakes get a sentence, defects a traceback."""

import errno
import random
import shlex
import sys

import pytest
from hydra.core.override_parser.overrides_parser import OverridesParser
from omegaconf import OmegaConf
from safetensors import SafetensorError

from unlearn_runner.cli import as_override, command_again, one_sentence
from unlearn_runner.errors import ConfigurationError, Interrupted, NonFiniteError, writing
from unlearn_runner.trust import PACKAGE


@pytest.fixture(autouse=True)
def hydra_environment(monkeypatch):
    monkeypatch.setenv("HYDRA_FULL_ERROR", "0")


@pytest.mark.parametrize(
    "error, code",
    [
        (ConfigurationError("expected a, got b."), 1),
        (NonFiniteError("loss/retain became nan at step 3"), 1),
        (Interrupted("SIGTERM received"), 130),
        (KeyboardInterrupt(), 130),
        (OSError(errno.ENOSPC, "No space left on device", "/a/b"), 1),
        (PermissionError(errno.EACCES, "Permission denied", "/a/b"), 1),
    ],
)
def test_known_mistakes(capsys, error, code):
    with pytest.raises(SystemExit) as exit_of, one_sentence():
        raise error
    assert exit_of.value.code == code
    said = capsys.readouterr().err.strip()
    assert said
    assert "\n" not in said
    assert "Traceback" not in said


def test_a_wrapped_mistake_is_found(capsys):
    with pytest.raises(SystemExit), one_sentence():
        try:
            raise ConfigurationError("the sentence.")
        except ConfigurationError as error:
            raise RuntimeError("Error in call to target") from error
    assert capsys.readouterr().err == "the sentence.\n"


def test_defects_keep_their_traceback():
    with pytest.raises(ZeroDivisionError), one_sentence():
        raise ZeroDivisionError


def test_hydra_full_error_shows_all(monkeypatch):
    monkeypatch.setenv("HYDRA_FULL_ERROR", "1")
    with pytest.raises(ConfigurationError), one_sentence():
        raise ConfigurationError("x")


def test_choice_reads_the_configuration_being_composed():
    cfg = OmegaConf.create({"hydra": {"runtime": {"choices": {"method": "siss"}}}, "name": "${choice:method}"})
    assert cfg.name == "siss"


def read_back(typed: str) -> str:
    """What a shell, Hydra and OmegaConf make of one word of a command."""
    (word,) = shlex.split(typed)
    override = OverridesParser.create().parse_override(word)
    assert not override.is_sweep_override()
    cfg = OmegaConf.create({"paths": {"outputs": None}})
    OmegaConf.update(cfg, "paths.outputs", override.value())
    return cfg.paths.outputs


def test_an_override_is_read_back_as_it_was():
    rng, pieces = random.Random(0), [*"ab/ =,'\"\\$${}[]()é:;~*?#&|<>!@%^`\t\n.-_1", "${", "null", "true", "日本", "🙂"]
    values = [
        "/a b/c",
        "a=b",
        "x,y",
        "null",
        "1",
        "1e3",
        "a[/b]c",
        "é",
        "it's",
        "${oc.env:HOME}",
        "\\${a}",
        "\\",
        "",
        "'q'",
    ]
    values += ["".join(rng.choices(pieces, k=rng.randint(1, 8))) for _ in range(300)]
    for value in values:
        assert read_back(as_override("paths.outputs", value)) == value
    assert as_override("paths.outputs", "/tmp/a-b_1/c.d") == "paths.outputs=/tmp/a-b_1/c.d", "no quotes without need"


def test_the_command_that_goes_on(monkeypatch):
    from hydra.core.hydra_config import HydraConfig
    from hydra.types import RunMode

    again = as_override("resume_from_checkpoint", "/a b/c")
    assert command_again(again) == f"the same command with {again}", "where it is not known"
    assert command_again() == "the same command"
    monkeypatch.setattr(sys, "argv", ["/x y/train.py", "name=a b", "resume_from_checkpoint=latest", "seed=1"])
    monkeypatch.setattr(HydraConfig, "initialized", lambda: True)
    monkeypatch.setattr(HydraConfig, "get", lambda: OmegaConf.create({"mode": RunMode.RUN}))
    assert shlex.split(command_again(again)) == ["python", "/x y/train.py", "name=a b", "seed=1", *shlex.split(again)]
    assert "resume_from_checkpoint=latest" in command_again()
    monkeypatch.setattr(sys, "argv", [str(PACKAGE / "__main__.py"), "seed=1"])
    assert shlex.split(command_again(again)) == ["python", "-m", "unlearn_runner", "seed=1", *shlex.split(again)]


@pytest.mark.parametrize(
    "error, number",
    [
        (OSError(errno.ENOSPC, "No space left on device"), errno.ENOSPC),
        (OSError(errno.EDQUOT, "Disk quota exceeded"), errno.EDQUOT),
        (SafetensorError("Error while serializing: I/O error: No space left on device (os error 28)"), errno.ENOSPC),
        (RuntimeError("[enforce fail at inline_container.cc:664] . unexpected pos 64 vs 0"), errno.ENOSPC),
    ],
)
def test_a_full_disk_names_the_place(tmp_path, capsys, error, number):
    with pytest.raises(OSError) as raised, writing(tmp_path / "state.pt"):
        raise error
    assert (raised.value.errno, raised.value.filename) == (number, str(tmp_path / "state.pt"))
    with pytest.raises(SystemExit), one_sentence():
        raise raised.value
    assert str(tmp_path / "state.pt") in capsys.readouterr().err


def test_other_errors_stay_what_they_are(tmp_path):
    with pytest.raises(ZeroDivisionError), writing(tmp_path):
        raise ZeroDivisionError
    with open("/dev/full", "w") as full, pytest.raises(OSError, match="/a/b"), writing(tmp_path):
        raise OSError(errno.ENOSPC, "No space left on device", "/a/b") from OSError(full.name)
