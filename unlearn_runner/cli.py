"""The command line: what a configuration may ask for, and what a person sees when a command cannot go on."""

import argparse
import errno
import json
import os
import re
import secrets
import shlex
import sys
import traceback
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from datetime import datetime
from pathlib import Path
from typing import Any

import yaml
from hydra.core.hydra_config import HydraConfig
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.override_parser.types import Quote, QuotedString
from hydra.errors import (
    CompactHydraException,
    HydraException,
    InstantiationException,
    MissingConfigException,
    OverrideParseException,
)
from hydra.types import RunMode
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import (
    ConfigAttributeError,
    ConfigKeyError,
    InterpolationKeyError,
    MissingMandatoryValue,
    OmegaConfBaseException,
)

from unlearn_runner.errors import NO_ROOM, ConfigurationError, first_line, known_cause, near, no_room
from unlearn_runner.validation import checked, require_groups

CONF = Path(__file__).parents[1] / "conf"

# No library reads a pickle from elsewhere in this process, not even one that asks torch for weights_only=False.
os.environ["TORCH_FORCE_WEIGHTS_ONLY_LOAD"] = "1"
os.environ.pop("TORCH_FORCE_NO_WEIGHTS_ONLY_LOAD", None)

UNWRITABLE = (*NO_ROOM, errno.EACCES, errno.EPERM, errno.EROFS, errno.ENOTDIR, errno.EIO)


def _hydra(root: DictConfig) -> DictConfig:
    """Hydra's own configuration, also where it is not composed into the rest yet."""
    return root.hydra if "hydra" in root else HydraConfig.get()


def choice(group: str, *, _root_: DictConfig) -> str | None:
    """`${choice:method}`: which option of a group was chosen. Unlike `${hydra:...}` it works in hydra.sweep.dir."""
    return _hydra(_root_).runtime.choices[group]


OmegaConf.register_new_resolver("choice", choice, replace=True)


def sweep(otherwise: str | int | float, *, _root_: DictConfig) -> str:
    """`${sweep:${name}}`: what all jobs of a sweep have in common; for a run on its own, `otherwise`."""
    in_sweep = _hydra(_root_).mode == RunMode.MULTIRUN
    return os.environ.get("WANDB_SWEEP_ID") or (os.environ[SWEEP] if in_sweep else str(otherwise))


# conf/hydra/launcher has options by the names that the plugins themselves give them
warnings.filterwarnings("ignore", message=r"\s*'hydra/launcher/.*' is validated against ConfigStore schema")

SWEEP = "UNLEARN_RUNNER_SWEEP"  # jobs inherit it from the command that launches them
os.environ.setdefault(SWEEP, f"{datetime.now():%Y-%m-%d_%H-%M-%S}_{secrets.token_hex(2)}")
OmegaConf.register_new_resolver("sweep", sweep, replace=True)


def as_override(key: str, value: str) -> str:
    """`key=value` as one types it into a shell so that Hydra reads exactly this text: spaces, commas, quotes,
    accents, brackets and all.
    """
    plain = f"{key}={value}"
    with suppress(HydraException):
        override = OverridesParser.create().parse_override(plain)
        if "${" not in value and not override.is_sweep_override() and override.value() == value:
            return shlex.quote(plain)
    literal = re.sub(r"(\\*)\$\{", lambda found: found[1] * 2 + r"\${", value)  # for OmegaConf no interpolation
    return shlex.quote(f"{key}={QuotedString(literal, Quote.single).with_quotes()}")


def command_again(*overrides: str) -> str:
    """This command with other overrides, as one types it; in words where it is not known, as in one job of many."""
    keys = tuple(override.lstrip("'\"").partition("=")[0] + "=" for override in overrides)
    script = Path(sys.argv[0]).name == "train.py" and HydraConfig.initialized()
    if not script or HydraConfig.get().mode == RunMode.MULTIRUN:
        return " ".join(("the same command", *(["with"] if overrides else []), *overrides))
    kept = [shlex.quote(argument) for argument in sys.argv if not (keys and argument.lstrip("+").startswith(keys))]
    return " ".join(("python", *kept, *overrides))


