"""The corruptions that a small CLIP is trained with."""

import torch

from unlearn_runner.data.sd_concepts import embedded_pictures
from unlearn_runner.data.streams import to_unit_range
from unlearn_runner.training.clip import corrupted
from unlearn_runner.types import make_generator


def test_corrupted_pictures_are_theirs_still():
    """Each differs from itself and from the others' corruption, stays in range, and is mostly likest what it was."""
    trousers = embedded_pictures(16, seed=0)["trousers"][:1]
    same = to_unit_range(trousers).expand(200, -1, -1, -1)
    found = corrupted(same, make_generator(0, "here"))
    assert found.shape == same.shape
    assert found.min() >= -1
    assert found.max() <= 1
    assert found.flatten(1).unique(dim=0).shape[0] == 200
    brightness = found.flatten(1).mean(1)
    assert (brightness > same.mean()).any()
    assert (brightness < same.mean()).any()
    assert torch.equal(found, corrupted(same, make_generator(0, "here")))
    assert not torch.equal(found, corrupted(same, make_generator(1, "here")))

    pictures = [to_unit_range(part[:1]).flatten() for part in embedded_pictures(16, seed=0).values()]  # trousers last
    nearest = torch.corrcoef(torch.cat([torch.stack(pictures), found.flatten(1)]))[len(pictures) :, : len(pictures)]
    assert (nearest.argmax(1) == len(pictures) - 1).double().mean() > 0.7, "a tenth by chance"
