"""For the scores that are made of rows alone: an evaluation that drew nothing."""

import torch

from unlearn_runner.evaluation.judge import Judged
from unlearn_runner.evaluation.view import Group, Samples
from unlearn_runner.spec import DataSpec

_SPEC = DataSpec("none", (1, 16, 16), None, ("a", "b"), (1,), None, False)
_NOTHING = Judged(torch.zeros(0, 1, 16, 16, dtype=torch.uint8), *(torch.zeros(0, k) for k in (3, 2, 2)))
NO_SAMPLES = Samples(_SPEC, Group(_NOTHING, None), Group(_NOTHING, None), {}, None, {}, {})
