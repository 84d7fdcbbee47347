"""The command line: what a configuration may ask for, and what a person sees when a command cannot go on."""

import errno
import json
import os
import re
import secrets
import shlex
import sys
import traceback
import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from datetime import datetime
from pathlib import Path
from typing import Any, final

from hydra import compose, initialize_config_dir
from hydra.core.hydra_config import HydraConfig
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.override_parser.types import Quote, QuotedString
from hydra.core.utils import JobReturn, JobStatus
from hydra.errors import (
    CompactHydraException,
    HydraException,
    InstantiationException,
    MissingConfigException,
    OverrideParseException,
)
from hydra.experimental.callback import Callback
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
from unlearn_runner.trust import CONF, PACKAGE, allowed, arguments_for_hydra, literal
from unlearn_runner.validation import NEEDED, checked, require_groups

TYPED: list[str] = []  # the command as it was typed

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

FAILURES = "failures.jsonl"  # in a sweep's folder
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
    return shlex.quote(f"{key}={QuotedString(literal(value), Quote.single).with_quotes()}")


def command_again(*overrides: str) -> str:
    """This command with other overrides, as one types it; in words where it is not known, as in one job of many."""
    keys = tuple(override.lstrip("'\"").partition("=")[0] + "=" for override in overrides)
    script, *typed = TYPED or sys.argv
    as_module = Path(script).resolve() == PACKAGE / "__main__.py"
    known = (as_module or Path(script).name == "train.py") and HydraConfig.initialized()
    if not known or HydraConfig.get().mode == RunMode.MULTIRUN:
        return " ".join(("the same command", *(["with"] if overrides else []), *overrides))
    kept = [shlex.quote(argument) for argument in typed if not (keys and argument.lstrip("+").startswith(keys))]
    return " ".join(("python", *(["-m", "unlearn_runner"] if as_module else [shlex.quote(script)]), *kept, *overrides))


# 1. What a configuration may ask for


def configuration(cfg: DictConfig) -> dict[str, Any]:
    """The composed configuration, resolved and checked. Raises ConfigurationError with one sentence."""
    said = OmegaConf.to_container(cfg, resolve=False)
    require_groups(said)
    found = OmegaConf.to_container(cfg, resolve=True, throw_on_missing=True)
    found["security"] = {"allow": []}  # trust is not handed on with a run's folder
    try:
        return checked(found, allowed(cfg), CONF)
    except ConfigurationError as error:
        option, rest = re.match(r"([\w.]*)(.*)", str(error), re.DOTALL).groups()
        if (source := source_of(option, said)) == option:
            raise
        raise ConfigurationError(f"{source}{rest}") from error


def source_of(option: str, said: Mapping[str, Any]) -> str:
    """The option that another one takes its value from, if it does: trainer.batch_size has that of budget.batch_size,
    and there a person has set it.
    """
    value: Any = said
    for part in option.split("."):
        value = value.get(part) if isinstance(value, Mapping) else None
    reference = re.fullmatch(r"\$\{([\w.]+)\}", value) if isinstance(value, str) else None
    return option if reference is None else source_of(reference[1], said)


def composed(overrides: Sequence[str]) -> dict[str, Any]:
    """The same of overrides as on the command line, where Hydra has not composed them: of a run on its own, which has
    no command.
    """
    with initialize_config_dir(str(CONF), version_base="1.3"):
        cfg = compose("train", list(overrides), return_hydra_config=True)
    HydraConfig.instance().set_config(cfg)
    return configuration(OmegaConf.masked_copy(cfg, [key for key in cfg if key != "hydra"]))


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
            why = sentence_of(error) or "".join(traceback.format_exception(error))
            line = {"sweep": os.environ[SWEEP], "job": str(hydra.job.num), "overrides": list(hydra.overrides.task)}
            folder = Path(hydra.sweep.dir)
            with suppress(OSError):  # the job's own failure is what counts
                folder.mkdir(parents=True, exist_ok=True)
                with open(folder / FAILURES, "a", encoding="utf-8") as file:
                    file.write(json.dumps({**line, "error": why}, allow_nan=False) + "\n")
        elif sentence_of(error) is not None:
            raise _Through from error
        known = known_cause(error)
        if known is not None and known is not error:  # a job's exception loses its cause on the way to the launcher
            raise known from error
        raise


def _returned(job: JobReturn) -> Any:
    """What a job returns or raises. Hydra's own prints a line first; here the job is named after its sentence."""
    if job.status == JobStatus.COMPLETED:
        return job._return_value
    error = job._return_value
    if job.hydra_cfg is not None and job.hydra_cfg.hydra.mode == RunMode.MULTIRUN:
        number = job.hydra_cfg.hydra.job.num
        error.add_note(f"(job {number} of the sweep: {' '.join(job.overrides)}; {FAILURES} in its folder has all)")
    raise error


JobReturn.return_value = property(_returned, JobReturn.return_value.fset)


