"""A configuration against the annotations of every constructor that it names, before any of them is imported.

The annotations are the schema: types, ranges (`Annotated`, unlearn_runner/options.py), choices (`Literal`). They are
read from the source files, for importing what they stand in takes seconds (torch, diffusers); pydantic judges the
values. `Configuration` is the schema of what stands outside of constructors.
"""

import ast
import collections.abc
import difflib
import importlib.util
import math
import types
import typing
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Annotated, Any, Literal, NamedTuple, TypedDict, get_args, get_origin

import annotated_types
import pydantic

from unlearn_runner import options, rules
from unlearn_runner.errors import ConfigurationError
from unlearn_runner.options import FOREIGN, BatchSize, LearningRate, PositiveInt, Seed

TRUSTED = ("unlearn_runner.", "torch.optim.", "diffusers.optimization.", "stable_baselines3.")
FILLED_IN = ("model", "generator", "labels", "clip")  # by the runner, of a method
GIVEN = {"model.network": ("image_shape", "num_labels", "seed", "prompts")}  # by the dataset and the run


# 1. What stands in a source file, unimported


class Opaque:
    """Stands for a class of a source file. A configuration gives one as a group of options with its `_target_`."""

    module: str
    name: str

    def __class_getitem__(cls, _: Any) -> type["Opaque"]:
        return cls


@cache
def opaque(module: str, name: str) -> type[Opaque]:
    return type(name, (Opaque,), {"module": module, "name": name})


class _Package:
    """Stands for an imported module: its attributes are found when they are asked for."""

    def __init__(self, module: str):
        self._module = module

    def __getattr__(self, name: str) -> Any:
        below = f"{self._module}.{name}"
        return _Package(below) if _file_of(below) else opaque(self._module, name)


LIGHT = {"typing": typing, "collections.abc": collections.abc, "annotated_types": annotated_types,
         "unlearn_runner.options": options}  # fmt: skip


@cache
def _file_of(module: str) -> Path | None:
    """The source file of a module; nothing is imported but where its top package lies."""
    top, *below = module.split(".")
    try:
        spec = importlib.util.find_spec(top)
    except (ImportError, ValueError):
        return None
    if spec is None:
        return None
    if not spec.submodule_search_locations:  # a module of one file
        return Path(spec.origin) if spec.origin and spec.origin.endswith(".py") and not below else None
    paths = [Path(place, *below) for place in spec.submodule_search_locations]
    files = [file for path in paths for file in (path / "__init__.py", path.with_suffix(".py"))]
    return next((file for file in files if file.is_file()), None)


