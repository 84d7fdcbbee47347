"""Whether what lies near to the forgotten content suffers with it."""

from collections.abc import Sequence
from typing import Any, final

import torch

from unlearn_runner.data.forget_retain import contents_of_labels
from unlearn_runner.errors import ConfigurationError
from unlearn_runner.evaluation.metrics import Metric, Rows, share
from unlearn_runner.evaluation.view import Samples, View
from unlearn_runner.models.model import GenerativeModel
from unlearn_runner.options import PositiveInt
from unlearn_runner.rules import evaluation_options


@final
class Neighbours(Metric):
    """retain_accuracy_near, retain_accuracy_far: `retain_accuracy` of the samples under the conditions whose content is
    most like what is to be forgotten, and under all others; in [0, 1].

    A content is the more alike, the larger the log-probability, a mean over its real images, that the judge gives to
    what is to be forgotten. The `count` most alike are near; or the conditions whose names are in `near`.
    """

    version = 1
    needs = ("references",)

    def __init__(self, count: PositiveInt = 2, near: Sequence[str] | None = None):
        self.count, self.near = count, None if near is None else tuple(map(str, near))
        if self.near == ():
            raise ConfigurationError(
                "evaluation.metrics.neighbours.near must name one or more labels to keep, got an empty list."
            )

    def measure(self, view: View) -> Rows:
        evaluation_options.near_conditions(self.near, view.data.spec)
        return {}

    def score(self, samples: Samples, rows: Rows) -> dict[str, float]:
        if samples.retain_labels is None:
            return {}
        alike = self.likeness(samples)
        nearest = sorted(alike, key=alike.get, reverse=True)[: self.count] if self.near is None else self.near
        spec, labels = samples.spec, samples.retain_labels
        right = samples.retain.samples.contents == contents_of_labels(spec, labels)
        is_near = torch.isin(labels, torch.tensor([samples.label_of[name] for name in nearest if name in alike]))
        parts = {"near": right[is_near], "far": right[~is_near]}
        return {f"retain_accuracy_{name}": share(part) for name, part in parts.items() if len(part)}

    def likeness(self, samples: Samples) -> dict[str, float]:
        """Of each retained condition to what is to be forgotten: a mean log-probability."""
        spec, found = samples.spec, {}
        forget = torch.tensor(spec.forget_contents)
        for name, group in samples.per_class.items():
            if samples.label_of[name] in samples.retain_labels and group.reference is not None and len(group.reference):
                log_probs = group.reference.logits.double().log_softmax(1)[:, forget]
                found[name] = float(log_probs.logsumexp(1).mean())
        return found

    def provenance(self, model: GenerativeModel) -> dict[str, Any]:
        return {"count": self.count, "near": self.near}
