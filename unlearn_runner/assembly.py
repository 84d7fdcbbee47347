"""From a checked configuration to the parts that it describes."""

from collections.abc import Mapping
from functools import partial
from typing import Any

from hydra.errors import InstantiationException
from hydra.utils import get_object


def make(node: Any, **given: Any) -> Any:
    """The part that a node of a resolved configuration describes: an object of its `_target_`, with the options of the
    node, made first where they are nodes themselves, and what is `given` besides; with `_partial_` a function that
    takes what is still missing.

    Unlike `hydra.utils.instantiate` it takes texts as they are: that resolves them once more, and so computes what a
    text refers to, be it a person's prompt. Raises InstantiationException from what the target raises.
    """
    if isinstance(node, (list, tuple)):
        return [make(part) for part in node]
    if not isinstance(node, Mapping):
        return node
    options = {key: make(part) for key, part in node.items() if key not in ("_target_", "_partial_")} | given
    if "_target_" not in node:
        return options
    target = get_object(node["_target_"])
    if node.get("_partial_"):
        return partial(target, **options)
    try:
        return target(**options)
    except Exception as error:
        raise InstantiationException(f"Error in call to target '{node['_target_']}': {error!r}") from error
