"""Names what is on a picture by a network of one's own: transformers' image classifier in a folder, or TorchScript.

TorchScript is a program, so it is read only where the user trusts it (unlearn_runner/recognition.py).
"""

import json
import warnings
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any, Literal, NamedTuple, final

import torch
from annotated_types import Len
from jaxtyping import Float, UInt8
from torch import Tensor, nn

from unlearn_runner import recognition
from unlearn_runner.errors import ConfigurationError, first_line
from unlearn_runner.evaluation.features import Preprocessing, whole_network
from unlearn_runner.evaluation.judge import Recognizer, RecognizerRecipe
from unlearn_runner.options import ImageSize, NonNegativeInt, PositiveFloat
from unlearn_runner.schema import file_digest
from unlearn_runner.spec import DataSpec

OfChannels = Annotated[Sequence[float], Len(1)]  # one number for all channels, or one for each


class Pictures(NamedTuple):
    """How a network wants pictures: sides in pixels, channels, and the channels' mean and deviation in [0, 1]."""

    size: tuple[int, int] | None  # None: not said
    channels: int
    mean: Sequence[float]
    std: Sequence[float]


@final
class NetworkFile(RecognizerRecipe):
    """A network that is there: a folder with config.json and model.safetensors, or a TorchScript file.

    What a folder's preprocessor_config.json and config.json say of size, channels, mean and deviation counts where the
    options are null; of a TorchScript file mean 0 and deviation 1 do, which are pictures in [0, 1]. TorchScript returns
    with logits [b, m], or with these and features [b, d].

    Args:
        file: the folder or file.
        image_size: pixels a side at which it sees pictures.
        channels: that it sees; grey pictures are shown in three equal ones where it wants so.
        mean: of the channels, or one for all, subtracted of pictures in [0, 1].
        std: what they are divided by then.
        outputs: which outputs, by number from 0, are which content's: the sum of their probabilities counts. None:
            output i is content i's.
        nothing: the outputs of pictures of no content: "rest" are all that `outputs` does not name.
        probabilities: whether its outputs are probabilities already, not logits.
    """

    def __init__(
        self,
        file: str,
        image_size: ImageSize | None = None,
        channels: Literal[1, 3] | None = None,
        mean: OfChannels | None = None,
        std: Annotated[Sequence[PositiveFloat], Len(1)] | None = None,
        outputs: Mapping[str, NonNegativeInt | Sequence[NonNegativeInt]] | None = None,
        nothing: Literal["rest"] | Sequence[NonNegativeInt] = "rest",
        probabilities: bool = False,
    ):
        self.file = recognition.file_of_network(file, image_size)
        self.outputs, self.nothing, self.probabilities = outputs, nothing, probabilities
        said = _said_by(self.file)
        size = said.size if image_size is None else (image_size, image_size)
        if size is None:
            raise ConfigurationError(
                f"the recognizer's image_size is missing: {file} does not say at how many pixels a side it sees images."
            )
        channels = channels or said.channels
        self.pictures = Pictures(
            size,
            channels,
            _for_each("mean", said.mean if mean is None else mean, channels),
            _for_each("std", said.std if std is None else std, channels),
        )
        self.network = (Classified if self.file.is_dir() else Scripted)(self.file)
        self.num_outputs, self.num_features = self._tried()

    def _tried(self) -> tuple[int, int]:
        """How many outputs and features it has, by a black picture."""
        with torch.inference_mode():
            try:
                outputs, features = self.network(torch.zeros(1, self.pictures.channels, *self.pictures.size))
            except Exception as error:  # whatever a network raises that wants other pictures
                raise ConfigurationError(
                    f"the recognizer's file={self.file} cannot see {self.pictures.channels} channels of "
                    f"{self.pictures.size[0]} x {self.pictures.size[1]} pixels ({first_line(error)}); give "
                    "its image_size and channels."
                ) from error
        return outputs.shape[1], features.shape[1]

    def require(self, spec: DataSpec) -> None:
        self._groups(spec)
        if self.pictures.channels == 1 and spec.image_shape[0] != 1:
            raise ConfigurationError(
                f"the recognizer's file={self.file} sees grey pictures, and the dataset's are coloured; give another "
                "judge."
            )

    def _groups(self, spec: DataSpec) -> list[list[int]]:
        return recognition.outputs_of_contents(spec.content_names, self.outputs, self.nothing, count=self.num_outputs)

    def recognizer(self, spec: DataSpec) -> "OutputsOfContents":
        return OutputsOfContents(
            self.file.resolve().name,
            self.network,
            self.pictures,
            self._groups(spec),
            len(spec.content_names),
            self.probabilities,
            self.num_features,
        )


def _for_each(option: str, values: Sequence[float], channels: int) -> list[float]:
    if len(values) not in (1, channels):
        raise ConfigurationError(
            f"the recognizer's {option} must be one number, or one for each of {channels} channels; got {list(values)}."
        )
    return list(values) * (channels if len(values) == 1 else 1)


