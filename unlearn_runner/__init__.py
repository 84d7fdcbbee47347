"""unlearn_runner: make a generative image model forget, and measure what it forgot, kept and cost.

`forget`, `measure`, `compare` and `report` do from Python what the commands do: unlearn_runner/api.py.
"""

from typing import Any

__version__ = "0.1.0"
__all__ = ["compare", "forget", "measure", "report"]


def __getattr__(name: str) -> Any:
    """The functions, when they are first asked for: a mistyped command imports nothing heavy."""
    if name in __all__:
        from unlearn_runner import api

        return getattr(api, name)
    raise AttributeError(f"module '{__name__}' has no attribute '{name}'")
