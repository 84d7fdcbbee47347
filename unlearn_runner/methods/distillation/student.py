"""SISS on a student of many steps, with images of a distilled generator (2512.01054, introduction: prose only).

# Notation (variable -> paper)
# student -> epsilon_theta;  eta -> weight of the student's forget term
"""

import copy
from collections.abc import Callable
from typing import final

import torch
from jaxtyping import Float
from torch import Tensor

from unlearn_runner.data.streams import Images
from unlearn_runner.methods.denoising import draw_noise
from unlearn_runner.methods.distillation.mixed_labels import controller, seen_of
from unlearn_runner.methods.distillation.networks import DistillationNetworks, NoiseRange, distil_steps
from unlearn_runner.methods.distillation.overrides import Override, OverrideBatch, drawn_labels
from unlearn_runner.methods.method import Counter, Method, Setting, Update, copy_weights
from unlearn_runner.methods.siss.lambda_controllers import LambdaController
from unlearn_runner.methods.siss.mixture import mix, siss_loss
from unlearn_runner.models.model import GenerativeModel, squared_error
from unlearn_runner.options import BatchSize, OpenUnitInterval, PositiveFloat, PositiveInt, UnitInterval
from unlearn_runner.rules import method_options
from unlearn_runner.spec import Labels
from unlearn_runner.types import Batch, GeneratorState, Metrics, Stateful, Streams


def student_losses(
    eps_pred: Float[Tensor, "b c h w"], eps_override: Float[Tensor, "b c h w"], eta: float
) -> Float[Tensor, "b"]:
    """What replaces SISS's unbounded ascent: eta ||eps_theta(m, c_f) - eps_phi(m, c_override)||^2, to be descended."""
    return eta * squared_error(eps_pred, eps_override.detach())


