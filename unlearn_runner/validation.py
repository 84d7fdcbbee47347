"""A configuration against the annotations of every constructor that it names, before any of them is imported.

The annotations are the schema: types, ranges (`Annotated`, unlearn_runner/options.py), choices (`Literal`);
unlearn_runner/constructors.py reads them from the source files, pydantic judges the values. `Configuration` is the
schema of what stands outside of constructors.
"""

import collections.abc
import math
import typing
from collections.abc import Iterable, Mapping, Sequence
from functools import cache
from pathlib import Path
from typing import Annotated, Any, Literal, TypedDict, get_args, get_origin

import annotated_types
import pydantic

from unlearn_runner.constructors import Opaque, arms_of, constructor_of, defined_at, in_package, with_defaults
from unlearn_runner.errors import ConfigurationError, near
from unlearn_runner.options import CANNOT_STEP, FOREIGN, BatchSize, LearningRate, PositiveInt, Seed
from unlearn_runner.rules import configuration

TRUSTED = ("unlearn_runner.", "torch.optim.", "diffusers.optimization.", "stable_baselines3.")
GIVEN = {"model.network": ("image_shape", "label_names", "seed")}  # by the dataset and the run


# 1. Values and types


def _bare(kind: Any) -> Any:
    return get_args(kind)[0] if get_origin(kind) is Annotated else kind


def _is_list(kind: Any) -> bool:
    return get_origin(_bare(kind)) in (collections.abc.Sequence, collections.abc.Iterable, list, tuple, set)


def _is_table(kind: Any) -> bool:
    return get_origin(_bare(kind)) in (dict, collections.abc.Mapping) or typing.is_typeddict(kind)


def _made(kind: Any) -> type[Opaque] | None:
    """The class that a group of options is to make, for a type that is one, or a callable that returns it."""
    if get_origin(kind) is collections.abc.Callable:
        kind = get_args(kind)[-1]
    return kind if isinstance(kind, type) and issubclass(kind, Opaque) else None


def _is_part(kind: Any) -> bool:
    return get_origin(kind) is collections.abc.Callable or _made(kind) is not None


def _outermost(kind: Any) -> Any:
    """What kind of value a type is of, its range and what is in it aside."""
    bare = _bare(kind)
    if _is_table(bare):
        return dict
    if get_origin(bare) is Literal:
        return type(get_args(bare)[0])
    return (get_origin(bare) if get_origin(bare) is tuple else list) if _is_list(bare) else bare


def _narrowed(kind: Any, target: str, option: str) -> Any:
    """The annotation of a constructor's option; of another library's, what FOREIGN says of the kinds that it allows."""
    known = next((ranges for prefix, ranges in FOREIGN.items() if target.startswith(prefix)), {})
    if option not in known:
        return kind
    allowed = [_outermost(arm) for arm in arms_of(kind)]
    arms = [arm for arm in arms_of(known[option]) if Any in allowed or _outermost(arm) in allowed]
    return typing.Union[tuple(arms)] if arms else kind  # noqa: UP007 - made of a list


@cache
def _adapter(kind: Any) -> pydantic.TypeAdapter:
    return pydantic.TypeAdapter(kind)


def _fits(value: Any, kind: Any) -> bool:
    try:
        _adapter(kind).validate_python(value, strict=True)
    except pydantic.ValidationError:
        return False
    return True


NUMBERS = {int: ("a whole number", "whole numbers"), float: ("a number", "numbers"), bool: ("true or false",) * 2,
           str: ("a text", "texts")}  # fmt: skip


def _as_meant(value: Any, kinds: Sequence[Any]) -> Any:
    """A whole number as text where a name is meant that looks like one, and as float where any number is meant."""
    bare = [_bare(kind) for kind in kinds]
    if not isinstance(value, int) or isinstance(value, bool) or int in bare:
        return value
    if float in bare:
        return float(value)
    named = str in bare or any(get_origin(kind) is Literal and str(value) in get_args(kind) for kind in kinds)
    return str(value) if named else value


