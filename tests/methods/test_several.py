"""Whatever forgets one content forgets several: each method steps on a dataset with two classes to forget."""

import pytest
import torch
from conftest import COMPLETE
from test_validation import ON_SD_ALONE
from trainers import build_driven

from unlearn_runner.assembly import make

SHORT = {"rl_lambda": ("method.update_every=2", "method.agent.batch_size=2")}


@pytest.fixture(scope="module")
def loaded():
    return {}


@pytest.mark.parametrize("method", [method for method in COMPLETE if method not in ON_SD_ALONE])
def test_steps(composed, tmp_path, loaded, method):
    overrides = ("dataset=digits", "dataset.forget_class=[3,7]", "trainer.max_steps=2", *SHORT.get(method, ()))
    cfg = composed(f"method={method}", *overrides)
    data = loaded.setdefault("data", make(cfg["dataset"]).load())
    trainer, train = build_driven(cfg, data, tmp_path)
    before = [weight.detach().clone() for weight in trainer.method.model.parameters()]
    train()
    assert trainer.done
    after = list(trainer.method.model.parameters())
    assert all(torch.isfinite(weight).all() for weight in after)
    assert any(not torch.equal(old, new) for old, new in zip(before, after, strict=True))
