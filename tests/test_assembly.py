"""What design.md promises of a new method: its module and its YAML file, and nothing else in the house."""

from textwrap import dedent

import pytest
import torch
import yaml
from conftest import assert_same_bits, weights_of

from unlearn_runner.assembly import build_method, build_network, build_parts
from unlearn_runner.errors import ConfigurationError
from unlearn_runner.methods.method import Mask, Setting, Update
from unlearn_runner.methods.siss.siss import SISS
from unlearn_runner.rules.method_options import REQUIREMENTS, facts, require
from unlearn_runner.spec import digits_trousers
from unlearn_runner.types import make_generator

CLOSED_FORM = """
    from typing import final

    import torch

    from unlearn_runner.methods.method import Method, Setting
    from unlearn_runner.options import UnitInterval
    from unlearn_runner.types import Streams


    @final
    class ZeroRow(Method):
        '''Takes the forget label's embedding to a mix of the others', by a formula: one step, no gradient, no image.'''

        requires = ("noise", "labels", "images")
        steps = 1
        reads = Streams(retain=None, forget=False)

        def __init__(self, setting: Setting, strength: UnitInterval):
            self.trained, self.labels, self.strength = setting.model, setting.labels, strength
            self.networks = (setting.model,)

        @property
        def model(self):
            return self.trained

        def begin(self, images):
            self.sizes = len(images.retain), len(images.forget)
            x0, labels = images.forget.take(torch.arange(2))
            assert x0.shape[0] == 2 and set(labels.tolist()) <= set(self.labels.forget)

        def step(self, batch):
            assert batch.x0_retain is None and batch.x0_forget is None
            rows = self.trained.backbone.unet.class_embedding.weight.data
            mean = rows[list(self.labels.retain)].mean(0)
            for label in self.labels.forget:
                rows[label] += self.strength * (mean - rows[label])
            return {}

        def stateful(self):
            return {"weights": self.trained}
"""

MASKED = """
    from collections.abc import Callable
    from functools import partial
    from typing import final

    import torch

    from unlearn_runner.methods.denoising import drawn_loss
    from unlearn_runner.methods.method import Mask, Method, Setting
    from unlearn_runner.options import OpenUnitInterval


    @final
    class Masked(Method):
        '''Another method, on the weights alone whose forget gradient is large (as SalUn has it, 2310.12508).'''

        requires = ("images",)

        def __init__(self, setting: Setting, method: Callable[..., Method], share: OpenUnitInterval = 0.5):
            self.mask, self.share, self.generator = Mask(), share, setting.generator
            update = partial(method.keywords["update"], transforms=[self.mask])
            self.inner = method(setting, update=update)
            self.reads, self.networks = self.inner.reads, self.inner.networks

        @property
        def model(self):
            return self.inner.model

        def begin(self, images):
            self.inner.begin(images)
            x0, cond = images.forget.take(torch.arange(min(64, len(images.forget))))
            loss = drawn_loss(self.inner.trained, x0, cond, self.generator).mean()
            size = self.inner.update.gradient(loss).abs()
            self.mask.keep = size > size.quantile(1 - self.share) if size.numel() < 2**24 else size > size.median()

        def step(self, batch):
            return self.inner.step(batch)

        def stateful(self):
            return self.inner.stateful()
"""


@pytest.fixture
def with_module(tmp_path, monkeypatch):
    """`with_module("name", source)`: a module where Python finds it."""

    def write(name: str, source: str) -> None:
        (tmp_path / f"{name}.py").write_text(dedent(source))
        monkeypatch.syspath_prepend(str(tmp_path))

    return write


@pytest.fixture
def with_yaml(tmp_path, composed):
    """`with_yaml("zero_row", {...})(overrides)`: a configuration with a method's file in a folder of one's own."""

    def write(name: str, node: dict | str):
        folder = tmp_path / "conf" / "method"
        folder.mkdir(parents=True, exist_ok=True)
        (folder / f"{name}.yaml").write_text(node if isinstance(node, str) else yaml.safe_dump(node))

        def compose(*overrides: str) -> dict:
            trusted = f"security.allow=[{name}.]"
            return composed(f"hydra.searchpath=[file://{folder.parent}]", f"method={name}", trusted, *overrides)

        return compose

    return write


def test_a_closed_form_method_takes_its_one_step(with_module, with_yaml, tmp_path):
    from unlearn_runner.assembly import unlearn

    with_module("zero_row", CLOSED_FORM)
    compose = with_yaml("zero_row", {"_target_": "zero_row.ZeroRow", "_partial_": True, "strength": 1.0})
    folder = tmp_path / "outputs" / "run"
    folder.mkdir(parents=True)
    unlearn(compose("model.network.prediction_type=v_prediction", "evaluation.every=null"), folder)
    rows = weights_of(folder)["class_embedding.weight"]
    torch.testing.assert_close(rows[1], torch.cat([rows[:1], rows[2:]]).mean(0))
    (line,) = [line for line in (folder / "metrics.jsonl").read_text().splitlines() if '"images"' in line]
    assert '"step": 1' in line and '"images": 0' in line
    with pytest.raises(ConfigurationError, match=r"method=zero_row needs a dataset with labels or prompts"):
        compose("dataset.conditional=false")
    with pytest.raises(ConfigurationError, match=r"method.strength must be a number in \[0, 1\], got 2"):
        compose("method.strength=2")