def in_words(kind: Any, value: Any = None) -> str:
    """What a type expects, for a sentence; `value` is what came, whose bounds are then named even if they are huge."""
    arms = [arm for arm in arms_of(kind) if arm is not type(None)]
    words = [_arm_in_words(arm, value) for arm in arms] + ["null"] * (len(arms) < len(arms_of(kind)))
    words = list(dict.fromkeys(words))
    return words[0] if len(words) == 1 else f"{', '.join(words[:-1])} or {words[-1]}"


def _arm_in_words(kind: Any, value: Any) -> str:
    if get_origin(kind) is Literal:
        words = [shown(choice) if isinstance(choice, bool) else str(choice) for choice in get_args(kind)]
        return "one of " * (len(words) > 1) + ", ".join(words)
    if get_origin(kind) is Annotated:
        kind, *limits = get_args(kind)
        return " ".join([_arm_in_words(kind, value), *_limits_in_words(limits, value)])
    if kind in NUMBERS:
        return NUMBERS[kind][0]
    if _is_list(kind):
        inner = get_args(kind)[0] if get_args(kind) else Any
        bare = [_bare(arm) for arm in arms_of(inner)]
        plain = all(arm in NUMBERS for arm in bare)
        of = " or ".join(NUMBERS[arm][1] for arm in bare) if plain else "such: " + in_words(inner, value)
        limits = _limits_in_words(get_args(inner)[1:], value) if get_origin(inner) is Annotated else []
        return " ".join([f"a list of {of}", *limits])
    if _is_table(kind):
        return "a group of options"
    if _made(kind) is not None:
        return f"a group of options that makes a {_made(kind).name}"
    return "a group of options with a _target_" if _is_part(kind) else "something else"


def _limits_in_words(limits: Sequence[Any], value: Any) -> list[str]:
    low = high = None
    words = []
    for limit in limits:
        if isinstance(limit, (annotated_types.Gt, annotated_types.Ge)):
            low = limit
        elif isinstance(limit, (annotated_types.Lt, annotated_types.Le)):
            high = limit
        elif isinstance(limit, (annotated_types.MinLen, annotated_types.Len)) and limit.min_length:
            words.append("that is not empty" if limit.min_length == 1 else f"of at least {limit.min_length}")
        elif isinstance(limit, annotated_types.MultipleOf):
            words.append(f"that is a multiple of {limit.multiple_of}")
        elif isinstance(limit, annotated_types.Predicate):
            words.append(getattr(limit.func, "__doc__", "") or "")
    least, strict_low = (None, False) if low is None else _bound(low)
    most, strict_high = (None, False) if high is None else _bound(high)
    exceeds = isinstance(value, (int, float)) and most is not None and value >= most
    if most is not None and abs(most) > 10_000 and not exceeds:
        most = None  # there to keep machines alive, and of no interest to who is far from it
    if least is not None and most is not None:
        words.insert(0, f"in {'(' if strict_low else '['}{least}, {most}{')' if strict_high else ']'}")
    elif least is not None:
        words.insert(0, f"above {least}" if strict_low else f"of at least {least}")
    elif most is not None:
        words.insert(0, f"below {most}" if strict_high else f"of at most {most}")
    return [word for word in words if word]


def _bound(limit: Any) -> tuple[Any, bool]:
    strict = isinstance(limit, (annotated_types.Gt, annotated_types.Lt))
    return next(getattr(limit, name) for name in ("gt", "ge", "lt", "le") if hasattr(limit, name)), strict


