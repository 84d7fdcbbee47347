"""What is nothing real is an outlier, whatever a classifier says: on digits, on MNIST and on CIFAR-10."""

from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F

from unlearn_runner.assembly import make
from unlearn_runner.data.digits_trousers import DigitsTrousers
from unlearn_runner.data.forget_retain import LabelledImages
from unlearn_runner.evaluation.classifier import ClassifierRecipe, trained_judge
from unlearn_runner.evaluation.evaluator import Evaluator, Sampling
from unlearn_runner.evaluation.judge import NOTHING, Judged
from unlearn_runner.evaluation.metrics import Rates, first_distinct, share
from unlearn_runner.evaluation.novelty import NoveltyRecipe, Outliers, RealImages, abstaining, appearance, novelty_of
from unlearn_runner.evaluation.view import View, group_samples

CPU = torch.device("cpu")
DATA = Path(__file__).parents[3] / "shared" / "data"


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


def means(images: LabelledImages, count: int, of: int) -> torch.Tensor:
    """Pictures that a network draws which has learnt a mean: each of so many images of one content."""
    g = torch.Generator().manual_seed(0)
    found = []
    for content in images.contents[torch.randperm(len(images), generator=g)[:count]]:
        rows = (images.contents == content).nonzero()[:, 0]
        found.append(images.pixels[rows[torch.randperm(len(rows), generator=g)[:of]]].float().mean(0))
    return torch.stack(found).round().to(torch.uint8)


def with_edges(points: torch.Tensor) -> torch.Tensor:
    """Looks whose edges are all alike."""
    return torch.cat([points, torch.ones(len(points), 1)], 1)


def novelty(data, tmp_path, max_images=4000):
    return novelty_of(data, NoveltyRecipe(max_images), tmp_path)


@pytest.mark.parametrize(
    ("dataset", "max_images", "count"),
    [
        ([], 4000, 150),
        (["dataset=digits"], 4000, 150),
        (["experiment=sd_trousers"], 4000, 150),
        pytest.param(["dataset=mnist_trousers", "mnist", "fashion_mnist"], 4000, 150, marks=pytest.mark.slow),
        (["experiment=mnist_trousers_small", "mnist", "fashion_mnist"], 4000, 150),  # mirrors them
        pytest.param(["dataset=mnist_tshirt", "mnist", "fashion_mnist"], 4000, 150, marks=pytest.mark.slow),
        pytest.param(["experiment=cifar10_class_small", "cifar10"], 2000, 80, marks=pytest.mark.slow),
    ],
    ids=[
        "digits_trousers",
        "digits",
        "stable_diffusion",
        "mnist_trousers",
        "mnist_mirrored",
        "mnist_tshirt",
        "cifar10",
    ],
)
def test_rubble_is_nothing_and_real_images_are_something(composed, tmp_path, dataset, max_images, count):
    """By the judge's detector and by precision (1904.06991), against held-out images that neither has seen."""
    overrides = dataset[:1]
    for option, name in zip(("dataset.source", "dataset.garment_source"), dataset[1:], strict=False):
        if not (DATA / name).is_dir():
            pytest.skip(f"no {DATA / name}")
        overrides.append(f"{option}={DATA / name}")
    data = make(composed(*overrides, debug=False)["dataset"]).load()
    found = novelty(data, tmp_path, max_images)
    unseen, forgotten = (first_distinct(part, 3 * count, seed=1) for part in (data.retain_test, data.forget_test))
    pictures = {
        name: ((part + 1) * 127.5).round().to(torch.uint8)
        for name, part in rubble(unseen.pixels[:count] / 127.5 - 1).items()
    }
    pictures["means of a content"] = means(data.retain, count, of=30)
    looks = {"unseen": data.as_trained(unseen.pixels), "forgotten": data.as_trained(forgotten.pixels)} | pictures
    looks = {name: appearance(part) for name, part in looks.items()}
    something = {name: share(found.contents.place(part).outlying <= 1) for name, part in looks.items()}
    precision = {name: share(found.retained.place(part).holding.any(1)) for name, part in looks.items()}
    assert something["unseen"] >= 0.93, something
    assert something["forgotten"] >= 0.85, something
    assert precision["unseen"] >= 0.90, precision
    assert max(something[name] for name in pictures) <= 0.05, something
    assert max(precision[name] for name in pictures) <= 0.05, precision


