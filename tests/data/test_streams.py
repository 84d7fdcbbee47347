"""Batches: every image once per epoch, the right stream, the same bits after a resume."""

import pytest
import torch

from unlearn_runner.data.digits_trousers import DigitsTrousers
from unlearn_runner.data.streams import BatchStream, Pool, Shuffled, to_uint8, to_unit_range
from unlearn_runner.errors import NonFiniteError
from unlearn_runner.types import Streams

CPU = torch.device("cpu")


def test_shuffled_gives_each_index_once_per_epoch():
    order = Shuffled(10, torch.Generator().manual_seed(0))
    drawn = torch.cat([order.draw(k) for k in (3, 4, 8, 5)]).tolist()
    assert sorted(drawn[:10]) == sorted(drawn[10:]) == list(range(10))
    assert drawn[:10] != drawn[10:]


def test_reads_only_what_is_asked_for(digits):
    both = BatchStream(digits, Streams("retain", True), 8, 0, CPU).next()
    assert both.x0_retain.shape == both.x0_forget.shape == (8, 1, 16, 16)
    assert (both.cond_forget == 1).all()
    assert both.forget_share == pytest.approx(146 / (146 + 1442))
    alone = BatchStream(digits, Streams(None, True), 8, 0, CPU).next()
    assert alone.x0_retain is None
    assert alone.cond_retain is None


def test_all_of_x_holds_the_forget_images(digits):
    stream = BatchStream(digits, Streams("all", False), 1588, 0, CPU)
    images = {row.numpy().tobytes() for row in to_uint8(stream.next().x0_retain)}
    assert {row.numpy().tobytes() for row in digits.forget.pixels} <= images
    retain = BatchStream(digits, Streams("retain", False), 1442, 0, CPU)
    images = {row.numpy().tobytes() for row in to_uint8(retain.next().x0_retain)}
    assert not {row.numpy().tobytes() for row in digits.forget.pixels} & images


def test_resumed_stream_goes_on_to_the_bit(digits):
    def stream(seed):
        return BatchStream(digits, Streams("retain", True), 100, seed, CPU)

    first, second = stream(0), stream(99)
    for _ in range(5):
        first.next()
    second.load_state_dict(first.state_dict())
    for _ in range(20):
        assert all(torch.equal(a, b) for a, b in zip(first.next()[:4], second.next()[:4], strict=True))


def test_flip_mirrors_about_half():
    data = DigitsTrousers(horizontal_flip=True).load()
    drawn = BatchStream(data, Streams("retain", False), 1442, 0, CPU).next().x0_retain
    straight = {row.numpy().tobytes() for row in data.retain.pixels}
    share = sum(row.numpy().tobytes() in straight for row in to_uint8(drawn)) / 1442
    assert 0.4 < share < 0.65


def test_unconditional_batches_have_no_condition():
    data = DigitsTrousers(conditional=False).load()
    assert BatchStream(data, Streams("retain", True), 4, 0, CPU).next().cond_retain is None


def test_pool_of_two_is_their_concatenation(digits):
    pool = Pool([digits.retain, digits.forget], CPU)
    rows = torch.tensor([0, 1441, 1442, 1587])
    taken = pool.take(rows)
    assert torch.equal(taken.pixels, torch.cat([digits.retain.pixels, digits.forget.pixels])[rows])
    assert taken.contents[2:].tolist() == [10, 10]


def test_uint8_survives_the_way_to_the_model_and_back():
    every = torch.arange(256, dtype=torch.uint8).view(1, 1, 16, 16)
    assert torch.equal(to_uint8(to_unit_range(every)), every)
    assert to_unit_range(every).min() == -1
    assert to_unit_range(every).max() == 1


def test_images_are_encoded_once(digits):
    calls = []

    def halved(x0):
        calls.append(len(x0))
        return x0[:, :, ::2, ::2] / 2

    whole = BatchStream(digits, Streams("all", True), 100, 3, CPU)
    stream = BatchStream(digits, Streams("all", True), 100, 3, CPU, halved)
    assert sum(calls) == 1442 + 146 + 146
    for _ in range(20):  # into a second epoch
        found, wanted = stream.next(), whole.next()
        assert torch.equal(found.x0_retain, wanted.x0_retain[:, :, ::2, ::2] / 2)
        assert torch.equal(found.x0_forget, wanted.x0_forget[:, :, ::2, ::2] / 2)
        assert torch.equal(found.cond_retain, wanted.cond_retain)
    assert sum(calls) == 1442 + 146 + 146


def test_images_that_are_mirrored_or_left_alone_are_not_encoded(digits):
    def refuse(x0):
        raise AssertionError("a mirrored latent is not the latent of the mirrored image")

    data = DigitsTrousers(horizontal_flip=True).load()
    BatchStream(data, Streams("retain", False), 4, 0, CPU, refuse).next()
    stream = BatchStream(digits, Streams("retain", False), 4, 0, CPU, lambda x0: x0)
    assert stream.sources["retain"].pixels[0] is digits.retain.pixels


@pytest.mark.parametrize("broken, sentence", [(1, "1 of 3 pictures holds values"), (2, "2 of 3 pictures hold values")])
def test_pictures_that_are_not_finite_are_counted(broken, sentence):
    images = torch.zeros(3, 1, 8, 8)
    images[:broken, 0, 0, 0] = torch.nan
    with pytest.raises(NonFiniteError, match=sentence):
        to_uint8(images)