def shown(value: Any) -> str:
    """A value as a person writes it in YAML, of one line that is not too long."""
    if isinstance(value, Mapping):
        text = "a group of options" if value else "{}"
    elif value is None or isinstance(value, bool):
        text = {None: "null", True: "true", False: "false"}[value]
    elif isinstance(value, str):
        text = f"'{value}'"
    else:
        text = f"[{', '.join(shown(part) for part in value)}]" if isinstance(value, (list, tuple)) else str(value)
    text = " ".join(text.split())
    return text if len(text) <= 80 else f"{text[:77]}..."


# 2. The walk


class _Check:
    """One walk over a configuration; returns it with numbers turned into text where a text is meant."""

    def __init__(self, trusted: Sequence[str], groups: Path | None):
        self.trusted = tuple(trusted)
        self.groups = groups

    def value(self, value: Any, kind: Any, path: str) -> Any:
        if isinstance(value, float) and not math.isfinite(value):
            raise ConfigurationError(f"{path} must be {in_words(kind)}, got {value}.")
        arms = arms_of(kind)
        if Any in arms or kind is None:
            self._plain(value, path)
            return value
        if value is None and type(None) in arms:
            return None
        if isinstance(value, Mapping):
            return self._group(value, arms, kind, path)
        if isinstance(value, (list, tuple)):
            for arm in arms:
                if _is_list(arm):
                    return self._list(value, arm, kind, path)
        plain = [arm for arm in arms if not (_is_part(arm) or _is_list(arm) or _is_table(arm) or arm is type(None))]
        value = _as_meant(value, plain)
        if not any(_fits(value, arm) for arm in plain):
            meant = self._meant(path, value) if any(_is_part(arm) for arm in arms) else ""
            raise ConfigurationError(f"{path} must be {in_words(kind, value)}, got {shown(value)}{meant}.")
        return value

    def _list(self, value: Sequence[Any], arm: Any, kind: Any, path: str) -> list[Any]:
        inner = get_args(_bare(arm)) or (Any,)
        fixed = get_origin(_bare(arm)) is tuple and Ellipsis not in inner
        kinds = list(inner) if fixed else [inner[0]] * len(value)
        if len(kinds) != len(value):
            raise ConfigurationError(f"{path} must be a list of {len(kinds)}, got {shown(value)}.")
        for limit in get_args(arm)[1:] if get_origin(arm) is Annotated else ():
            least = getattr(limit, "min_length", 0)
            if len(value) < least:
                raise ConfigurationError(f"{path} must be {in_words(kind)}, got {shown(value)}.")
        found = []
        for index, (part, wanted) in enumerate(zip(value, kinds, strict=True)):
            if isinstance(part, Mapping):
                found.append(self.value(part, wanted, f"{path}[{index}]"))
                continue
            try:
                found.append(self.value(part, wanted, path))
            except ConfigurationError:
                raise ConfigurationError(f"{path} must be {in_words(kind, part)}, got {shown(value)}.") from None
        return found

    def _group(self, value: Mapping[Any, Any], arms: list[Any], kind: Any, path: str) -> dict[str, Any]:
        if "_target_" in value:
            parts = [arm for arm in arms if _is_part(arm)]
            if not parts:
                raise ConfigurationError(f"{path} must be {in_words(kind)}, got a group of options with a _target_.")
            return self.part(value, parts, path, GIVEN.get(path, ()))
        for arm in arms:
            if typing.is_typeddict(arm):
                return self.table(value, typing.get_type_hints(arm, include_extras=True), path, arm.__required_keys__)
            if _is_table(arm):
                name, inner = get_args(_bare(arm)) or (str, Any)
                return {_as_meant(key, [name]): self.value(part, inner, f"{path}.{key}") for key, part in value.items()}
        raise ConfigurationError(f"{path} must be {in_words(kind)}, got {shown(value)}.")

    def table(
        self, value: Mapping[Any, Any], kinds: Mapping[str, Any], path: str, required: Iterable[str] | None = None
    ) -> dict[str, Any]:
        """A group that no constructor stands behind."""
        prefix = f"{path}." if path else ""
        for key in value:
            if key not in kinds:
                raise ConfigurationError(f"{prefix}{key}: there is no such option{near(str(key), kinds)}.")
        for key in kinds if required is None else required:
            if key not in value:
                raise ConfigurationError(f"{prefix}{key} is missing: give it, {prefix}{key}=...")
        # what a person sets comes before what is made of it
        first = sorted(value, key=lambda key: isinstance(value[key], Mapping))
        found = {key: self.value(value[key], kinds[key], f"{prefix}{key}") for key in first}
        return {key: found[key] for key in value}

    def part(
        self, value: Mapping[Any, Any], kinds: Sequence[Any], path: str, given: Sequence[str] = ()
    ) -> dict[str, Any]:
        """A group of options of a constructor, which makes one of these kinds, or is to make it when it is called."""
        target = value["_target_"]
        if not isinstance(target, str):
            raise ConfigurationError(f"{path}._target_ must be a text, got {shown(target)}.")
        if not target.startswith(self.trusted):
            raise ConfigurationError(
                f"{path}._target_={target}: only what begins with {', '.join(self.trusted)} is trusted to run; if you "
                f"trust this, too, say so on the command line: ++security.allow=[{target.rpartition('.')[0]}.]"
            )
        constructor = constructor_of(target)
        if constructor is None:
            raise ConfigurationError(f"{path}._target_={target}: there is no such class or function.")
        if target in CANNOT_STEP:
            raise ConfigurationError(f"{path}._target_={target} cannot be used: {CANNOT_STEP[target]}.")
        partial = value.get("_partial_", False)
        if not isinstance(partial, bool):
            raise ConfigurationError(f"{path}._partial_ must be true or false, got {shown(partial)}.")
        wanted = [kind for kind in kinds if (get_origin(kind) is collections.abc.Callable) == partial]
        makes = [made for kind in wanted if (made := _made(kind)) is not None]
        if not wanted:
            raise ConfigurationError(f"{path}._partial_ must be {shown(not partial)}, got {shown(partial)}.")
        if makes and not any(defined_at(made) in constructor.makes for made in makes):
            raise ConfigurationError(
                f"{path}._target_={target} makes no {' or '.join(made.name for made in makes)}, which is needed there."
            )
        if partial and constructor.options:  # a class there is what it is called with
            first, option = next(iter(constructor.options.items()))
            given = (*given, *([first] if _is_part(arms_of(option.type)[0]) else []))
        found = {"_target_": target} | ({"_partial_": partial} if "_partial_" in value else {})
        # what a person sets comes before what is made of it
        for key, part in sorted(value.items(), key=lambda item: isinstance(item[1], Mapping)):
            if key in ("_target_", "_partial_"):
                continue
            option = constructor.options.get(key)
            if option is None:
                known = [name for name in constructor.options if name not in given]
                raise ConfigurationError(f"{path}.{key}: {constructor.name} has no such option{near(str(key), known)}.")
            if key in given:
                raise ConfigurationError(f"{path}.{key}: the runner itself gives it; take it away.")
            found[key] = self.value(part, _narrowed(option.type, target, key), f"{path}.{key}")
        if not partial:
            for key, option in constructor.options.items():
                if option.required and key not in (*value, *given):
                    raise ConfigurationError(f"{path}.{key} is missing: give it, {path}.{key}=...")
        return {key: found[key] for key in value}

    def _plain(self, value: Any, path: str) -> None:
        """What no type is known of: anything but what would be made of a `_target_`."""
        if isinstance(value, Mapping):
            if "_target_" in value:
                raise ConfigurationError(f"{path}._target_: nothing is made there.")
            for key, part in value.items():
                self._plain(part, f"{path}.{key}")
        elif isinstance(value, (list, tuple)):
            for index, part in enumerate(value):
                self._plain(part, f"{path}[{index}]")

    def _meant(self, path: str, value: Any) -> str:
        """Where an option's name is a group's, how to choose of the group."""
        group = path.replace(".", "/")
        choices = sorted(file.stem for file in self.groups.glob(f"{group}/*.yaml")) if self.groups is not None else []
        if not choices:
            return ""
        return f"; did you mean {group}={value}" if value in choices else f"; or choose {group}={'|'.join(choices)}"


