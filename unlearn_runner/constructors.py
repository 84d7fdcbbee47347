"""What a `_target_` names: its options with their types, and what it makes, read from its source file.

Nothing is imported, for importing takes seconds (torch, diffusers): the annotations of constructors are understood from
the syntax tree, also through the imports of other modules.
"""

import ast
import collections.abc
import importlib.util
import inspect
import types
import typing
from collections.abc import Iterator, Mapping
from contextlib import suppress
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any, NamedTuple, get_args, get_origin

import annotated_types

from unlearn_runner import options


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
    default: Any = inspect.Parameter.empty  # where there is none, or no plain value


@dataclass(frozen=True)
class Constructor:
    """A class or a function, its options and what it makes: all classes that the result is known to be of."""

    name: str
    options: dict[str, Option]
    makes: frozenset[tuple[str, str]]
    requires: tuple[str, ...] = ()  # what a method says at the top of its class that it needs


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
        classes = [arm for arm in arms_of(made) if isinstance(arm, type) and issubclass(arm, Opaque)]
        makes = frozenset().union(*(_ancestors(arm.module, arm.name) for arm in classes))
        needs = (need for target in _further(source, node, name) for need in constructor_of(target).requires)
        return Constructor(name, _signature(source, node, name), makes, tuple(dict.fromkeys(needs)))
    requires = tuple(constant_of(target, "requires") or ())
    return Constructor(name, _of_class(source, node), _ancestors(source.module, node.name), requires)


def _further(source: Source, node: ast.FunctionDef, owner: str) -> tuple[str, ...]:
    """The constructors that the module's FURTHER_OPTIONS names for what `**` takes."""
    further = source.found.get("FURTHER_OPTIONS") if node.args.kwarg is not None else None
    return ast.literal_eval(further.value).get(owner, ()) if isinstance(further, ast.Assign) else ()


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
            fields[part.target.id] = _option(source, part.annotation, part.value)
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
    return constructor is not None and defined_at(in_package(kind)) in constructor.makes


@cache
def constant_of(target: str, name: str) -> Any:
    """The literal that a class, or one it derives from, gives to an attribute of its own; None if there is none."""
    module, _, title = target.rpartition(".")
    found = _defined(module, title) if module else None
    if found is None or not isinstance(found[1], ast.ClassDef):
        return None
    source, node = found
    for part in node.body:
        named = part.targets if isinstance(part, ast.Assign) else [getattr(part, "target", None)]
        if any(isinstance(one, ast.Name) and one.id == name for one in named):
            with suppress(ValueError):
                return ast.literal_eval(part.value)
    above = (value for base in node.bases if isinstance(value := source.evaluate(base), type))
    values = (constant_of(f"{base.module}.{base.name}", name) for base in above if issubclass(base, Opaque))
    return next((value for value in values if value is not None), None)


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


def defined_at(made: type[Opaque]) -> tuple[str, str]:
    found = _defined(made.module, made.name)
    return (made.module, made.name) if found is None else (found[0].module, found[1].name)


def _signature(source: Source, node: ast.FunctionDef, owner: str, skip: int = 0) -> dict[str, Option]:
    """The parameters of a function; those that `**` takes are named by the module's FURTHER_OPTIONS."""
    arguments = node.args
    named = [*arguments.posonlyargs, *arguments.args]
    defaults = [*[None] * (len(named) - len(arguments.defaults)), *arguments.defaults]
    named, defaults = [*named[skip:], *arguments.kwonlyargs], [*defaults[skip:], *arguments.kw_defaults]
    found = {
        argument.arg: _option(source, argument.annotation, default)
        for argument, default in zip(named, defaults, strict=True)
    }
    for target in _further(source, node, owner):
        others = constructor_of(target).options.items()
        found = {key: option._replace(required=False) for key, option in others} | found
    return found


def _option(source: Source, annotation: ast.expr | None, default: ast.expr | None) -> Option:
    kind = Any if annotation is None else source.evaluate(annotation)
    try:
        return Option(kind, required=True) if default is None else Option(kind, False, ast.literal_eval(default))
    except ValueError:
        return Option(kind, required=False)


def with_defaults(node: Any) -> Any:
    """A configuration in which every group of options has all options of its constructor."""
    if isinstance(node, (list, tuple)):
        return [with_defaults(part) for part in node]
    if not isinstance(node, Mapping):
        return node
    constructor = constructor_of(node["_target_"]) if "_target_" in node else None
    defaults = (
        {}
        if constructor is None
        else {
            name: option.default
            for name, option in constructor.options.items()
            if option.default is not inspect.Parameter.empty
        }
    )
    return defaults | {key: with_defaults(part) for key, part in node.items()}


def arms_of(kind: Any) -> list[Any]:
    """The types of a union; a type alone is one."""
    if get_origin(kind) in (typing.Union, types.UnionType):
        return [arm for part in get_args(kind) for arm in arms_of(part)]
    return [kind]


def in_package(target: str) -> type[Opaque]:
    """The class of the package by its path there."""
    module, _, name = target.rpartition(".")
    return opaque(f"unlearn_runner.{module}", name)


def parts(node: Any, path: str = "") -> Iterator[tuple[str, Mapping[str, Any]]]:
    """Every group of options that has a `_target_`, with its path."""
    if isinstance(node, Mapping):
        if "_target_" in node:
            yield path, node
        for key, part in node.items():
            yield from parts(part, f"{path}.{key}".strip("."))
    elif isinstance(node, (list, tuple)):
        for index, part in enumerate(node):
            yield from parts(part, f"{path}[{index}]")


def class_name(node: Mapping[str, Any]) -> str:
    return node["_target_"].rpartition(".")[2]