# 1. What a configuration may ask for


def configuration(cfg: DictConfig) -> dict[str, Any]:
    """The composed configuration, resolved and checked. Raises ConfigurationError with one sentence."""
    require_groups(OmegaConf.to_container(cfg, resolve=False))
    found = OmegaConf.to_container(cfg, resolve=True, throw_on_missing=True)
    found.setdefault("security", {"allow": []})  # folders of runs before there was such an option
    allow = found["security"]["allow"] if _of_the_runner() else _allowed_by_the_command()
    found["security"] = {"allow": []}  # trust is not handed on with a run's folder
    if not isinstance(allow, list) or not all(isinstance(prefix, str) and prefix for prefix in allow):
        raise ConfigurationError(f"security.allow must be a list of texts that are not empty, got {allow}.")
    return checked(found, allow, CONF)


def _of_the_runner() -> bool:
    """Whether all that is composed lies in the runner's own conf/, conf/local included."""
    sources = HydraConfig.get().runtime.config_sources
    return {source.path for source in sources if source.provider not in ("hydra", "schema")} == {str(CONF)}


def _allowed_by_the_command() -> list[str]:
    overrides = OverridesParser.create().parse_overrides(list(HydraConfig.get().overrides.task))
    given = [override.value() for override in overrides if override.key_or_group == "security.allow"]
    return list(given[-1]) if given and isinstance(given[-1], list) else []


def refuse_what_hydra_would_run(arguments: Sequence[str]) -> None:
    """Raise ConfigurationError if the command names a configuration file, such as a run folder's, that speaks to Hydra.

    What it says there (callbacks, launchers, further files) takes effect before anything could be checked.
    """
    parser = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    parser.add_argument("--config-path", "-cp")
    parser.add_argument("--config-dir", "-cd")
    parser.add_argument("--config-name", "-cn", default="train")
    named, _ = parser.parse_known_args(list(arguments))
    script = Path(sys.argv[0]).resolve().parent
    places = [script / named.config_path] if named.config_path else []
    places += [Path(named.config_dir)] if named.config_dir else []
    for place in places:
        file = place / (named.config_name if named.config_name.endswith(".yaml") else f"{named.config_name}.yaml")
        if not file.is_file() or file.resolve().parent == CONF:
            continue
        text = file.read_text(encoding="utf-8", errors="replace")
        try:
            content = yaml.load(text, yaml.CSafeLoader if hasattr(yaml, "CSafeLoader") else yaml.SafeLoader)
        except yaml.YAMLError:
            content = {}  # Hydra says what is wrong with it
        keys = {key for key in ("hydra", "defaults") if isinstance(content, dict) and key in content}
        if keys or re.search(r"^\s*#\s*@package", text, re.MULTILINE):
            what = " and ".join(sorted(keys)) or "a package"
            raise ConfigurationError(
                f"{file} sets {what}, by which Hydra could be made to run other code; a run's configuration has none "
                "of it. Take it out, or put the file into conf/ if you trust it."
            )


# 2. What a person sees when it cannot go on


class _Through(BaseException):
    """Carries an exception past Hydra, which would print a line of its own before ours."""


@contextmanager
def failure_on_record() -> Iterator[None]:
    """A job of a sweep that fails leaves a line in the sweep's failures.jsonl, also if it never had a folder."""
    try:
        yield
    except (KeyboardInterrupt, Exception) as error:
        hydra = HydraConfig.get()
        if hydra.mode == RunMode.MULTIRUN:
            why = _mistake(error) or "".join(traceback.format_exception(error))
            line = {"sweep": os.environ[SWEEP], "job": str(hydra.job.num), "overrides": list(hydra.overrides.task)}
            folder = Path(hydra.sweep.dir)
            with suppress(OSError):  # the job's own failure is what counts
                folder.mkdir(parents=True, exist_ok=True)
                with open(folder / "failures.jsonl", "a", encoding="utf-8") as file:
                    file.write(json.dumps({**line, "error": why}, allow_nan=False) + "\n")
        elif _mistake(error) is not None:
            raise _Through from error
        known = known_cause(error)
        if known is not None and known is not error:  # a job's exception loses its cause on the way to the launcher
            raise known from error
        raise