# 3. The schema of what stands outside of constructors


def _one_folder(name: str) -> bool:
    """that can be the name of one folder"""
    return bool(name.strip()) and name not in (".", "..") and not set(name) & set("/\\\0\n\r")


Text = Annotated[str, annotated_types.MinLen(1)]
FolderName = Annotated[str, annotated_types.Predicate(_one_folder)]


class Budget(TypedDict):
    max_steps: PositiveInt
    batch_size: BatchSize
    learning_rate: LearningRate


class Paths(TypedDict):
    outputs: Text
    cache: Text


class Choices(TypedDict):
    dataset: str
    model: str
    method: str
    experiment: str | None


class Model(TypedDict):
    weights: Text
    network: in_package("models.model.GenerativeModel")
    pretraining: in_package("training.pretraining.Pretraining") | None


class Clip(TypedDict):
    network: in_package("models.clip.Clip") | None
    training: in_package("training.clip.ClipTraining") | None


class Security(TypedDict):
    allow: Sequence[Text]


class Configuration(TypedDict):
    name: FolderName
    label: Text
    choices: Choices
    seed: Seed
    skip_finished: bool
    objective: Text | Annotated[Sequence[Text], annotated_types.MinLen(1)] | None
    resume_from_checkpoint: Text | None
    security: Security
    budget: Budget
    trainer: in_package("training.trainer.Plan")
    driver: in_package("drivers.driver.Driver")
    paths: Paths
    hardware: in_package("hardware.Hardware")
    dataset: in_package("data.forget_retain.Dataset")
    model: Model
    clip: Clip
    method: collections.abc.Callable[..., in_package("methods.method.Method")]
    evaluation: in_package("training.evaluation.EvaluationPlan")
    judge: in_package("evaluation.judge.JudgeRecipe")
    logger: in_package("training.loggers.Logger") | None


