"""The face every unlearning method shows to the runner, and the one way they turn gradients into weights."""

import copy
import inspect
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from functools import cached_property
from typing import Any, ClassVar, NamedTuple, final

import torch
from jaxtyping import Bool, Float
from torch import Tensor, nn

from unlearn_runner.data.streams import Images
from unlearn_runner.distributed import averaged
from unlearn_runner.errors import ConfigurationError, first_line
from unlearn_runner.gradients import as_vector, gradients, in_parts
from unlearn_runner.models.clip import Clip
from unlearn_runner.models.model import GenerativeModel
from unlearn_runner.options import Decay, OpenUnitInterval, PositiveFloat
from unlearn_runner.spec import Labels
from unlearn_runner.types import Batch, Metrics, Stateful, Streams


class Setting(NamedTuple):
    """What the runner gives to a method; the method's options come from its YAML file."""

    model: GenerativeModel  # the network to unlearn; its weights are loaded later, before `Method.begin`
    generator: torch.Generator  # for all that the method draws
    labels: Labels | None = None  # the dataset's classes or prompts; None for an unconditional model
    clip: Clip | None = None  # of the group `clip`


class Method(ABC):
    """An unlearning method: owns its gradients and every optimizer it needs. Subclasses are final.

    Constructed with a `Setting` and its options. `requires` names what it cannot do without, any of REQUIREMENTS
    (rules/method_options.py); read from the source file, so a plain tuple in the class body.
    """

    requires: ClassVar[tuple[str, ...]] = ()
    steps: ClassVar[int | None] = None  # how many `step`s it takes; None: as many as the run has (trainer.max_steps)
    reads: Streams  # which images `step` needs
    networks: tuple[GenerativeModel, ...]  # all that `step` runs, the trained one first; their passes are counted

    @property
    @abstractmethod
    def model(self) -> GenerativeModel:
        """What ships: sampled, evaluated and saved. With an EMA, the averaged weights."""

    def begin(self, images: Images | None) -> None:  # noqa: B027 - most methods have nothing to do
        """Called once, when the weights are in the model: copy teachers, measure masks, look at the sets.

        `images` are the sets to retain and to forget, if the method requires "images", else None.
        """

    @abstractmethod
    def step(self, batch: Batch) -> Metrics:
        """One update of the weights."""

    @abstractmethod
    def stateful(self) -> dict[str, Stateful]:
        """Everything that a resumed run needs, the weights included."""


class GradientTransform(ABC):
    """What becomes of a gradient before the optimizer sees it. Stateful."""

    @abstractmethod
    def __call__(self, gradient: Float[Tensor, "p"]) -> Float[Tensor, "p"]: ...

    @abstractmethod
    def state_dict(self) -> dict[str, Any]: ...

    @abstractmethod
    def load_state_dict(self, state_dict: dict[str, Any]) -> None: ...


@final
class Mask(GradientTransform):
    """Lets some weights move; the others stay as they are to the bit, whatever the optimizer does.

    `keep` says which: the trainer sets it, after `Method.begin`, to the `share` of `trained`'s weights that matter most
    to what is to be forgotten (`salun.salient`). Without a share a method sets it itself; until then all move.
    """

    def __init__(self, trained: nn.Module | None = None, share: OpenUnitInterval | None = None) -> None:
        self.trained, self.share = trained, share
        self.keep: Bool[Tensor, p] | None = None

    def __call__(self, gradient: Float[Tensor, "p"]) -> Float[Tensor, "p"]:
        return gradient if self.keep is None else torch.where(self.keep, gradient, 0.0)

    def state_dict(self) -> dict[str, Any]:
        return {"keep": self.keep}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self.keep = state_dict["keep"]


