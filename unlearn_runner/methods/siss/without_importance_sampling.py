"""SISS without importance sampling (2503.01034, section 4)."""

from collections.abc import Callable
from typing import final

from unlearn_runner.methods.denoising import drawn_loss
from unlearn_runner.methods.method import Method, Setting, Update
from unlearn_runner.methods.siss.gradient_norms import NormFix
from unlearn_runner.models.model import GenerativeModel
from unlearn_runner.options import PositiveFloat
from unlearn_runner.types import Batch, GeneratorState, Metrics, Stateful, Streams


@final
class SISSNoIS(Method):
    """SISS without importance sampling (2503.01034, section 4): x and a are noised and denoised on their own.

    The same two terms and norm fix; a forward pass for each image, each with its own t and eps. (In the released code
    the two of a pair have t and eps in common, as in SISS itself: the same expectation.)
    """

    def __init__(
        self,
        setting: Setting,
        update: Callable[[GenerativeModel], Update],
        tau: PositiveFloat | None = None,
        rho: PositiveFloat | None = None,
    ):
        self.reads = Streams(retain="retain", forget=True)
        self.networks = (setting.model,)
        self.trained = setting.model
        self.norm_fix = NormFix(tau, rho)
        self.update = update(setting.model)
        self.generator = setting.generator

    @property
    def model(self) -> GenerativeModel:
        return self.update.model

    def step(self, batch: Batch) -> Metrics:
        # 1. L_retain at the noisy x, L_forget at the noisy a
        (loss_retain, grad_retain), (loss_forget, grad_forget) = (
            (loss.detach() / self.trained.num_entries, self.update.gradient(loss))
            for x0, cond in ((batch.x0_retain, batch.cond_retain), (batch.x0_forget, batch.cond_forget))
            for loss in [drawn_loss(self.trained, x0, cond, self.generator).mean()]
        )

        # 2. the forget gradient at its norm, and the update
        norm_retain, norm_forget = grad_retain.norm(), grad_forget.norm()
        self.update.apply(grad_retain - self.norm_fix.scale(norm_retain, norm_forget) * grad_forget)
        return {
            "loss/retain": loss_retain,
            "loss/forget": loss_forget,
            "grad_norm/retain": norm_retain,
            "grad_norm/forget": norm_forget,
        }

    def stateful(self) -> dict[str, Stateful]:
        return {
            **self.update.stateful(),
            "noise": GeneratorState(self.generator),
            "norm_fix": self.norm_fix,
        }