NEEDED = [key for key, kind in Configuration.__annotations__.items() if type(None) not in arms_of(kind)]


def require_groups(cfg: Mapping[Any, Any], kinds: Mapping[str, Any] | None = None, path: str = "") -> None:
    """Raise ConfigurationError where a value stands for a whole group of options, in a configuration that is not
    resolved yet: what refers to the group's options could not be.
    """
    for key, kind in (kinds or typing.get_type_hints(Configuration, include_extras=True)).items():
        arms = arms_of(kind)
        value, option = cfg.get(key), f"{path}{key}"
        if isinstance(value, Mapping):
            inner = next((arm for arm in arms if typing.is_typeddict(arm)), None)
            if inner is not None:
                require_groups(value, typing.get_type_hints(inner, include_extras=True), f"{option}.")
        elif isinstance(value, str) and "${" in value:
            continue
        elif key in cfg and all(_is_part(arm) or _is_table(arm) for arm in arms):
            raise ConfigurationError(f"{option} must be {in_words(kind)}, got {shown(value)}.")


def checked(cfg: Mapping[Any, Any], allow: Sequence[str] = (), groups: Path | None = None) -> dict[str, Any]:
    """The configuration, with names that look like numbers as text.

    `allow` are prefixes of `_target_` that the user trusts besides TRUSTED; `groups` is the folder of the configuration
    groups, for better advice. Raises ConfigurationError: one sentence with the option, what was expected, what came.
    """
    kinds = typing.get_type_hints(Configuration, include_extras=True)
    found = _Check([*TRUSTED, *allow], groups).table(cfg, kinds, "")
    configuration.check(with_defaults(found), allow)
    return found