@final
class Update:
    """From a flat gradient to new weights: clip its norm, step the optimizer and its schedule, follow by EMA.

    Gradients are single vectors over all trainable weights, so that a method's arithmetic on them (norms, dot
    products, sums) reads as in its paper.

    Args:
        model: the network to train.
        optimizer: called with the trainable weights.
        max_grad_norm: the gradient's L2 norm is cut to this; None leaves it.
        max_grad_value: each of its entries is cut to [-this, this], before the norm; None leaves them.
        transforms: what else becomes of a gradient, in this order, before it is cut: a mask, for one.
        saliency: share of the weights that move, those whose forget gradient is largest at the base (SalUn, 2310.12508,
            equation 3); None: all.
        lr_schedule: called with `optimizer=`, e.g. diffusers' get_scheduler; None keeps the rate.
        ema_decay: ship the exponential moving average of the weights with this decay (diffusers' EMAModel); None ships
            the weights themselves.
        ema_warmup: the decay at step n is min(ema_decay, n / (n + 9)), and 0 at the first, so the average forgets where
            it began and spans a share of the run so far: its weights are n / 10 steps old on average. 0.98 is reached
            at step 441, 0.9999 at step 89,991. False: ema_decay from the first step on.
    """

    def __init__(
        self,
        model: nn.Module,
        optimizer: Callable[[Iterable[nn.Parameter]], torch.optim.Optimizer],
        max_grad_norm: PositiveFloat | None = None,
        lr_schedule: Callable[..., Any] | None = None,
        ema_decay: Decay | None = None,
        max_grad_value: PositiveFloat | None = None,
        transforms: Sequence[GradientTransform] = (),
        ema_warmup: bool = True,
        saliency: OpenUnitInterval | None = None,
    ):
        self.trained = model
        if saliency is not None and not hasattr(model, "noising"):  # what its forget gradient is measured by
            raise ConfigurationError(
                f"a {_name(type(model))} has no forget gradient to choose weights by; leave saliency out of its update."
            )
        self.transforms = (*transforms, *([] if saliency is None else [Mask(model, saliency)]))
        self.weights = [weight for weight in model.parameters() if weight.requires_grad]
        self.optimizer, self.lr_schedule = _made(optimizer, lr_schedule, self.weights)
        _try_a_step(optimizer, lr_schedule, self.weights)
        self.max_grad_norm = max_grad_norm
        self.max_grad_value = max_grad_value
        self.ema_decay, self.ema_warmup = ema_decay, ema_warmup

    @cached_property
    def ema(self) -> Any:
        """diffusers' EMAModel, or None. Made at first use, when the pretrained weights are in the model."""
        if self.ema_decay is None:
            return None
        from diffusers.training_utils import EMAModel

        self._averaged = copy.deepcopy(self.trained).requires_grad_(False)
        # On a GPU all weights by a few kernels; on a CPU that rounds otherwise and gains nothing.
        at_once = {} if self.ema_warmup else {"min_decay": self.ema_decay, "update_after_step": -1}
        return EMAModel(self.trained.parameters(), decay=self.ema_decay, foreach=self.weights[0].is_cuda, **at_once)

    @property
    def model(self) -> nn.Module:
        """The network with the weights that ship."""
        if self.ema is None:
            return self.trained
        self.ema.copy_to(self._averaged.parameters())
        return self._averaged

    def gradient(self, loss: Float[Tensor, ""]) -> Float[Tensor, "p"]:
        """The gradient of a loss over all trainable weights, as one vector."""
        return self._as_vector(gradients(loss, self.weights))

    def gradient_through(
        self, prediction: Float[Tensor, "b c h w"], loss: Float[Tensor, ""], retain_graph: bool = False
    ) -> tuple[Float[Tensor, "b c h w"], Float[Tensor, "p"]]:
        """The gradients of a loss over the network's prediction, and over all trainable weights as one vector."""
        over_prediction, *parts = gradients(loss, [prediction, *self.weights], retain_graph=retain_graph)
        return over_prediction, self._as_vector(parts)

    def gradient_from(
        self, prediction: Float[Tensor, "b c h w"], slopes: Float[Tensor, "b c h w"], retain_graph: bool = False
    ) -> Float[Tensor, "p"]:
        """The gradient over all trainable weights of a loss whose gradient over the network's prediction is known."""
        return self._as_vector(gradients(prediction, self.weights, slopes, retain_graph=retain_graph))

    def zero_gradient(self) -> Float[Tensor, "p"]:
        """The gradient of a loss over no samples."""
        return self.weights[0].new_zeros(sum(weight.numel() for weight in self.weights))

    def apply(self, gradient: Float[Tensor, "p"]) -> None:
        """Move the weights against `gradient`."""
        ema = self.ema  # begins with the weights before the first step
        gradient = self._transformed(gradient)
        if self.max_grad_value is not None:
            gradient = gradient.clamp(-self.max_grad_value, self.max_grad_value)
        if self.max_grad_norm is not None:
            gradient = gradient * (self.max_grad_norm / (gradient.norm() + 1e-6)).clamp(max=1.0)
        self._descend(gradient)
        if self.lr_schedule is not None:
            with _explained(f"the learning rate schedule {_name(self.lr_schedule)} cannot take another step"):
                self.lr_schedule.step()
        if ema is not None:
            ema.step(self.trained.parameters())

    @contextmanager
    def trial(self) -> Iterator[Callable[[Float[Tensor, "p"]], None]]:
        """Steps of the optimizer that are taken back: the weights are put back in the end, its moments are not.

        Yields what to call with each gradient. It is neither cut nor followed by schedule or EMA.
        """
        before = [weight.detach().clone() for weight in self.weights]
        yield lambda gradient: self._descend(self._transformed(gradient))
        with torch.no_grad():
            for weight, kept in zip(self.weights, before, strict=True):
                weight.copy_(kept)

    def _transformed(self, gradient: Float[Tensor, "p"]) -> Float[Tensor, "p"]:
        for transform in self.transforms:
            gradient = transform(gradient)
        return gradient

    def _descend(self, gradient: Float[Tensor, "p"]) -> None:
        """One step of the optimizer, which moves some weights without a gradient, too: by decay, or by momentum."""
        for weight, part in zip(self.weights, in_parts(gradient, self.weights), strict=True):
            weight.grad = part
        masks = [mask.keep for mask in self.transforms if isinstance(mask, Mask) and mask.keep is not None]
        before = [weight.detach().clone() for weight in self.weights] if masks else []
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        for keep in masks:
            with torch.no_grad():
                for weight, moves, old in zip(self.weights, in_parts(keep, self.weights), before, strict=True):
                    weight.copy_(torch.where(moves, weight, old))

    def _as_vector(self, parts: Sequence[Tensor]) -> Float[Tensor, "p"]:
        """The gradients over each weight as one, of all processes together."""
        return averaged(as_vector(parts, self.weights))

    def stateful(self) -> dict[str, Stateful]:
        parts = {"weights": TrainedWeights(self.trained), "optimizer": self.optimizer}
        if self.lr_schedule is not None:
            parts["lr_schedule"] = self.lr_schedule
        if self.ema is not None:
            parts["ema"] = self.ema
        return parts | {f"transform_{number}": part for number, part in enumerate(self.transforms)}