def test_a_method_inside_a_method_moves_the_masked_weights_alone(with_module, with_yaml, digits, tmp_path):
    from trainers import build_trainer

    with_module("masked", MASKED)
    node = "defaults:\n  - siss@method\n  - _self_\n_target_: masked.Masked\n_partial_: true\nshare: 0.25\n"
    plain = ("method.method.update.optimizer.weight_decay=0", "method.method.gradient_variance=false")
    cfg = with_yaml("masked", node)(*plain)
    trainer = build_trainer(cfg, digits, tmp_path)
    method = trainer.method
    keep, before = method.mask.keep, torch.cat([w.detach().flatten() for w in method.inner.update.weights])
    assert 0.2 < keep.float().mean() < 0.3
    while not trainer.done:
        trainer.step()
    after = torch.cat([w.detach().flatten() for w in method.inner.update.weights])
    assert torch.equal(before[~keep], after[~keep])
    assert (before[keep] != after[keep]).float().mean() > 0.9
    again = build_trainer(cfg, digits, tmp_path)
    again.method.mask.keep = None
    again.load_state_dict(trainer.state_dict())
    assert torch.equal(again.method.mask.keep, keep), "a mask is part of the checkpoint"
    with pytest.raises(ConfigurationError, match=r"method.method.lambd must be a number in \[0, 1\]"):
        with_yaml("masked", node)("method.method.lambd=2")


def test_a_method_inside_a_method_says_what_it_needs(with_module, with_yaml):
    with_module("masked", MASKED)
    node = "defaults:\n  - erase_diff@method\n  - _self_\n_target_: masked.Masked\n_partial_: true\n"
    with pytest.raises(ConfigurationError, match="method=masked needs a diffusion model"):
        with_yaml("masked", node)("model=vae")


def test_what_a_method_requires_is_asked_of_the_parts(composed, tiny_network, tiny_vae):
    spec, generator = digits_trousers(8, True, False), make_generator(0, "m")
    cfg = composed("method=sfd")
    build_method(cfg, tiny_network(), spec, generator)
    with pytest.raises(ConfigurationError, match="method=sfd needs a diffusion model"):
        build_method(cfg, tiny_vae(), spec, generator)
    with pytest.raises(ConfigurationError, match="method=sfd needs a dataset with labels"):
        build_method(cfg, tiny_network(num_labels=None), digits_trousers(8, False, False), generator)
    with pytest.raises(ConfigurationError, match="method=hybrid needs a diffusion model"):
        build_method(composed("method=hybrid"), tiny_vae(), spec, generator)


def test_every_requirement_has_its_sentence():
    whole = facts(diffusion=True, labels=True, prompts=True, clip=True, init="base")
    assert whole == set(REQUIREMENTS)
    require(tuple(REQUIREMENTS), whole, "mine")
    for need in sorted(whole - {"images"}):
        with pytest.raises(ConfigurationError, match=r"^mine .*; "):
            require((need,), whole - {need}, "mine")
    with pytest.raises(ConfigurationError, match="mine requires 'lables'; a method may require noise, labels"):
        require(("lables",), whole, "mine")


def test_transforms_come_before_the_cut(tiny_network):
    """A mask, and then the norm: what is left has the full norm."""
    network = tiny_network()
    mask = Mask()
    update = Update(network, lambda weights: torch.optim.SGD(weights, lr=1.0), max_grad_norm=1.0, transforms=[mask])
    size = sum(weight.numel() for weight in update.weights)
    mask.keep = torch.arange(size) < 4
    before = torch.cat([weight.detach().flatten().clone() for weight in update.weights])
    update.apply(torch.full((size,), 3.0))
    moved = before - torch.cat([weight.detach().flatten() for weight in update.weights])
    torch.testing.assert_close(moved[:4], torch.full((4,), 0.5))
    assert not moved[4:].any()


def test_the_same_method_is_built_by_hand(composed, digits):
    """A setting and the options: no configuration is needed."""
    cfg = composed("method=siss")
    network = build_network(cfg, digits.spec, 0)
    by_hand = SISS(Setting(network, make_generator(0, "m")), lambda model: Update(model, torch.optim.AdamW), lambd=0.3)
    assert by_hand.networks == (network,)
    assert_same_bits(dict(by_hand.model.state_dict()), dict(network.state_dict()))


def test_no_more_steps_of_sampling_than_the_weights_schedule_has(composed, tiny_network, tmp_path):
    """How many there are is known when the folder's scheduler is read, before any weight is."""
    tiny_network(image_shape=(1, 16, 16), num_train_timesteps=50, prediction_type="flow").save(tmp_path / "base")
    cfg = composed(f"model.weights={tmp_path / 'base'}", "evaluation.num_inference_steps=51")
    with pytest.raises(
        ConfigurationError, match=r"num_inference_steps must be at most 50, the timesteps of the model's"
    ):
        build_parts(cfg)
    cfg = composed(f"model.weights={tmp_path / 'base'}", "evaluation.num_inference_steps=50")
    assert build_parts(cfg).network.num_train_timesteps == 50


def test_looks_on_the_way_need_enough_samples_too(composed, clip_weights):
    """Of a judge whose features are only known when it is built."""
    fid = "{_target_: unlearn_runner.evaluation.metrics.FID, min_samples: 2}"
    judge = ("judge=clip", "judge.recognizer.model=tiny-for-tests", f"judge.recognizer.pretrained={clip_weights}")
    said = r"evaluation\.probe\.metrics\.fid needs at least 13 .*evaluation\.probe\.sampling\.num_samples=10 gives 10"
    with pytest.raises(ConfigurationError, match=said):
        build_parts(composed(*judge, f"+evaluation.probe.metrics.fid={fid}"))