def _said_by(place: Path) -> Pictures:
    """What a folder of transformers' making says of the pictures that its network wants."""
    plain = Pictures(None, 3, [0.0], [1.0])
    if not place.is_dir():
        return plain
    config, shown = _json(place / "config.json"), {}
    if (place / "preprocessor_config.json").is_file():
        shown = _json(place / "preprocessor_config.json")
    size = (shown.get("crop_size") if shown.get("do_center_crop") else None) or shown.get("size")
    if isinstance(size, dict):  # older files have a number
        sides = (size.get("height"), size.get("width")) if "height" in size else (size.get("shortest_edge"),) * 2
    else:
        sides = (size or config.get("image_size"),) * 2
    try:
        normalised = bool(shown) and shown.get("do_normalize", True)
        return Pictures(
            None if None in sides else (int(sides[0]), int(sides[1])),
            1 if config.get("num_channels") == 1 else 3,
            [float(value) for value in shown.get("image_mean", plain.mean)] if normalised else plain.mean,
            [float(value) for value in shown.get("image_std", plain.std)] if normalised else plain.std,
        )
    except (TypeError, ValueError) as error:
        raise _no_classifier(place, error) from error


def _json(file: Path) -> dict[str, Any]:
    try:
        found = json.loads(file.read_text())
        if not isinstance(found, dict):
            raise ValueError(f"{file.name} is no object")
    except (OSError, ValueError, RecursionError) as error:
        raise _no_classifier(file.parent, error) from error
    return found


def _no_classifier(place: Path, error: Exception) -> ConfigurationError:
    return ConfigurationError(
        f"the recognizer's file={place} is no image classifier in transformers' format ({first_line(error)})."
    )


class Classified(nn.Module):
    """Logits of transformers' image classifier, and what its last layer sees; where that is no linear one, the logits.

    Raises ConfigurationError unless the folder holds one of transformers' own, whole, as safetensors.
    """

    def __init__(self, folder: Path):
        super().__init__()
        from transformers import AutoModelForImageClassification

        try:
            self.network = whole_network(AutoModelForImageClassification, folder)
        except Exception as error:  # whatever a wrong folder makes transformers raise
            raise _no_classifier(folder, error) from error
        self.seen: list[Tensor] = []
        linear = [module for module in self.network.modules() if isinstance(module, nn.Linear)]
        if linear and linear[-1].out_features == self.network.config.num_labels:
            linear[-1].register_forward_pre_hook(lambda _, inputs: self.seen.append(inputs[0]))

    def forward(self, x: Float[Tensor, "b c h w"]) -> tuple[Float[Tensor, "b m"], Float[Tensor, "b d"]]:
        self.seen.clear()
        logits = self.network(pixel_values=x).logits
        pooled = [part for part in self.seen if part.ndim == 2 and len(part) == len(x)]
        return logits, (pooled[-1] if pooled else logits)


class Scripted(nn.Module):
    """Outputs of a TorchScript program, and its features; the outputs where it has none. Only for a trusted file."""

    def __init__(self, file: Path):
        super().__init__()
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore", FutureWarning)  # torch would rather have torch.export's files
                self.network = torch.jit.load(str(file), map_location="cpu").eval()
        except Exception as error:  # whatever another file makes torch raise
            raise ConfigurationError(
                f"the recognizer's file={file} is no TorchScript that torch can read ({first_line(error)}); save the "
                "network with torch.jit.script or torch.jit.trace, or give a folder with config.json and "
                "model.safetensors."
            ) from error
        self.digest = file_digest(file)  # of the program, which no state dict holds

    def forward(self, x: Float[Tensor, "b c h w"]) -> tuple[Float[Tensor, "b m"], Float[Tensor, "b d"]]:
        found = self.network(x)
        logits, features = found if isinstance(found, (tuple, list)) and len(found) == 2 else (found, found)
        for name, part in (("outputs", logits), ("features", features)):
            if not isinstance(part, Tensor) or part.ndim != 2 or len(part) != len(x):
                raise ValueError(f"its {name} are no tensor of one row for each picture")
        return logits, features


@final
class OutputsOfContents(Recognizer):
    """Log probabilities of contents, each the sum over its outputs, and of none of them, by a network.

    `groups` has the outputs of each content, then, if there are some, those of none.
    """

    called = "the judge's network"
    mend = (
        "Say which outputs are whose (the recognizer's outputs) and how it wants pictures (image_size, mean, std), or "
        "take another judge."
    )
    layer = "pooled"

    def __init__(
        self,
        name: str,
        network: Classified | Scripted,
        pictures: Pictures,
        groups: Sequence[Sequence[int]],
        num_contents: int,
        probabilities: bool,
        num_features: int,
    ):
        super().__init__()
        self.name, self.network, self.pictures, self.groups = name, network, pictures, groups
        self.num_contents, self.num_features, self.probabilities = num_contents, num_features, probabilities
        self.seen = Preprocessing(pictures.size, pictures.mean, pictures.std, pictures.channels)

    def forward(self, images: UInt8[Tensor, "b c h w"]) -> tuple[Float[Tensor, "b d"], Float[Tensor, "b m"]]:
        outputs, features = (part.float() for part in self.network(self.seen(images)))
        tiny = torch.finfo(outputs.dtype).tiny
        logs = outputs.clamp(min=tiny).log() if self.probabilities else outputs.log_softmax(1)
        return features, torch.stack([logs[:, rows].logsumexp(1) for rows in self.groups], 1)

    def settings(self) -> dict[str, Any]:
        program = {"program": self.network.digest} if isinstance(self.network, Scripted) else {}
        return {
            **program,
            **self.pictures._asdict(),
            "outputs": self.groups,
            "probabilities": self.probabilities,
        }
