"""Relearning: how little fine-tuning brings the forgotten content back."""

import copy
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Annotated, Literal

from annotated_types import Gt, Le

from unlearn_runner.data.forget_retain import ForgetRetain
from unlearn_runner.data.streams import BatchStream
from unlearn_runner.methods.denoising import Denoising
from unlearn_runner.methods.method import Setting, Update
from unlearn_runner.models.model import GenerativeModel
from unlearn_runner.options import BatchSize, PositiveInt, Seed
from unlearn_runner.types import make_generator

RELEARNING_VERSION = 1  # goes up when the code comes to other scores of the same model


@dataclass(frozen=True)
class Relearning:
    """Fine-tuning with the plain denoising loss, on the forget images or, which is benign, on the retain images: there
    it shows whether forgotten content comes back by itself. `update` is called with the network.

    The content counts as back when the forget rate is `threshold` times the base model's.
    """

    update: Callable[[GenerativeModel], Update]
    images: Literal["forget", "retain"] = "forget"
    max_steps: PositiveInt = 50
    every: PositiveInt = 5  # steps between two looks at the forget rate
    batch_size: BatchSize = 64
    threshold: Annotated[float, Gt(0), Le(1)] = 0.5
    seed: Seed = 0

    def __call__(
        self,
        model: GenerativeModel,
        data: ForgetRetain,
        forget_rate_of: Callable[[GenerativeModel], float],
        base_rate: float,
    ) -> dict[str, float]:
        """relearn_steps: steps until the content is back, `max_steps` if it is not within them (relearn_reached 0).

        per_step/relearn_forget_rate/<n> is the forget rate after n steps. The same images and noise for every model;
        a copy is trained, `model` stays as it is.
        """
        network = copy.deepcopy(model)
        network.thaw()
        device = next(network.parameters()).device
        method = Denoising(Setting(network, make_generator(self.seed, "relearning", device)), self.update)
        shown = replace(data, retain=data.forget) if self.images == "forget" else data
        stream = BatchStream(shown, method.reads, self.batch_size, self.seed, device, network.encode)
        scores: dict[str, float] = {}
        for step in range(self.max_steps + 1):
            if step % self.every == 0 or step == self.max_steps:
                rate = forget_rate_of(method.model)
                scores[f"per_step/relearn_forget_rate/{step}"] = rate
                if rate > 0 and rate >= self.threshold * base_rate:
                    return {"relearn_steps": float(step), "relearn_reached": 1.0, **scores}
            if step < self.max_steps:
                method.step(stream.next())
        return {"relearn_steps": float(self.max_steps), "relearn_reached": 0.0, **scores}