class Source(collections.abc.Mapping):
    """The names at the top of a module, and what an annotation may mean by them."""

    def __init__(self, module: str, file: Path):
        self.module = module
        self.is_package = file.name == "__init__.py"
        self.found: dict[str, ast.stmt] = {}
        self._collect(ast.parse(file.read_text(encoding="utf-8")).body)

    def _collect(self, body: list[ast.stmt]) -> None:
        for node in body:
            if isinstance(node, ast.If):  # TYPE_CHECKING
                self._collect(node.body)
            elif isinstance(node, (ast.ClassDef, ast.FunctionDef)):
                self.found[node.name] = node
            elif isinstance(node, (ast.Import, ast.ImportFrom)):
                for alias in node.names:
                    self.found[alias.asname or alias.name.split(".")[0]] = node
            elif isinstance(node, ast.Assign) and isinstance(node.targets[0], ast.Name):
                self.found[node.targets[0].id] = node
            elif isinstance(node, ast.AnnAssign) and isinstance(node.target, ast.Name) and node.value is not None:
                self.found[node.target.id] = node

    def origin(self, name: str) -> tuple[str, str] | None:
        """The module and the name there that an import at the top gives to `name`."""
        node = self.found.get(name)
        if not isinstance(node, ast.ImportFrom):
            return None
        package = self.module.split(".")
        if node.level:
            package = package[: len(package) - node.level + self.is_package]
            module = ".".join([*package, *([node.module] if node.module else [])])
        else:
            module = node.module
        return next((module, alias.name) for alias in node.names if (alias.asname or alias.name) == name)

    def __getitem__(self, name: str) -> Any:
        """For `eval`: what an annotation means by a name."""
        node = self.found.get(name)
        if isinstance(node, ast.ImportFrom):
            module, original = self.origin(name)
            if module in LIGHT:
                return getattr(LIGHT[module], original)
            if module.startswith("unlearn_runner."):
                return source_of(module)[original]
            return _Package(f"{module}.{original}") if _file_of(f"{module}.{original}") else opaque(module, original)
        if isinstance(node, ast.Import):
            return _Package(next(a.name if a.asname else name for a in node.names if (a.asname or a.name) == name))
        if isinstance(node, ast.ClassDef):
            return opaque(self.module, name)
        if isinstance(node, (ast.Assign, ast.AnnAssign)):
            return self.evaluate(node.value)
        if node is None and name in ("int", "float", "str", "bool", "list", "dict", "tuple", "type", "set", "object"):
            return {"int": int, "float": float, "str": str, "bool": bool, "list": list, "dict": dict, "tuple": tuple,
                    "type": type, "set": set, "object": Any}[name]  # fmt: skip
        raise KeyError(name)

    def __iter__(self) -> Iterator[str]:
        return iter(self.found)

    def __len__(self) -> int:
        return len(self.found)

    def evaluate(self, expression: ast.expr) -> Any:
        """The type that an annotation is; Any where it is none that could be understood."""
        try:
            code = compile(ast.Expression(expression), self.module, "eval")
            value = eval(code, {"__builtins__": {}}, self)
            if isinstance(value, str):  # a forward reference
                value = self.evaluate(ast.parse(value, mode="eval").body)
        except Exception:
            return Any
        return value


@cache
def source_of(module: str) -> Source | None:
    file = _file_of(module)
    return None if file is None else Source(module, file)


def _defined(module: str, name: str) -> tuple[Source, ast.stmt] | None:
    """Where a name is defined, through the imports of other modules."""
    for _ in range(10):
        source = source_of(module)
        if source is None or name not in source.found:
            return None
        origin = source.origin(name)
        if origin is None:
            return source, source.found[name]
        module, name = origin
    return None


class Option(NamedTuple):
    """A parameter of a constructor, as far as a configuration may give it."""

    type: Any
    required: bool


@dataclass(frozen=True)
class Constructor:
    """A class or a function, its options and what it makes: all classes that the result is known to be of."""

    name: str
    options: dict[str, Option]
    makes: frozenset[tuple[str, str]]


@cache
def constructor_of(target: str) -> Constructor | None:
    """None if there is no such class or function."""
    module, _, name = target.rpartition(".")
    found = _defined(module, name) if module else None
    if found is None or not isinstance(found[1], (ast.ClassDef, ast.FunctionDef)):
        return None
    source, node = found
    if isinstance(node, ast.FunctionDef):
        made = source.evaluate(node.returns) if node.returns is not None else None
        classes = [arm for arm in _arms(made) if isinstance(arm, type) and issubclass(arm, Opaque)]
        makes = frozenset().union(*(_ancestors(arm.module, arm.name) for arm in classes))
        return Constructor(name, _signature(source, node, name), makes)
    return Constructor(name, _of_class(source, node), _ancestors(source.module, node.name))


def _of_class(source: Source, node: ast.ClassDef) -> dict[str, Option]:
    init = next((part for part in node.body if isinstance(part, ast.FunctionDef) and part.name == "__init__"), None)
    if init is not None:
        return _signature(source, init, node.name, skip=1)
    fields: dict[str, Option] = {}
    bases = [found for base in node.bases if (found := _class_of(source, base)) is not None]
    for base in bases:
        fields |= _of_class(*base)
    is_record = any("dataclass" in ast.unparse(part) for part in node.decorator_list) or any(
        ast.unparse(base).endswith("NamedTuple") for base in node.bases
    )
    for part in node.body if is_record else []:
        if isinstance(part, ast.AnnAssign) and "ClassVar" not in ast.unparse(part.annotation):
            fields[part.target.id] = Option(source.evaluate(part.annotation), part.value is None)
    return fields