@final
class Comparison(Callback):
    """At the end of a sweep: how its runs are compared."""

    def on_multirun_end(self, config: DictConfig, **kwargs: Any) -> None:
        print(f"to compare the runs: python scripts/compare.py {shlex.quote(config.hydra.sweep.dir)}", flush=True)


@contextmanager
def one_sentence() -> Iterator[None]:
    """Print a known mistake as one sentence to stderr and exit: 1, or 130 after an interruption.

    HYDRA_FULL_ERROR=1 shows the whole traceback instead.
    """
    full = os.environ.get("HYDRA_FULL_ERROR") == "1"
    os.environ["HYDRA_FULL_ERROR"] = "1"  # so that Hydra lets exceptions through to here
    try:
        TYPED[:] = sys.argv
        sys.argv[1:] = arguments_for_hydra(sys.argv[1:], NEEDED)
        yield
    except (KeyboardInterrupt, Exception, _Through) as error:
        if isinstance(error, _Through):
            error = error.__cause__
        mistake = sentence_of(error)
        if full or mistake is None:
            raise error
        with suppress(OSError):  # a terminal that was closed
            print(mistake, *getattr(error, "__notes__", ()), sep="\n", file=sys.stderr, flush=True)
        sys.exit(130 if isinstance(error, KeyboardInterrupt) else 1)
    finally:
        TYPED.clear()


def sentence_of(error: BaseException) -> str | None:
    """The sentence for the user; None for what only a traceback can explain."""
    if (known := known_cause(error)) is not None:
        return str(known)
    if isinstance(error, MissingMandatoryValue):
        return f"{error.full_key} is missing: give it, {error.full_key}=..."
    if isinstance(error, (CompactHydraException, OmegaConfBaseException)):
        return _of_composition(error)
    if isinstance(error, ValueError) and "Config group override must be" in str(error):  # Hydra: group=null
        return (
            "a group needs one of its options, got null; leave it out, take it away (~<group>), or take logger=jsonl."
        )
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
        if (group, option) == ("hydra/sweeper", "optuna"):
            return "hydra/sweeper=optuna, a search by Optuna, needs pip install 'unlearn_runner[optuna]'."
        return f"{group}={option}: there is no such option{near(option, known)}; there are {', '.join(known)}."
    if (given := re.match(r"Override \+?(.*) looks like a config group override, but", str(error))) is not None:
        key, _, value = given[1].partition("=")
        group = key.partition("@")[0].rpartition("/")[0]  # conf/dataset/concepts once held what conf/dataset holds
        meant = f"; did you mean {group}={value}?" if group and (CONF / group / f"{value}.yaml").is_file() else "."
        return f"{key}: there is no such group of options{meant}"
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
    if (group := re.match(r"Could not override '([\w/]+)'\. No match in the defaults list", str(error))) is not None:
        above, _, name = group[1].rpartition("/")
        having = _choices_with(above, name)
        where = f"; these have: {', '.join(f'{above}={choice}' for choice in having)}" if having else ""
        return f"{group[1]}: this {above or 'configuration'} has no such group of options{where}."
    if (several := re.match(r"Ambiguous value for argument '(.+?)=(.*?)'\n", str(error))) is not None:
        key, values = several.groups()
        return (
            f"{key}={values}: several values are a sweep, python train.py -m ...; of one value with a comma write "
            f"{as_override(key, values)}, of a list '{key}=[{values}]'."
        )
    if (key := re.match(r"Could not delete from config\. '(\S+)' does not exist", str(error))) is not None:
        return f"~{key[1]}: there is nothing to take away: no such option, or it is null."
    if isinstance(below, (ConfigAttributeError, ConfigKeyError)) and below.full_key:
        siblings = [] if below.parent_node is None or below.parent_node._is_none() else list(below.parent_node)
        return f"{below.full_key}: there is no such option{near(str(below.key), map(str, siblings))}."
    if isinstance(below, InterpolationKeyError):
        wanted = re.search(r"'([^']*)' not found", str(below))
        if str(below.full_key).startswith("hydra."):
            return (
                f"{below.full_key}: its text has ${{{wanted[1] if wanted else ''}}}, which is read as the name of an "
                r"option; for the characters themselves write \${."
            )
        return _without_source(below.full_key, wanted[1] if wanted else "another option")
    if (wanted := re.search(r"Error trying to access ([\w.]+): node `.*` is not a container", str(below))) is not None:
        return _without_source(below.full_key, wanted[1])
    if getattr(below, "full_key", None):
        return f"{below.full_key}: {first_line(below)}"
    return " ".join(str(below).split())


def _without_source(option: str, source: str) -> str:
    return (
        f"{option} takes its value from {source}, which there is not with these groups; choose a dataset, model and "
        "method that have it."
    )


def _choices_with(group: str, name: str) -> list[str]:
    """The choices of a group that have a group of options of this name themselves."""
    found = []
    for file in sorted((CONF / group).glob("*.yaml")) if group else ():
        defaults = OmegaConf.load(file).get("defaults", ())
        if any(name in part for part in defaults if OmegaConf.is_dict(part)):
            found.append(file.stem)
    return found
