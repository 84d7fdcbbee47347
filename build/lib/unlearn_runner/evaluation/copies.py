"""Whether a model draws the very images that it was to forget."""

from typing import Annotated, Any, ClassVar, Literal, final

import torch
from annotated_types import Ge, Gt, Lt
from jaxtyping import Float, UInt8
from torch import Tensor

from unlearn_runner.data.forget_retain import ForgetRetain, LabelledImages
from unlearn_runner.evaluation.metrics import Metric, Rows, first_distinct, share
from unlearn_runner.evaluation.view import Samples, View
from unlearn_runner.models.model import GenerativeModel
from unlearn_runner.options import PositiveInt, Seed

SMALL = 32  # pixels a side, up to which pictures are compared pixel by pixel
MOST_NAMED = 100  # images to forget that have scores of their own


@final
class Copies(Metric):
    """copy_rate: share of the samples under the forget conditions that are a copy of an image to forget: nearer to it
    than all but `quantile` of the images that no model here has seen are to theirs. closer_to_forget: share that is
    nearer to some image to forget than to any of as many unseen ones; 0.5 where the model knows neither. In [0, 1].
    per_image/copy_rate/<file>: the share that are copies of one of them, of the first 100.

    Unseen are the held-out images like those to forget (of a request, `dataset.never_seen`). Distances are Euclidean,
    `by` "pixels" or the "features" of the judge; "auto": pixels up to 32 a side. Up to `max_images` images are looked
    at.
    """

    version = 1
    held_out: ClassVar = {"copy_rate": "forget_test"}

    def __init__(
        self,
        by: Literal["auto", "pixels", "features"] = "auto",
        quantile: Annotated[float, Gt(0), Lt(0.5)] = 0.05,
        max_images: Annotated[PositiveInt, Ge(2)] = 1000,
        seed: Seed = 0,
    ):
        self.by, self.quantile, self.max_images, self.seed = by, quantile, max_images, seed

    def measure(self, view: View) -> Rows:
        data = view.data
        if not len(data.forget_test):
            return {}
        forget, unseen = (first_distinct(part, self.max_images, self.seed) for part in (data.forget, data.forget_test))
        wanted, others = self._points(view, forget.pixels), self._points(view, unseen.pixels)
        drawn = view.judged["all" if "all" in view.judged else "forget"]
        points = self._points(view, drawn.images) if self._pixels(view) else drawn.features
        near_wanted, which = distances(points, wanted).min(1)
        limit = distances(others, wanted).min(1).values.quantile(self.quantile)
        as_many = min(len(wanted), len(others))
        closer = distances(points, wanted[:as_many]).amin(1) < distances(points, others[:as_many]).amin(1)
        copies = near_wanted < limit
        rows = {"copies": copies, "closer": closer}
        for row, name in enumerate(self._names(data, forget)[:MOST_NAMED]):
            rows[f"copies/{name}"] = copies & (which == row)
        return rows

    def _names(self, data: ForgetRetain, chosen: LabelledImages) -> list[str]:
        """Of the files of these images to forget, where the dataset accounts for them."""
        named = [row["file"] for row in data.inventory if row["fate"] == "forget"]
        if len(named) != len(data.forget):
            return []
        rows = {image.numpy().tobytes(): name for image, name in zip(data.forget.pixels, named, strict=True)}
        return [rows[image.numpy().tobytes()] for image in chosen.pixels]

    def _pixels(self, view: View) -> bool:
        return self.by == "pixels" or (self.by == "auto" and max(view.data.spec.image_shape[1:]) <= SMALL)

    def _points(self, view: View, images: UInt8[Tensor, "n c h w"]) -> Float[Tensor, "n d"]:
        if self._pixels(view):
            return images.flatten(1).float() / 255
        return view.judge.features_of(images).features

    def score(self, samples: Samples, rows: Rows) -> dict[str, float]:
        if "copies" not in rows:
            return {}
        scores = {"copy_rate": share(rows["copies"]), "closer_to_forget": share(rows["closer"])}
        apart = (name for name in rows if name.startswith("copies/"))
        return scores | {f"per_image/copy_rate/{name.removeprefix('copies/')}": share(rows[name]) for name in apart}

    def provenance(self, model: GenerativeModel) -> dict[str, Any]:
        return dict(vars(self))


def distances(a: Float[Tensor, "n d"], b: Float[Tensor, "m d"]) -> Float[Tensor, "n m"]:
    return torch.cdist(a.double(), b.double())
