"""On a GPU: same bits twice, replayed or not, and after a resume; no wait for the device; every method runs."""

import copy
from contextlib import contextmanager
from functools import partial

import pytest
import torch
from conftest import COMPLETE, assert_same_bits
from test_configs import overrides
from test_distributed import PPO
from test_train_prompts import SMALL, summary

from unlearn_runner.graphs import MOST_RECORDINGS, GraphedPasses
from unlearn_runner.methods.method import Setting, Update
from unlearn_runner.methods.siss.siss import SISS
from unlearn_runner.methods.siss.without_importance_sampling import SISSNoIS
from unlearn_runner.types import Batch, GeneratorState, Passes

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU"),
]


@pytest.fixture(autouse=True)
def deterministic(monkeypatch):
    monkeypatch.setenv("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    torch.use_deterministic_algorithms(True, warn_only=True)
    torch.utils.deterministic.fill_uninitialized_memory = False
    yield
    torch.use_deterministic_algorithms(False)


@contextmanager
def no_waiting():
    """Within, an error if the host waits for the device."""
    torch.cuda.set_sync_debug_mode("error")
    try:
        yield
    finally:
        torch.cuda.set_sync_debug_mode("default")


def batch_of(b: int = 6, seed: int = 0, size: int = 8) -> Batch:
    generator = torch.Generator("cuda").manual_seed(seed)
    x, a = (torch.rand((b, 1, size, size), generator=generator, device="cuda") * 2 - 1 for _ in range(2))
    return Batch(x, a, torch.arange(b, device="cuda") % 10, torch.ones(b, dtype=torch.int64, device="cuda"), 0.1)


def method_of(network, kind=SISS, **more):
    update = partial(Update, optimizer=partial(torch.optim.AdamW, lr=1e-3), ema_decay=0.9)
    return kind(Setting(network, torch.Generator("cuda").manual_seed(0)), update, **more)


def weights_after(network, steps: int, kind=SISS, size: int = 8, **more) -> dict[str, torch.Tensor]:
    method = method_of(network, kind, **more)
    for step in range(steps):
        method.step(batch_of(seed=step, size=size))
    return copy.deepcopy(method.model.state_dict())


@pytest.mark.parametrize("precision", [None, torch.bfloat16], ids=["float32", "bf16"])
@pytest.mark.parametrize(
    "kind, more",
    [(SISS, {"rho": 0.1}), (SISS, {"rho": 0.1, "norm_every": 3}), (SISSNoIS, {"rho": 0.1})],
    ids=["siss", "stale", "no_is"],
)
def test_replayed_passes_have_the_bits_of_those_that_are_not(tiny_network, kind, more, precision):
    found = []
    for graphs in (None, GraphedPasses()):
        network = tiny_network().cuda()
        network.passes = Passes(precision, 1, graphs)
        found.append(weights_after(network, 6, kind, **more))
    assert len(graphs.recordings) == 1
    assert_same_bits(*found)


@pytest.mark.parametrize("precision", [None, torch.bfloat16], ids=["float32", "bf16"])
def test_attention_has_the_same_bits_twice(tiny_network, precision):
    found = []
    for _ in range(3):
        network = tiny_network(image_shape=(1, 32, 32), attention=[True, True]).cuda()
        network.passes = Passes(precision, 1, GraphedPasses())
        found.append(weights_after(network, 3, rho=0.1, size=32))
    assert_same_bits(found[0], found[1])
    assert_same_bits(found[0], found[2])


def test_dropout_goes_on_drawing(tiny_network):
    """The same numbers replayed as passed, and others at each replay."""
    found = []
    for graphs in (None, GraphedPasses()):
        network = tiny_network(dropout=0.5).cuda().train()
        network.passes = Passes(graphs=graphs)
        torch.manual_seed(0)
        x, t = torch.zeros((4, 1, 8, 8), device="cuda"), torch.zeros(4, dtype=torch.int64, device="cuda")
        found.append([network.predict(x, t, t).detach() for _ in range(3)])
    plain, replayed = found
    assert not torch.equal(replayed[0], replayed[1])
    for one, other in zip(plain, replayed, strict=True):
        assert torch.equal(one, other)


def test_a_way_back_is_that_of_its_own_way_forward(tiny_network):
    """Also if other batches went forward meanwhile, one of them of another shape, and over what was passed."""
    batches = [batch_of(6, 1), batch_of(6, 2), batch_of(4, 3)]
    found = []
    for graphs in (None, GraphedPasses()):
        network = tiny_network().cuda()
        network.passes = Passes(graphs=graphs)
        weights = list(network.parameters())
        rows = [batch.x0_retain.clone().requires_grad_() for batch in batches]
        predictions = [
            network.predict(row, torch.arange(len(row), device="cuda"), batch.cond_retain)
            for row, batch in zip(rows, batches, strict=True)
        ]
        loss = sum((index + 1) * prediction.square().sum() for index, prediction in enumerate(predictions))
        found.append(torch.autograd.grad(loss, [*rows, *weights]))
    assert len(graphs.recordings) == 2
    for one, other in zip(*found, strict=True):
        assert torch.allclose(one, other, rtol=1e-4, atol=1e-4)


def test_weights_that_moved_are_refused_on_the_way_back(tiny_network):
    network = tiny_network().cuda()
    network.passes = Passes(graphs=GraphedPasses())
    batch = batch_of()
    prediction = network.predict(batch.x0_retain, batch.cond_forget, batch.cond_retain)
    with torch.no_grad():
        next(network.parameters()).add_(1)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        prediction.sum().backward()


def test_only_so_many_shapes_are_kept_and_none_copied(tiny_network):
    network = tiny_network().cuda()
    graphs = GraphedPasses()
    network.passes = Passes(graphs=graphs)
    for b in range(1, MOST_RECORDINGS + 3):
        network.predict(torch.zeros((b, 1, 8, 8), device="cuda"), torch.zeros(b, dtype=torch.int64, device="cuda"),
                        torch.zeros(b, dtype=torch.int64, device="cuda")).sum().backward()  # fmt: skip
    assert len(graphs.recordings) == MOST_RECORDINGS
    assert copy.deepcopy(network).passes.graphs.recordings == {}


@pytest.mark.parametrize("kind", [SISS, SISSNoIS])
def test_a_step_waits_for_nothing(tiny_network, kind):
    network = tiny_network().cuda()
    network.passes = Passes(torch.bfloat16, 1, GraphedPasses())
    method = method_of(network, kind, rho=0.1)
    batches = [batch_of(seed=seed) for seed in range(6)]
    for batch in batches[:3]:
        method.step(batch)
    with no_waiting():
        for batch in batches[3:]:
            method.step(batch)


def test_a_batch_is_drawn_without_waiting(digits):
    from unlearn_runner.data.streams import BatchStream
    from unlearn_runner.types import Streams

    stream = BatchStream(digits, Streams("retain", True), 8, 0, torch.device("cuda"))
    stream.next()
    with no_waiting():
        stream.next()


def test_a_method_goes_on_to_the_bit(tiny_network):
    def fresh():
        network = tiny_network().cuda()
        network.passes = Passes(graphs=GraphedPasses())
        return method_of(network, rho=0.1)

    def advanced(method, steps):
        for step in steps:
            method.step(batch_of(seed=step))
        return method

    def state(method):
        return {name: part.state_dict() for name, part in method.stateful().items()}

    whole = advanced(fresh(), range(6))
    kept = copy.deepcopy(state(advanced(fresh(), range(3))))
    again = fresh()
    for name, part in again.stateful().items():
        part.load_state_dict(kept[name])
    advanced(again, range(3, 6))
    assert_same_bits(dict(whole.trained.state_dict()), dict(again.trained.state_dict()))
    assert torch.equal(GeneratorState(whole.generator).state_dict()["state"], again.generator.get_state())


@pytest.mark.parametrize("method", COMPLETE)
def test_every_method_runs(run, method):
    """The whole run: base, training with a checkpoint, scores, in bf16 with replayed passes as hardware=auto has it."""
    more = {
        "esd": SMALL,
        "concept_ablation": SMALL,
        "erase_flow": SMALL,
        "uce": SMALL,
        "rece": SMALL,
        "rl_lambda": PPO[1:],
    }.get(method, ())
    folder = run(*overrides((method,), "0.9"), "hardware=single_gpu", *more)
    assert summary(folder)["status"] == "finished"
    assert 0 <= summary(folder)["metrics"]["eval/forget_rate"] <= 1
