"""Names what is on a picture by texts: CLIP zero-shot (2103.00020, section 3.1), with texts for what is no content."""

from collections.abc import Mapping, Sequence
from typing import Any, final

import torch
import torch.nn.functional as F
from jaxtyping import Float, UInt8
from torch import Tensor

from unlearn_runner import recognition
from unlearn_runner.evaluation.judge import Recognizer, RecognizerRecipe
from unlearn_runner.models.clip import Clip, named_clip
from unlearn_runner.spec import DataSpec


@final
class ZeroShotClip(RecognizerRecipe):
    """One of open_clip's models, asked which text fits a picture best; no image of the dataset is needed.

    Args:
        model: its name in open_clip.
        pretrained: its weights, by one of open_clip's tags or a file.
        templates: texts with a {} for the name of a content; where there are several, their embeddings' mean counts.
        prompts: texts for some contents in place of the templates.
        nothing: texts for pictures of no content: where one of them fits best, the judge abstains.
    """

    def __init__(
        self,
        model: str,
        pretrained: str,
        templates: Sequence[str] = ("a photo of {}",),
        prompts: Mapping[str, str | Sequence[str]] | None = None,
        nothing: Sequence[str] = (),
    ):
        self.clip = named_clip(model, pretrained, "the recognizer's model", "the recognizer's pretrained")
        self.templates, self.prompts, self.nothing = templates, prompts, nothing
        self.num_features = self.clip.num_features

    def require(self, spec: DataSpec) -> None:
        self._texts(spec)

    def recognizer(self, spec: DataSpec) -> "TextsOfContents":
        return TextsOfContents(self.clip, self._texts(spec), len(spec.content_names))

    def _texts(self, spec: DataSpec) -> list[list[str]]:
        return recognition.texts_of_contents(spec.content_names, self.templates, self.prompts, self.nothing)


@final
class TextsOfContents(Recognizer):
    """CLIP's image embedding, and its cosine with the embedding of each content's texts, over the temperature.

    Of several texts of one content the mean of the embeddings counts, of length 1 again. Features are the image
    embedding, of unit mean square.
    """

    called = "CLIP"
    mend = "Say better what they show (the recognizer's prompts), or take a larger CLIP or another judge."
    layer = "image embedding"

    def __init__(self, clip: Clip, texts: Sequence[Sequence[str]], num_contents: int):
        super().__init__()
        self.clip, self.texts, self.num_contents = clip, texts, num_contents
        self.name, self.num_features = clip.name, clip.num_features
        with torch.no_grad():
            embeddings = torch.stack([F.normalize(clip.of_texts(of_one).mean(0), dim=0) for of_one in texts])
        self.register_buffer("embeddings", embeddings)

    def forward(self, images: UInt8[Tensor, "b c h w"]) -> tuple[Float[Tensor, "b d"], Float[Tensor, "b m"]]:
        found = self.clip.of_uint8(images)
        return found * found.shape[1] ** 0.5, self.clip.scale * found @ self.embeddings.T

    def settings(self) -> dict[str, Any]:
        return {**self.clip.provenance, "texts": self.texts}
