"""Types of options, with their ranges: what a constructor's annotations say about a value of the configuration.

`unlearn_runner.validation` checks a whole configuration against the annotations of all constructors it names, before any
of them is imported. Imports nothing heavy. For an option of one constructor alone write `Literal[...]` or `Annotated`
there.
"""

from typing import Annotated, TypeAlias

from annotated_types import Ge, Gt, Le, Lt

LARGEST = 2**31 - 1

PositiveInt: TypeAlias = Annotated[int, Gt(0), Le(LARGEST)]
NonNegativeInt: TypeAlias = Annotated[int, Ge(0), Le(LARGEST)]
PositiveFloat: TypeAlias = Annotated[float, Gt(0)]  # finite, as every float of the configuration
NonNegativeFloat: TypeAlias = Annotated[float, Ge(0)]
UnitInterval: TypeAlias = Annotated[float, Ge(0), Le(1)]  # [0, 1]
OpenUnitInterval: TypeAlias = Annotated[float, Gt(0), Lt(1)]  # (0, 1)
Decay: TypeAlias = Annotated[float, Ge(0), Lt(1)]  # of a moving average: [0, 1)
Seed: TypeAlias = Annotated[int, Ge(0), Lt(2**32)]  # what numpy and Stable-Baselines3 take
BatchSize: TypeAlias = Annotated[int, Gt(0), Le(2**20)]
NumSamples: TypeAlias = Annotated[int, Gt(0), Le(10_000_000)]
NumInferenceSteps: TypeAlias = Annotated[int, Gt(0), Le(100_000)]
ImageSize: TypeAlias = Annotated[int, Ge(8), Le(4096)]  # pixels a side
Width: TypeAlias = Annotated[int, Gt(0), Le(2**14)]  # channels or features of a layer
Depth: TypeAlias = Annotated[int, Gt(0), Le(256)]  # layers or heads