def test_one_forgotten_image_many_times_is_something(tmp_path, digits):
    """Its copies are no outliers, however far it lies from all that is kept, and nothing between counts as real."""
    odd = torch.zeros(1, 1, 16, 16, dtype=torch.uint8)
    odd[..., 3:13, 3:6] = odd[..., 3:6, 3:13] = 255
    many = odd.expand(100, -1, -1, -1)
    label = digits.forget.labels[:1].expand(100)
    found = novelty(replace(digits, forget=LabelledImages(many, label, label), forget_alike=None), tmp_path)
    noisy = (odd.float() + 20 * torch.rand(50, 1, 16, 16, generator=torch.Generator().manual_seed(0))).clamp(0, 255)
    assert (found.contents.place(appearance(noisy.to(torch.uint8))).outlying <= 1).all()
    assert (found.retained.place(appearance(odd)).outlying > 1).all()
    assert (found.contents.place(appearance(255 - odd)).outlying > 1).all()


def test_too_few_different_images_tell_no_outlier(tmp_path, digits):
    few = digits.retain.select(torch.arange(9).repeat(30))
    assert novelty(replace(digits, retain=few), tmp_path) is None


def test_precision_density_and_coverage_by_hand(digits):
    """Four points on a line, one nearest neighbour each: balls of radius 1, 1, 2 and 3."""
    real = RealImages.fitted(with_edges(torch.tensor([[0.0], [1.0], [3.0], [6.0]])), neighbours=1, abstain=0.05)
    assert real.radii.tolist() == [1, 1, 2, 3]
    drawn = {
        "all": Judged(
            torch.zeros(3, 1, 2, 2, dtype=torch.uint8),
            *torch.zeros(3, 3, 1),
            appearance=with_edges(torch.tensor([[0.5], [4], [9.5]])),
        )
    }
    view = View.__new__(View)
    view.judge, view.judged = SimpleNamespace(novelty=SimpleNamespace(retained=real)), drawn
    samples = group_samples(digits.spec, {"all": None}, drawn, {})
    scores = Outliers().score(samples, Outliers().measure(view))
    assert scores["precision_forget"] == pytest.approx(2 / 3)
    assert scores["density_forget"] == pytest.approx(4 / 3)  # 0.5 lies in two balls, 4 in two, 9.5 in none
    assert scores["coverage_forget"] == 1
    assert scores["outliers_forget"] == pytest.approx(share_beyond([0.5, 4, 9.5], real))


def test_the_ball_of_an_odd_image_holds_nothing():
    points = torch.arange(200.0)[:, None].repeat(1, 2)
    points[-1] = 1000  # its 5th nearest is farther than any
    real = RealImages.fitted(with_edges(points), neighbours=5, abstain=0.05)
    between = with_edges(torch.tensor([[600.0, 600.0], [100.5, 100.5]]))
    assert real.place(between).holding.any(1).tolist() == [False, True]
    assert real.place(with_edges(points)).holding.shape == (200, 199)


def test_a_picture_with_weaker_edges_than_its_nearest_ones_is_an_outlier():
    """Also where it lies in their midst; and a copy is compared with its original, whatever its neighbours' edges."""
    points = torch.arange(200.0)[:, None]
    edges = torch.where(points == 100, 0.2, 1.0)
    real = RealImages.fitted(torch.cat([points, edges], 1), neighbours=5, abstain=0.05)
    found = real.place(torch.tensor([[104.5, 1.0], [104.5, 0.7], [100.0, 0.2], [104.0, 0.2]]))
    assert (found.outlying > 1).tolist() == [False, True, False, True]
    assert found.holding.any(1).tolist() == [True, False, True, False]