@contextmanager
def _explained(what: str) -> Iterator[None]:
    """What torch or diffusers raise about options: a sentence that says of which part, with the library's own words."""
    try:
        yield
    except ConfigurationError:
        raise
    except Exception as error:
        raise ConfigurationError(f"{what} ({first_line(error).rstrip('.')}).") from error


def _name(part: Any) -> str:
    """Of a class, a function, one of these with some of its arguments, or an object."""
    part = getattr(part, "func", part)
    return getattr(part, "__name__", type(part).__name__)


def _made(
    optimizer: Callable[..., torch.optim.Optimizer], lr_schedule: Callable[..., Any] | None, weights: list[nn.Parameter]
) -> tuple[torch.optim.Optimizer, Any]:
    with _explained(f"the optimizer {_name(optimizer)} cannot be made with these options"):
        made = optimizer(weights, **in_one_kernel(optimizer, weights))
    if lr_schedule is None:
        return made, None
    with _explained(f"the learning rate schedule {_name(lr_schedule)} cannot be made with these options"):
        return made, lr_schedule(optimizer=made)


def _try_a_step(
    optimizer: Callable[..., torch.optim.Optimizer], lr_schedule: Callable[..., Any] | None, weights: list[nn.Parameter]
) -> None:
    """On a stand-in: torch finds some options wrong at the first step only, which comes after a base was trained."""
    stand_in = nn.Parameter(torch.zeros_like(min(weights, key=torch.numel)))
    made, schedule = _made(optimizer, lr_schedule, [stand_in])
    stand_in.grad = torch.zeros_like(stand_in)
    with _explained(f"the optimizer {_name(optimizer)} cannot take a step with these options"):
        made.step()
    if schedule is not None:
        with _explained(f"the learning rate schedule {_name(lr_schedule)} cannot take a step with these options"):
            schedule.step()


def in_one_kernel(optimizer: Callable[..., torch.optim.Optimizer], weights: list[nn.Parameter]) -> dict[str, bool]:
    """What makes the optimizer fused, for weights on a GPU, if torch has it so and nothing else was asked for."""
    asked = getattr(optimizer, "keywords", {})
    if not weights[0].is_cuda or {"fused", "foreach", "capturable", "differentiable"} & asked.keys():
        return {}
    kind = getattr(optimizer, "func", optimizer)
    return {"fused": True} if "fused" in inspect.signature(kind).parameters else {}


@final
class TrainedWeights:
    """The weights of a network that training moves, and its buffers, with the face of a Stateful.

    What stays as the base has it is not stored: every run loads the base.
    """

    def __init__(self, network: nn.Module):
        self.network = network

    def state_dict(self) -> dict[str, Tensor]:
        still = {name for name, weight in self.network.named_parameters() if not weight.requires_grad}
        return {name: value for name, value in self.network.state_dict().items() if name not in still}

    def load_state_dict(self, state_dict: dict[str, Tensor]) -> None:
        missing = self.state_dict().keys() - state_dict.keys()
        unexpected = self.network.load_state_dict(state_dict, strict=False).unexpected_keys
        if missing or unexpected:
            raise KeyError(f"other weights than the network's: {sorted(missing)} missing, {unexpected} unexpected")


def copy_weights(network: nn.Module, source: nn.Module) -> None:
    network.load_state_dict(source.state_dict())


@final
class Counter:
    """Steps taken."""

    def __init__(self) -> None:
        self.value = 0

    def state_dict(self) -> dict[str, Any]:
        return {"value": self.value}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self.value = state_dict["value"]
