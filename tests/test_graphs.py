"""Gradients as one vector, without a GPU; what is recorded and replayed: test_gpu.py."""

import pytest
import torch

from unlearn_runner.gradients import as_vector, in_parts
from unlearn_runner.graphs import GraphedPasses
from unlearn_runner.types import Passes


@pytest.fixture(params=[torch.contiguous_format, torch.channels_last], ids=["contiguous", "channels_last"])
def weights(request):
    layers = torch.nn.Sequential(torch.nn.Conv2d(3, 5, 3), torch.nn.Conv2d(5, 4, 1), torch.nn.Linear(4, 2))
    return list(layers.to(memory_format=request.param).parameters())


@pytest.mark.parametrize("alike", [True, False])
def test_gradients_in_a_vector_and_back(weights, alike):
    """Whether they lie in memory as the weights do or not."""
    gradients = [torch.randn_like(weight) if alike else torch.randn(weight.shape) for weight in weights]
    vector = as_vector(gradients, weights)
    parts = in_parts(vector, weights)
    for part, gradient, weight in zip(parts, gradients, weights, strict=True):
        assert torch.equal(part, gradient)
        assert part.stride() == weight.stride()
        assert part.data_ptr() >= vector.data_ptr()
    assert as_vector(parts, weights).data_ptr() == vector.data_ptr(), "nothing is copied"
    assert torch.equal(as_vector(parts, weights), vector)


def test_parts_of_other_order_or_size_are_no_vector(weights):
    vector = torch.arange(float(sum(weight.numel() for weight in weights)))
    parts = in_parts(vector, weights)
    for changed in ([parts[0].clone(), *parts[1:]], [*parts[:-1], parts[-1] + 1]):
        assert torch.equal(as_vector(changed, weights)[: parts[0].numel()], vector[: parts[0].numel()])
        assert as_vector(changed, weights).data_ptr() != vector.data_ptr()
    twice = [weights[0], weights[0]]
    assert torch.equal(as_vector([parts[0], parts[0]], twice), vector[: parts[0].numel()].repeat(2))


def test_without_a_gpu_nothing_is_recorded(tiny_network):
    network = tiny_network()
    network.passes = Passes(graphs=GraphedPasses())
    network.predict(torch.zeros(2, 1, 8, 8), *[torch.zeros(2, dtype=torch.int64)] * 2).sum().backward()
    assert network.passes.graphs.recordings == {}
