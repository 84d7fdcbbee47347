"""What is nothing real is an outlier, whatever a classifier says: on digits, on MNIST and on CIFAR-10."""

from pathlib import Path

import pytest
import torch
import torch.nn.functional as F

from unlearn_runner.assembly import make
from unlearn_runner.data.forget_retain import LabelledImages
from unlearn_runner.evaluation.novelty import NoveltyRecipe, Outliers, fitted_novelty

DATA = Path(__file__).parents[3] / "shared" / "data"


def recipe(max_images: int = 4000) -> NoveltyRecipe:
    return NoveltyRecipe(max_images, neighbours=10, abstain=0.05, seed=0)


def rubble(real: torch.Tensor) -> dict[str, torch.Tensor]:
    """Pictures in [-1, 1] that hold no content, by name, some made of real ones."""
    g = torch.Generator().manual_seed(0)
    n, channels, height, width = real.shape

    def uniform():
        return torch.rand(real.shape, generator=g)

    def blurred(sigma):
        reach = int(3 * sigma)
        weights = torch.exp(-(torch.arange(-reach, reach + 1) ** 2) / (2 * sigma**2))
        weights = (weights / weights.sum()).view(1, 1, 1, -1).repeat(channels, 1, 1, 1)
        padded = F.pad(real, (reach,) * 4, mode="replicate")
        return F.conv2d(F.conv2d(padded, weights, groups=channels), weights.transpose(2, 3), groups=channels)

    def shuffled(side):
        patches = F.unfold(real, side, stride=side)
        order = torch.stack([torch.randperm(patches.shape[2], generator=g) for _ in range(n)])
        moved = patches.gather(2, order[:, None].expand_as(patches))
        return F.fold(moved, (height, width), side, stride=side)

    def checkerboard(side):
        rows, columns = torch.meshgrid(torch.arange(height), torch.arange(width), indexing="ij")
        shift = torch.randint(2 * side, (n, 1, 1, 1), generator=g)
        strength = torch.rand(n, 1, 1, 1, generator=g) * 0.8 + 0.2
        board = ((rows + shift) // side + (columns + shift // 2) // side) % 2 * 2.0 - 1
        return (board * strength).expand(real.shape)

    return {
        "black": torch.full(real.shape, -1.0),
        "white": torch.ones(real.shape),
        "grey": torch.zeros(real.shape),
        "noise": uniform() * 2 - 1,
        "saturated noise": (uniform() > 0.5) * 2.0 - 1,
        "dark noise": (torch.randn(real.shape, generator=g) * 0.2 - 0.9).clamp(-1, 1),
        "grey noise": (torch.randn(real.shape, generator=g) * 0.2).clamp(-1, 1),
        "blurred": blurred(height / 6),
        "very blurred": blurred(height / 3),
        "patches of 2": shuffled(2),
        "patches of 4": shuffled(4),
        "checkerboard of 1": checkerboard(1),
        "checkerboard of 2": checkerboard(2),
        "checkerboard of 4": checkerboard(4),
    }


def shares_inside(data, recipe, tmp_path, count=150) -> tuple[float, dict[str, float]]:
    """Of held-out real images that set no threshold, and of rubble, the share that is no outlier."""
    chosen = torch.randperm(len(data.retain_test), generator=torch.Generator().manual_seed(1))
    half = len(chosen) // 2
    sets_it, unseen = data.retain_test.select(chosen[:half]), data.retain_test.select(chosen[half : half + 3 * count])
    detector = fitted_novelty(data.retain, sets_it, recipe, {"test": data.fingerprint}, tmp_path)
    junk = {
        name: ((part + 1) * 127.5).round().to(torch.uint8)
        for name, part in rubble(unseen.pixels[:count] / 127.5 - 1).items()
    }
    return float((detector(unseen.pixels) <= 1).float().mean()), {
        name: float((detector(part) <= 1).float().mean()) for name, part in junk.items()
    }


@pytest.mark.parametrize(
    ("dataset", "max_images", "count"),
    [
        ([], 4000, 150),
        (["dataset=mnist_trousers", "mnist", "fashion_mnist"], 4000, 150),
        pytest.param(["experiment=cifar10_class_small", "cifar10"], 2000, 80, marks=pytest.mark.slow),
    ],
    ids=["digits", "mnist", "cifar10"],
)
def test_rubble_is_an_outlier_and_real_images_are_not(composed, tmp_path, dataset, max_images, count):
    overrides = dataset[:1]
    for option, name in zip(("dataset.source", "dataset.garment_source"), dataset[1:], strict=False):
        if not (DATA / name).is_dir():
            pytest.skip(f"no {DATA / name}")
        overrides.append(f"{option}={DATA / name}")
    data = make(composed(*overrides, debug=False)["dataset"]).load()
    real, junk = shares_inside(data, recipe(max_images), tmp_path, count)
    assert real >= 0.90
    assert max(junk.values()) <= 0.05, junk


def test_what_is_repeated_and_what_is_not_held_out(tmp_path):
    """A picture counts once, however often it is there; without held-out images a fifth sets the threshold."""
    pixels = torch.randint(0, 255, (40, 1, 16, 16), generator=torch.Generator().manual_seed(0)).to(torch.uint8)
    repeated = torch.cat([pixels, pixels[:1].expand(500, -1, -1, -1)])
    labels = torch.zeros(len(repeated), dtype=torch.int64)
    images = LabelledImages(repeated, labels, labels)
    nothing = images.select(torch.arange(0))
    detector = fitted_novelty(images, nothing, recipe(), {"test": "repeated"}, tmp_path)
    assert detector.detector.n_samples_fit_ == 32
    assert (detector(pixels) < 2).all()
    assert torch.equal(
        detector(pixels), fitted_novelty(images, nothing, recipe(), {"test": "repeated"}, tmp_path)(pixels)
    )


def test_provenance_names_the_detector(tiny_network):
    assert Outliers(neighbours=5).provenance(tiny_network())["neighbours"] == 5
