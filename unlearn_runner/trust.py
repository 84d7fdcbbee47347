"""What a command takes from elsewhere is data: nothing of a run folder's configuration is run.

Hydra runs what a configuration says to it (callbacks, launchers, further files, resolvers) while it composes, before
anything could be checked. So it never reads a configuration from elsewhere: that is read here, and Hydra gets a copy.
What a configuration may name by `_target_` is checked after composing, by unlearn_runner/validation.py.
"""

import argparse
import os
import re
import sys
from collections.abc import Iterator, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any, NoReturn

import yaml
from hydra._internal.utils import get_args_parser  # so that options are understood as Hydra will, abbreviations too
from hydra.core.config_store import ConfigStore
from hydra.core.hydra_config import HydraConfig
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.override_parser.types import Override
from hydra.errors import HydraException
from hydra.plugins.config_source import ConfigSource
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from unlearn_runner.errors import ConfigurationError, first_line, near
from unlearn_runner.schema import YAML_LOADER, bounded_yaml

PACKAGE = Path(__file__).parent
CONF = next(folder for folder in (PACKAGE / "conf", PACKAGE.parent / "conf") if folder.is_dir())  # installed, or not
FROM_ELSEWHERE = "configuration_from_elsewhere"  # its name in Hydra's ConfigStore
SPEAKS_TO_HYDRA = ("hydra", "defaults")
MOST_FILES = 2000


# 1. The command


def arguments_for_hydra(arguments: Sequence[str], needed: Sequence[str] = ()) -> list[str]:
    """A command's arguments as Hydra is to see them: options first, then overrides, and instead of a configuration from
    elsewhere its copy. `needed` are options that cannot be taken away.

    Raises ConfigurationError with one sentence for what Hydra does not understand, or could be made to run code by.
    """
    parser = get_args_parser()
    parser.error = _refuse
    found, unknown = parser.parse_known_intermixed_args(list(arguments))
    if unknown:
        name = unknown[0].lstrip("-").partition("=")[0]
        known = [flag.lstrip("-") for action in parser._actions for flag in action.option_strings]
        raise ConfigurationError(
            f"{unknown[0]}: there is no such option of the command{near(name, known)}; options of a run are written "
            "without dashes, as in method=siss seed=1."
        )
    if found.experimental_rerun is not None:
        raise ConfigurationError(
            "--experimental-rerun reads a pickle, which can run code; to make a run again take its folder: "
            "--config-path <run folder> --config-name config."
        )
    overrides = _parsed(found.overrides)
    for override in overrides:
        if override.is_delete() and override.key_or_group in needed:
            raise ConfigurationError(f"~{override.key_or_group}: no run goes without; choose another one instead.")
        for value in _values(override):
            if ".." in value.split("/") and ("/" in override.key_or_group or (CONF / override.key_or_group).is_dir()):
                raise ConfigurationError(f"{override.input_line}: an option of a group lies in conf/.")
    file = _primary(found)
    if file.resolve().parent != CONF.resolve():
        ConfigStore.instance().store(FROM_ELSEWHERE, data_of(file))
        found.config_name = FROM_ELSEWHERE
    found.config_path = None
    if found.config_dir is not None:
        _require_silence(Path(found.config_dir))
    return [*_options(parser, found), *found.overrides]


def _refuse(message: str) -> NoReturn:
    raise ConfigurationError(f"{message}; `python train.py --help` lists what there is.")


def _options(parser: argparse.ArgumentParser, found: argparse.Namespace) -> Iterator[str]:
    """The options of a command that were given, each in one word."""
    for action in parser._actions:
        value = getattr(found, action.dest, None)
        if action.option_strings and value is not None and value is not False:
            yield action.option_strings[0] + ("" if value is True else f"={value}")


def _primary(found: argparse.Namespace) -> Path:
    """The file that the composition begins with."""
    name = found.config_name or "train"
    name = name if name.endswith((".yaml", ".yml")) else f"{name}.yaml"
    script = Path(sys.argv[0]).resolve()
    home = Path.cwd() if script.parent == PACKAGE else script.parent  # of `python -m unlearn_runner`; as Hydra has it
    place = CONF if found.config_path is None else home / found.config_path
    places = [place, *([Path(found.config_dir)] if found.config_dir is not None else [])]
    for place in places:
        if (place / name).is_file():
            return place / name
    raise ConfigurationError(f"there is no configuration {name} in {' or '.join(str(place) for place in places)}.")


def _parsed(overrides: Sequence[str]) -> list[Override]:
    """Those that can be parsed; of the others Hydra says what is wrong."""
    parser, found = OverridesParser.create(), []
    for override in overrides:
        with suppress(HydraException):
            found += parser.parse_overrides([override])
    return found