@final
class Student(Method):
    """SISS without data, on a student that keeps the teacher's many steps and is what ships.

    For `distil_share` of the steps a one-step generator is distilled, of all labels alike, the forgotten too. Then it
    is frozen, and supplies x and a: the student descends SISS's retain term, and in place of SISS's ascent it learns to
    predict under a forget label what the teacher predicts under the override (`student_losses`). The labels of x and a
    differ, so the importance weights are one-hot.
    """

    requires = ("noise", "labels", "base")

    def __init__(
        self,
        setting: Setting,
        update: Callable[[GenerativeModel], Update],
        generator_update: Callable[[GenerativeModel], Update],
        fake_update: Callable[[GenerativeModel], Update],
        override: Callable[[Labels], Override],
        batch_size: BatchSize,
        max_steps: PositiveInt,
        distil_share: OpenUnitInterval,
        alpha: float,
        noise: NoiseRange,
        eta: PositiveFloat,
        lambd: UnitInterval | LambdaController,
    ):
        method_options.something_to_forget(distil_share, max_steps)
        method_options.something_distilled(distil_share, max_steps)
        self.trio = DistillationNetworks(setting.model, noise)
        self.student = copy.deepcopy(self.trio.fake)
        self.reads = Streams(retain=None, forget=False)
        self.networks = (self.student, *self.trio.networks)
        self.labels = setting.labels
        self.override = override(setting.labels)
        self.batch_size, self.alpha, self.eta = batch_size, alpha, eta
        self.lambd = controller(lambd)
        self.distil_steps = distil_steps(distil_share, max_steps)
        self.taken = Counter()
        self.update = update(self.student)
        self.generator_update = generator_update(self.trio.generator)
        self.fake_update = fake_update(self.trio.fake)
        self.generator = setting.generator

    @property
    def model(self) -> GenerativeModel:
        return self.update.model

    def begin(self, images: Images | None) -> None:
        copy_weights(self.student, self.trio.teacher)
        self.trio.begin()

    def step(self, batch: Batch) -> Metrics:
        distilling = self.taken.value < self.distil_steps
        if self.taken.value == self.distil_steps:  # from now on the generator is what would ship of it
            self.trio.generator.load_state_dict(self.generator_update.model.state_dict())
        self.taken.value += 1
        return self._distil() if distilling else self._unlearn()

    def _distil(self) -> Metrics:
        """One step of plain distillation: SFD without anything to forget."""
        trio, g, b = self.trio, self.generator, self.batch_size

        # 1. fake score
        labels = drawn_labels(range(trio.teacher.num_labels), b, g, trio.device)
        fake_losses = trio.fake_losses(labels, trio.draw_timesteps(b, g), g)
        self.fake_update.apply(self.fake_update.gradient(fake_losses.mean()))

        # 2. generator
        labels = drawn_labels(range(trio.teacher.num_labels), b, g, trio.device)
        noised = trio.draw(labels, trio.draw_timesteps(b, g), g)
        losses = trio.generator_losses(noised, labels, labels, self.alpha)
        self.generator_update.apply(self.generator_update.gradient(losses.mean()))
        pixels = trio.teacher.num_entries
        return {
            "loss/distil_fake": fake_losses.detach().mean() / pixels,
            "loss/distil": losses.detach().mean() / pixels,
        }

    def _unlearn(self) -> Metrics:
        """One step of SISS on the generator's images."""
        student, teacher, g, b = self.student, self.trio.teacher, self.generator, self.batch_size

        # 1. x and a by the frozen generator; t, eps, lambda, and from which of the two m is drawn
        source, device = self.trio.generator, self.trio.device
        conds = [drawn_labels(part, b, g, device) for part in (self.labels.retain, self.labels.forget)]
        z = torch.randn((2, b, *student.sample_shape), generator=g, device=device)
        with torch.no_grad():
            images = [source.predict(part, torch.zeros_like(cond), cond) for part, cond in zip(z, conds, strict=True)]
        drawn = Batch(*images, *conds, forget_share=0.0)
        timesteps, eps = draw_noise(student, drawn.x0_retain, g)
        level = timesteps / student.num_train_timesteps
        lambd = self.lambd.next(level).lambd
        from_forget = torch.rand(b, generator=g, device=device) < lambd
        noisings = (student.noising(x0, timesteps, cond) for x0, cond in zip(images, conds, strict=True))
        mixture = mix(drawn, timesteps, *noisings, eps, from_forget, lambd)

        # 2. the student's prediction; its target: the noise that leads to x, or the teacher's under another label
        prediction = student.predict(mixture.m, timesteps, mixture.cond)
        losses_retain = student.loss(
            prediction, drawn.x0_retain, mixture.m, mixture.retain.eps, mixture.retain.std, timesteps
        )
        with torch.no_grad():
            others = self.override(OverrideBatch(drawn.x0_forget, drawn.cond_forget, teacher, g))
            wanted = teacher.predict(mixture.m, timesteps, torch.where(from_forget, others, mixture.cond))
        eps_pred, eps_override = (student.path.noise_of(part, mixture.m, timesteps) for part in (prediction, wanted))
        losses_forget = student_losses(eps_pred, eps_override, self.eta)

        # 3. both terms' gradients, both to descend
        w_retain, w_forget = mixture.retain.weight, mixture.forget.weight
        terms = siss_loss(losses_retain, losses_forget, w_retain, w_forget)
        slopes_retain, grad_retain = self.update.gradient_through(prediction, terms[0], retain_graph=True)
        slopes_forget, grad_forget = self.update.gradient_through(prediction, terms[1])
        self.update.apply(grad_retain + grad_forget)

        # 4. lambda's controller learns from what was seen
        pixels = student.num_entries
        norms = grad_retain.norm(), grad_forget.norm()
        pairs = ((w_retain, losses_retain), (w_forget, losses_forget))
        weighted = [(w * losses).detach() / pixels for w, losses in pairs]
        seen = seen_of(level, (w_retain, w_forget), weighted, (slopes_retain * b, slopes_forget * b), norms, 1.0)
        return {
            "loss/retain": weighted[0].mean(),
            "loss/forget": weighted[1].mean(),
            "grad_norm/retain": norms[0],
            "grad_norm/forget": norms[1],
            "lambda/value": torch.as_tensor(lambd, device=device).mean(),
            **self.lambd.learn(seen),
        }

    def stateful(self) -> dict[str, Stateful]:
        parts = {"": self.update, "generator_": self.generator_update, "fake_": self.fake_update}
        return {
            **{prefix + name: part for prefix, update in parts.items() for name, part in update.stateful().items()},
            "noise": GeneratorState(self.generator),
            "lambd": self.lambd,
            "steps": self.taken,
        }
