"""Retention by likeness to what was forgotten."""

import pytest
import torch

from unlearn_runner.data.digits import Digits
from unlearn_runner.errors import ConfigurationError
from unlearn_runner.evaluation.judge import Judged
from unlearn_runner.evaluation.neighbours import Neighbours
from unlearn_runner.evaluation.view import View, group_samples
from unlearn_runner.spec import DataSpec

SPEC = DataSpec("toy", (1, 2, 2), ("a", "b", "c", "d"), ("a", "b", "c", "d"), (3,), None, False)


def judged(contents, towards_d=()):
    """Pictures taken for these contents, with so much of a logit for "d"."""
    logits = torch.nn.functional.one_hot(torch.tensor(contents), 4).double() * 20
    logits[:, 3] += torch.tensor(towards_d or [0.0] * len(contents)).double()
    return Judged(
        torch.zeros(len(contents), 1, 2, 2, dtype=torch.uint8),
        torch.zeros(len(contents), 2),
        logits.float(),
        logits.float(),
    )


def samples(spec=SPEC):
    """Two samples of each label; "a" is always right, "b" once, "c" never. Real images of "c" look most like "d"."""
    conditions = {"forget": torch.tensor([3, 3]), "retain": torch.tensor([0, 0, 1, 1, 2, 2])}
    drawn = {"forget": judged([3, 0]), "retain": judged([0, 0, 1, 0, 0, 0])}
    references = {
        "/a": judged([0, 0], [1.0, 2.0]), "/b": judged([1], [4.0]), "/c": judged([2, 2], [9.0, 8.0]), "/d": judged([3]),
    }  # fmt: skip
    return group_samples(spec, conditions, drawn, references)


@pytest.mark.parametrize(
    ("metric", "near", "far"),
    [(Neighbours(1), 0.0, 0.75), (Neighbours(2), 0.25, 1.0), (Neighbours(near=["a"]), 1.0, 0.25)],
)
def test_by_hand(metric, near, far):
    found = metric.score(samples(), {})
    assert found == {"retain_accuracy_near": near, "retain_accuracy_far": far}


def test_all_near_leaves_none_far():
    assert Neighbours(9).score(samples(), {}).keys() == {"retain_accuracy_near"}


def test_a_name_that_is_no_condition(tiny_network):
    data = Digits(forget_class=7).load()
    with pytest.raises(ConfigurationError, match=r"neighbours\.near names 'ten', which is no label to keep"):
        Neighbours(near=["ten"]).measure(View(tiny_network(), data))


def test_without_conditions_there_is_nothing_to_say():
    spec = SPEC._replace(label_names=None)
    of_all = group_samples(spec, {"all": None}, {"all": judged([0, 1])}, {})
    assert Neighbours().score(of_all, {}) == {}