def share_beyond(points, real):
    """The share of points that lie in no ball of at most the median radius (1), scaled."""
    reach = [min(radius, 1.0) * real.threshold for radius in real.radii.tolist()]
    balls = list(zip(real.looks[:, 0].tolist(), reach, strict=True))
    return sum(all(abs(point - centre) > far for centre, far in balls) for point in points) / len(points)


def test_pictures_that_hardly_differ_have_balls_all_the_same():
    """As a video's frames: their features may be the same, and everything else is an outlier."""
    points = F.normalize(torch.randn(20, 8, generator=torch.Generator().manual_seed(0))).repeat(10, 1)
    real = RealImages.fitted(with_edges(points), neighbours=5, abstain=0.05)
    same, others = real.place(with_edges(points)), real.place(with_edges(points + 0.5))
    assert (same.outlying <= 1).all()
    assert (others.outlying > 1).all()
    assert same.holding.any(1).all()


def test_rates_make_up_one_and_rubble_counts_as_nothing(tmp_path, shared_cache, digits):
    named = trained_judge(digits, ClassifierRecipe(max_steps=60), shared_cache, CPU)
    judge = abstaining(named, digits, NoveltyRecipe(), tmp_path)
    versions = [each.provenance()["abstains"]["version"] for each in (named, judge)]
    assert versions[0] != versions[1], "so that what the two judged stands in no table together"
    black = torch.zeros(20, 1, 16, 16, dtype=torch.uint8)
    drawn = {"forget": judge(torch.cat([digits.forget_test.pixels[:20], black])), "retain": judge(black)}
    assert (drawn["retain"].contents == NOTHING).all()
    labels = {"forget": torch.full((40,), digits.spec.restored_content), "retain": torch.zeros(20, dtype=torch.int64)}
    scores = Rates().score(group_samples(digits.spec, labels, drawn, {}), {})
    assert scores["nothing_rate"] >= 0.5
    assert scores["forget_rate"] + scores["nothing_rate"] + scores["other_rate"] == pytest.approx(1)
    assert scores["retain_accuracy"] == 0
    assert "abstains" in judge.provenance()


def test_what_real_images_score_is_what_held_out_ones_do(tmp_path, shared_cache, digits, tiny_network):
    """The ceiling of precision and the floor of nothing_rate: of images that no ball was made for."""
    named = trained_judge(digits, ClassifierRecipe(max_steps=60), shared_cache, CPU)
    judge = abstaining(named, digits, NoveltyRecipe(), tmp_path)
    held_out = judge(digits.retain_test.pixels)
    model = tiny_network(image_shape=(1, 16, 16))

    def floor(num_samples):
        evaluator = Evaluator(digits, judge, {"outliers": Outliers()}, Sampling(num_samples=num_samples), tmp_path)
        return evaluator.floor(model)

    enough, too_many = floor(len(held_out)), floor(len(held_out) + 1)
    assert enough["nothing_rate"] == pytest.approx((held_out.contents == NOTHING).double().mean().item())
    assert 0 < enough["nothing_rate"] <= 0.07
    assert enough["precision_forget"] >= 0.9
    assert enough["outliers_forget"] == enough["outliers_retain"]
    assert "coverage_forget" in enough
    assert too_many == {key: value for key, value in enough.items() if key != "coverage_forget"}


def test_without_held_out_images_real_ones_have_no_score(tmp_path, shared_cache, digits, tiny_network):
    named = trained_judge(digits, ClassifierRecipe(max_steps=60), shared_cache, CPU)
    everything = DigitsTrousers(test_fraction=0.0).load()
    judge = abstaining(named, everything, NoveltyRecipe(), tmp_path)
    evaluator = Evaluator(everything, judge, {"outliers": Outliers()}, Sampling(num_samples=20), tmp_path)
    assert evaluator.floor(tiny_network(image_shape=(1, 16, 16))) == {}
