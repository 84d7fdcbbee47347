"""Mistakes get a sentence, defects a traceback."""

import errno

import pytest
from omegaconf import OmegaConf

from unlearn_runner.cli import one_sentence
from unlearn_runner.errors import ConfigurationError, Interrupted, NonFiniteError


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
