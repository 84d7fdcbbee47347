"""Copies of the images to forget, and how near samples come to them."""

from dataclasses import replace

import pytest
import torch
from no_samples import NO_SAMPLES

from unlearn_runner.data.forget_retain import ForgetRetain, alike
from unlearn_runner.evaluation.copies import Copies
from unlearn_runner.evaluation.judge import Judged
from unlearn_runner.evaluation.view import View
from unlearn_runner.spec import DataSpec

SPEC = DataSpec("toy", (1, 4, 4), None, ("retain", "forget"), (1,), None, False)


def pictures(count, seed):
    return torch.randint(256, (count, 1, 4, 4), generator=torch.Generator().manual_seed(seed)).to(torch.uint8)


@pytest.fixture
def data():
    """Three images to forget, the second of them twice, with names; thirty that nobody has seen."""
    forget = pictures(3, 0)[[0, 1, 1, 2]]
    names = ("a.png", "b.png", "again/b.png", "c.png")
    inventory = tuple({"file": name, "fate": "forget"} for name in names)
    keep = alike(pictures(20, 1), 0, 0)
    return ForgetRetain(SPEC, alike(forget, 0, 1), keep, alike(pictures(30, 2), 0, 1), keep, inventory=inventory)


class Drawn(View):
    """Of a model that has drawn these pictures."""

    def __init__(self, data, images):
        super().__init__(None, data)
        self.images = images

    @property
    def judged(self):
        nothing = torch.zeros(len(self.images), 2)
        return {"all": Judged(self.images, nothing, nothing, nothing)}


def scores(data, images, **options):
    metric = Copies(**options)
    view = Drawn.__new__(Drawn)
    view.data, view.images = data, images
    return metric.score(NO_SAMPLES, metric.measure(view))


def test_copies_and_what_is_none(data):
    noise = torch.randint(-3, 4, (4, 1, 4, 4), generator=torch.Generator().manual_seed(3))
    almost = (data.forget.pixels[[0, 1, 3, 3]].int() + noise).clamp(0, 255).to(torch.uint8)
    found = scores(data, torch.cat([almost, pictures(4, 9)]))
    assert found["copy_rate"] == 0.5
    assert found["per_image/copy_rate/a.png"] == 0.125
    assert found["per_image/copy_rate/c.png"] == 0.25
    assert {key for key in found if "per_image" in key and key.endswith("b.png")} == {"per_image/copy_rate/again/b.png"}


def test_one_that_knows_neither_is_as_near_to_both(data):
    found = scores(data, pictures(2000, 11))
    assert found["closer_to_forget"] == pytest.approx(0.5, abs=0.12)
    assert found["copy_rate"] <= 0.1


def test_without_unseen_images_it_says_nothing(data):
    nothing = data.forget_test.select(torch.arange(0))
    assert scores(replace(data, forget_test=nothing), pictures(5, 1)) == {}
    assert Copies.held_out == {"copy_rate": "forget_test"}


def test_without_an_inventory_there_are_no_names(data):
    assert scores(replace(data, inventory=()), pictures(5, 1)).keys() == {"copy_rate", "closer_to_forget"}