def _values(override: Override) -> list[str]:
    """What an override sets an option to, in a sweep one after the other."""
    if override.is_sweep_override():
        return [str(value) for value in override.sweep_string_iterator()] if override.is_discrete_sweep() else []
    return [str(override.value())]


# 2. A configuration from elsewhere


def data_of(file: Path) -> dict[str, Any]:
    """A configuration, such as a run folder's, as plain data that trusts nothing.

    Raises ConfigurationError if it cannot be read, or says more than values and what they refer to.
    """
    try:
        text = bounded_yaml(file)
        content = OmegaConf.to_container(OmegaConf.create(text), resolve=False)
    except (OSError, ValueError, RecursionError, yaml.YAMLError, OmegaConfBaseException) as error:
        raise _unreadable(file, error) from error
    if not isinstance(content, dict):
        raise ConfigurationError(f"{file} must hold options and their values, got {type(content).__name__}.")
    if said := [key for key in SPEAKS_TO_HYDRA if key in content]:
        raise ConfigurationError(
            f"{file} sets {' and '.join(said)}, by which Hydra could be made to run other code; a run's configuration "
            "has none of it. Take it out, or put the file into conf/ if you trust it."
        )
    for text in _texts(content):
        if (reference := RESOLVER.search(text)) is not None:
            raise ConfigurationError(
                f"{file} holds '{reference[0]}', which would be computed when it is read; write the file with "
                "--cfg job --resolve, or put it into conf/ if you trust it."
            )
    return content | {"security": {"allow": []}}


def _unreadable(file: Path, error: Exception) -> ConfigurationError:
    return ConfigurationError(f"{file} is no configuration that can be read: {first_line(error)}")


# In a text an odd number of backslashes before ${ makes it plain; all but a path of options in it is computed.
RESOLVER = re.compile(r"(?<!\\)(?:\\\\)*\$\{(?![\w.\[\]]*\}).*", re.DOTALL)


def _texts(value: Any) -> Iterator[str]:
    if isinstance(value, str):
        yield value
    elif isinstance(value, dict):
        for key, part in value.items():
            yield from _texts(key)
            yield from _texts(part)
    elif isinstance(value, list):
        for part in value:
            yield from _texts(part)


def literal(value: Any) -> Any:
    """Resolved values as a configuration again, in which no text refers to anything, whatever is in it."""
    if isinstance(value, str):
        return re.sub(r"(\\*)\$\{", lambda found: found[1] * 2 + r"\${", value)
    if isinstance(value, dict):
        return {key: literal(part) for key, part in value.items()}
    return [literal(part) for part in value] if isinstance(value, (list, tuple)) else value


# 3. Groups from elsewhere


def _require_silence(folder: Path) -> None:
    """Raise ConfigurationError if a file of --config-dir reaches Hydra's configuration of itself: by its place, by its
    package, by a key or by its defaults list.
    """
    for number, file in enumerate(_files(folder)):
        if number == MOST_FILES:
            raise ConfigurationError(f"--config-dir={folder} has more than {MOST_FILES} files; give one with fewer.")
        try:
            text = bounded_yaml(file)
            content = yaml.load(text, YAML_LOADER)
            package = ConfigSource._get_header_dict(text).get("package")
        except (OSError, ValueError, RecursionError, yaml.YAMLError) as error:
            raise _unreadable(file, error) from error
        own = content if isinstance(content, dict) else {}
        reached = f"{file.relative_to(folder)} {package} {own.get('defaults')}".lower()
        if "hydra" in reached or "hydra" in own:
            raise ConfigurationError(
                f"{file} speaks to Hydra itself, by which it could be made to run other code; put it into conf/ if you "
                "trust it."
            )


def _files(folder: Path) -> Iterator[Path]:
    """What Hydra may read of a folder: links are followed."""
    for place, _, names in os.walk(folder, followlinks=True):
        yield from (Path(place, name) for name in names if name.endswith((".yaml", ".yml")))


# 4. What may be named


def allowed(cfg: DictConfig) -> list[str]:
    """The prefixes of `_target_` that the user trusts, by `security.allow` in conf/ or on the command line."""
    sources = HydraConfig.get().runtime.config_sources
    if {source.path for source in sources if source.provider not in ("hydra", "schema")} == {str(CONF)}:
        found = OmegaConf.select(cfg, "security.allow", default=[])
    else:  # what else is composed is not asked
        given = [o.value() for o in _parsed(HydraConfig.get().overrides.task) if o.key_or_group == "security.allow"]
        found = given[-1] if given else []
    found = OmegaConf.to_container(found, resolve=True) if OmegaConf.is_config(found) else found
    if not isinstance(found, list) or not all(isinstance(prefix, str) and prefix for prefix in found):
        raise ConfigurationError(f"security.allow must be a list of texts that are not empty, got {found}.")
    return found
