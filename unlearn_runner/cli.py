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
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from datetime import datetime
from pathlib import Path

from hydra.core.hydra_config import HydraConfig
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.override_parser.types import Quote, QuotedString
from hydra.errors import CompactHydraException, HydraException
from hydra.types import RunMode
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import MissingMandatoryValue, OmegaConfBaseException

from unlearn_runner.errors import NO_ROOM, known_cause, no_room

UNWRITABLE = (*NO_ROOM, errno.EACCES, errno.EPERM, errno.EROFS, errno.ENOTDIR, errno.EIO)


def _hydra(root: DictConfig) -> DictConfig:
    """Hydra's own configuration, also where it is not composed into the rest yet."""
    return root.hydra if "hydra" in root else HydraConfig.get()


def choice(group: str, *, _root_: DictConfig) -> str | None:
    """`${choice:method}`: which option of a group was chosen. Unlike `${hydra:...}` it works in hydra.sweep.dir."""
    return _hydra(_root_).runtime.choices[group]


OmegaConf.register_new_resolver("choice", choice, replace=True)


def sweep(otherwise: str, *, _root_: DictConfig) -> str:
    """`${sweep:${name}}`: what all jobs of a sweep have in common; for a run on its own, `otherwise`."""
    in_sweep = _hydra(_root_).mode == RunMode.MULTIRUN
    return os.environ.get("WANDB_SWEEP_ID") or (os.environ[SWEEP] if in_sweep else otherwise)


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
        yield
    except (KeyboardInterrupt, Exception) as error:
        mistake = _mistake(error)
        if full or mistake is None:
            raise
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
        below = error.__cause__
        return str(error) + (f"\n{below}" if isinstance(below, OmegaConfBaseException) else "")
    if isinstance(error, ValueError) and "Config group override must be" in str(error):  # Hydra: group=null
        return "a group needs one of its options, got null; leave it out, or take it away with ~<group>."
    cause: BaseException | None = error
    while cause is not None:
        if (isinstance(cause, OSError) and cause.errno in UNWRITABLE) or no_room(cause) is not None:
            where = getattr(cause, "filename", None) or "the run folder or the cache"
            return f"cannot write {where}: {cause}; make room, or give hydra.run.dir=... or paths.cache=..."
        cause = cause.__cause__ or cause.__context__
    return "Interrupted." if isinstance(error, KeyboardInterrupt) else None