def _class_of(source: Source, base: ast.expr) -> tuple[Source, ast.ClassDef] | None:
    value = source.evaluate(base)
    if not (isinstance(value, type) and issubclass(value, Opaque)):
        return None
    found = _defined(value.module, value.name)
    return found if found is not None and isinstance(found[1], ast.ClassDef) else None


def makes(target: str, kind: str) -> bool:
    """Whether a constructor makes a class of the package, given by its path there, or one that derives from it."""
    constructor = constructor_of(target)
    return constructor is not None and _defined_at(_a(kind)) in constructor.makes


@cache
def _ancestors(module: str, name: str) -> frozenset[tuple[str, str]]:
    """A class and all that it derives from, by where they are defined."""
    found = _defined(module, name)
    if found is None or not isinstance(found[1], ast.ClassDef):
        return frozenset({(module, name)})
    source, node = found
    bases = (source.evaluate(base) for base in node.bases)
    above = (
        _ancestors(base.module, base.name) for base in bases if isinstance(base, type) and issubclass(base, Opaque)
    )
    return frozenset({(source.module, node.name)}).union(*above)


def _defined_at(made: type[Opaque]) -> tuple[str, str]:
    found = _defined(made.module, made.name)
    return (made.module, made.name) if found is None else (found[0].module, found[1].name)


def _signature(source: Source, node: ast.FunctionDef, owner: str, skip: int = 0) -> dict[str, Option]:
    """The parameters of a function; those that `**` takes are named by the module's FURTHER_OPTIONS."""
    arguments = node.args
    named = [*arguments.posonlyargs, *arguments.args]
    defaults = [*[None] * (len(named) - len(arguments.defaults)), *arguments.defaults]
    named, defaults = [*named[skip:], *arguments.kwonlyargs], [*defaults[skip:], *arguments.kw_defaults]
    found = {
        argument.arg: Option(
            Any if argument.annotation is None else source.evaluate(argument.annotation), default is None
        )
        for argument, default in zip(named, defaults, strict=True)
    }
    further = source.found.get("FURTHER_OPTIONS") if arguments.kwarg is not None else None
    if isinstance(further, ast.Assign):
        for target in ast.literal_eval(further.value).get(owner, ()):
            others = constructor_of(target).options.items()
            found = {key: Option(kind, required=False) for key, (kind, _) in others} | found
    return found


# 2. Values and types


def _arms(kind: Any) -> list[Any]:
    """The types of a union; a type alone is one."""
    if get_origin(kind) in (typing.Union, types.UnionType):
        return [arm for part in get_args(kind) for arm in _arms(part)]
    return [kind]


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
    arms = [arm for arm in _arms(kind) if arm is not type(None)]
    words = [_arm_in_words(arm, value) for arm in arms] + ["null"] * (len(arms) < len(_arms(kind)))
    words = list(dict.fromkeys(words))
    return words[0] if len(words) == 1 else f"{', '.join(words[:-1])} or {words[-1]}"


def _arm_in_words(kind: Any, value: Any) -> str:
    if get_origin(kind) is Literal:
        return "one of " * (len(get_args(kind)) > 1) + ", ".join(str(choice) for choice in get_args(kind))
    if get_origin(kind) is Annotated:
        kind, *limits = get_args(kind)
        return " ".join([_arm_in_words(kind, value), *_limits_in_words(limits, value)])
    if kind in NUMBERS:
        return NUMBERS[kind][0]
    if _is_list(kind):
        inner = get_args(kind)[0] if get_args(kind) else Any
        bare = _bare(inner)
        of = NUMBERS[bare][1] if bare in NUMBERS else "such: " + in_words(inner, value)
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


def near(name: str, known: Iterable[str]) -> str:
    """ "; near it: ..." for a name that is mistyped."""
    found = difflib.get_close_matches(name, list(known), n=3)
    return f"; near it: {', '.join(found)}" if found else ""