@contextmanager
def one_sentence() -> Iterator[None]:
    """Print a known mistake as one sentence to stderr and exit: 1, or 130 after an interruption.

    HYDRA_FULL_ERROR=1 shows the whole traceback instead.
    """
    full = os.environ.get("HYDRA_FULL_ERROR") == "1"
    os.environ["HYDRA_FULL_ERROR"] = "1"  # so that Hydra lets exceptions through to here
    try:
        refuse_what_hydra_would_run(sys.argv[1:])
        yield
    except (KeyboardInterrupt, Exception, _Through) as error:
        if isinstance(error, _Through):
            error = error.__cause__
        mistake = _mistake(error)
        if full or mistake is None:
            raise error
        with suppress(OSError):  # a terminal that was closed
            print(mistake, file=sys.stderr, flush=True)
        sys.exit(130 if isinstance(error, KeyboardInterrupt) else 1)


def _mistake(error: BaseException) -> str | None:
    """The sentence for the user; None for what only a traceback can explain."""
    if (known := known_cause(error)) is not None:
        return str(known)
    if isinstance(error, MissingMandatoryValue):
        return f"{error.full_key} is missing: give it, {error.full_key}=..."
    if isinstance(error, (CompactHydraException, OmegaConfBaseException)):
        return _of_composition(error)
    if isinstance(error, ValueError) and "Config group override must be" in str(error):  # Hydra: group=null
        return "a group needs one of its options, got null; leave it out, or take it away with ~<group>."
    cause: BaseException | None = error
    while cause is not None:
        if (isinstance(cause, OSError) and cause.errno in UNWRITABLE) or no_room(cause) is not None:
            where = getattr(cause, "filename", None) or "the run folder or the cache"
            return f"cannot write {where}: {cause}; make room, or give hydra.run.dir=... or paths.cache=..."
        cause = cause.__cause__ or cause.__context__
    return "Interrupted." if isinstance(error, KeyboardInterrupt) else None


def _of_composition(error: Exception) -> str:
    """A mistake in an override or in a file, found by Hydra or OmegaConf, in one line."""
    below = error.__cause__ if isinstance(error.__cause__, OmegaConfBaseException) else error
    if isinstance(error, MissingConfigException) and error.options is not None:
        group, _, option = (error.missing_cfg_file or "").rpartition("/")
        known = sorted(str(name) for name in error.options)
        return f"{group}={option}: there is no such option{near(option, known)}; there are {', '.join(known)}."
    if isinstance(error, InstantiationException):
        deepest = error
        while deepest.__cause__ is not None:
            deepest = deepest.__cause__
        target, key = (re.search(pattern, str(error)) for pattern in (r"target '([^']*)'", r"full_key: (\S+)"))
        what = (f"{key[1]}: " if key else "") + (target[1].rpartition(".")[2] if target else "a part")
        why = deepest if isinstance(deepest, ValueError) else f"{type(deepest).__name__}: {deepest}"
        return f"{what} cannot be built with these options ({first_line(why)}); HYDRA_FULL_ERROR=1 shows where."
    if isinstance(error, OverrideParseException):
        option, sign, value = error.override.partition("=")
        if not sign or not re.fullmatch(r"[+~]*[\w./@:-]+", option):
            return f"'{error.override}': expected option=value, as in seed=1."
        quoted = as_override(option, value.strip("'\""))
        return f"{error.override}: this value has to be quoted; write {quoted}"
    if isinstance(below, (ConfigAttributeError, ConfigKeyError)) and below.full_key:
        siblings = [] if below.parent_node is None or below.parent_node._is_none() else list(below.parent_node)
        return f"{below.full_key}: there is no such option{near(str(below.key), map(str, siblings))}."
    if isinstance(below, InterpolationKeyError):
        wanted = re.search(r"'([^']*)' not found", str(below))
        return (
            f"{below.full_key} takes its value from {wanted[1] if wanted else 'another option'}, which there is not "
            "with these groups; choose a dataset, model and method that have it."
        )
    return " ".join(str(below).split())