# 3. The walk


class _Check:
    """One walk over a configuration; returns it with numbers turned into text where a text is meant."""

    def __init__(self, trusted: Sequence[str], groups: Path | None):
        self.trusted = tuple(trusted)
        self.groups = groups

    def value(self, value: Any, kind: Any, path: str) -> Any:
        if isinstance(value, float) and not math.isfinite(value):
            raise ConfigurationError(f"{path} must be {in_words(kind)}, got {value}.")
        arms = _arms(kind)
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
            raise ConfigurationError(
                f"{path} must be {in_words(kind, value)}, got {shown(value)}{self._meant(path, value)}."
            )
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

    def _group(self, value: Mapping[str, Any], arms: list[Any], kind: Any, path: str) -> dict[str, Any]:
        if "_target_" in value:
            parts = [arm for arm in arms if _is_part(arm)]
            if not parts:
                raise ConfigurationError(f"{path} must be {in_words(kind)}, got a group of options with a _target_.")
            return self.part(value, parts, path, GIVEN.get(path, ()))
        for arm in arms:
            if typing.is_typeddict(arm):
                return self.table(value, typing.get_type_hints(arm, include_extras=True), path, arm.__required_keys__)
            if _is_table(arm):
                _, inner = get_args(_bare(arm)) or (str, Any)
                return {key: self.value(part, inner, f"{path}.{key}") for key, part in value.items()}
        raise ConfigurationError(f"{path} must be {in_words(kind)}, got {shown(value)}.")

    def table(
        self, value: Mapping[str, Any], kinds: Mapping[str, Any], path: str, required: Iterable[str] | None = None
    ) -> dict[str, Any]:
        """A group that no constructor stands behind."""
        prefix = f"{path}." if path else ""
        for key in value:
            if key not in kinds:
                raise ConfigurationError(f"{prefix}{key}: there is no such option{near(key, kinds)}.")
        for key in kinds if required is None else required:
            if key not in value:
                raise ConfigurationError(f"{prefix}{key} is missing: give it, {prefix}{key}=...")
        # what a person sets comes before what is made of it
        first = sorted(value, key=lambda key: isinstance(value[key], Mapping))
        found = {key: self.value(value[key], kinds[key], f"{prefix}{key}") for key in first}
        return {key: found[key] for key in value}

    def part(
        self, value: Mapping[str, Any], kinds: Sequence[Any], path: str, given: Sequence[str] = ()
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
        partial = value.get("_partial_", False)
        if not isinstance(partial, bool):
            raise ConfigurationError(f"{path}._partial_ must be true or false, got {shown(partial)}.")
        wanted = [kind for kind in kinds if (get_origin(kind) is collections.abc.Callable) == partial]
        makes = [made for kind in wanted if (made := _made(kind)) is not None]
        if not wanted:
            raise ConfigurationError(f"{path}._partial_ must be {shown(not partial)}, got {shown(partial)}.")
        if makes and not any(_defined_at(made) in constructor.makes for made in makes):
            raise ConfigurationError(
                f"{path}._target_={target} makes no {' or '.join(made.name for made in makes)}, which is needed there."
            )
        found = {"_target_": target} | ({"_partial_": partial} if "_partial_" in value else {})
        for key, part in value.items():
            if key in ("_target_", "_partial_"):
                continue
            option = constructor.options.get(key)
            if option is None:
                known = [name for name in constructor.options if name not in (*FILLED_IN, *given)]
                raise ConfigurationError(f"{path}.{key}: {constructor.name} has no such option{near(key, known)}.")
            if key in given or (key in FILLED_IN and _is_part(_arms(option.type)[0])):
                if part is not None:
                    raise ConfigurationError(f"{path}.{key} must be null, got {shown(part)}: the runner fills it in.")
                found[key] = None
            else:
                kind = option.type if target.startswith("unlearn_runner.") else FOREIGN.get(key, option.type)
                found[key] = self.value(part, kind, f"{path}.{key}")
        if not partial:
            for key, option in constructor.options.items():
                if option.required and key not in (*value, *FILLED_IN, *given):
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
        """Where an option's name is a group's, and the value one of its choices."""
        group = path.replace(".", "/")
        if self.groups is not None and isinstance(value, str) and (self.groups / group / f"{value}.yaml").is_file():
            return f"; or did you mean {group}={value}?"
        return ""


# 4. The schema of what stands outside of constructors


def _a(target: str) -> type[Opaque]:
    """The class of the package by its path there."""
    module, _, name = target.rpartition(".")
    return opaque(f"unlearn_runner.{module}", name)


def _one_folder(name: str) -> bool:
    """that can be the name of one folder"""
    return bool(name.strip()) and name not in (".", "..") and not set(name) & set("/\\\0\n\r")


Text = Annotated[str, annotated_types.MinLen(1)]
FolderName = Annotated[str, annotated_types.Predicate(_one_folder)]
AnyMetric = (
    _a("evaluation.metrics.Metric") | _a("evaluation.metrics.ImageMetric") | _a("evaluation.metrics.PromptMetric")
)


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
    network: _a("models.model.GenerativeModel")
    pretraining: _a("training.pretraining.Pretraining") | None


class Clip(TypedDict):
    network: _a("models.clip.Clip") | None
    training: _a("training.clip.ClipTraining") | None


class Look(TypedDict):
    metrics: Mapping[str, AnyMetric | None]
    sampling: _a("evaluation.evaluator.Sampling")


class Evaluation(Look):
    num_samples: options.NumSamples
    sampler: options.Sampler
    num_inference_steps: options.NumInferenceSteps
    batch_size: BatchSize
    seed: Seed
    bootstrap: options.Bootstrap | None
    oracle: bool
    every: PositiveInt | None
    features: Literal["classifier", "inception", "open_clip"]
    classifier: _a("evaluation.classifier.ClassifierRecipe")
    extractor: _a("evaluation.features.FeatureExtractor") | None
    relearning: _a("training.relearning.Relearning") | None
    threshold: options.UnitInterval | None
    probe: Look
    at_threshold: Look | None


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
    trainer: _a("training.trainer.Plan")
    driver: _a("drivers.driver.Driver")
    paths: Paths
    hardware: _a("hardware.Hardware")
    dataset: _a("data.forget_retain.Dataset")
    model: Model
    clip: Clip
    method: _a("methods.method.Method")
    evaluation: Evaluation
    logger: _a("training.loggers.Logger")


def require_groups(cfg: Mapping[str, Any], kinds: Mapping[str, Any] | None = None, path: str = "") -> None:
    """Raise ConfigurationError where a value stands for a whole group of options, in a configuration that is not
    resolved yet: what refers to the group's options could not be.
    """
    for key, kind in (kinds or typing.get_type_hints(Configuration, include_extras=True)).items():
        arms = _arms(kind)
        value, option = cfg.get(key), f"{path}{key}"
        if isinstance(value, Mapping):
            inner = next((arm for arm in arms if typing.is_typeddict(arm)), None)
            if inner is not None:
                require_groups(value, typing.get_type_hints(inner, include_extras=True), f"{option}.")
        elif isinstance(value, str) and "${" in value:
            continue
        elif key in cfg and all(_is_part(arm) or _is_table(arm) for arm in arms):
            raise ConfigurationError(f"{option} must be {in_words(kind)}, got {shown(value)}.")


def checked(cfg: Mapping[str, Any], allow: Sequence[str] = (), groups: Path | None = None) -> dict[str, Any]:
    """The configuration, with names that look like numbers as text.

    `allow` are prefixes of `_target_` that the user trusts besides TRUSTED; `groups` is the folder of the configuration
    groups, for better advice. Raises ConfigurationError: one sentence with the option, what was expected, what came.
    """
    kinds = typing.get_type_hints(Configuration, include_extras=True)
    found = _Check([*TRUSTED, *allow], groups).table(cfg, kinds, "")
    rules.check(found)
    return found
