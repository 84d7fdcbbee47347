"""Membership inference: can one tell, from the model's losses, which images it was trained on?"""

from collections.abc import Sequence
from functools import partial
from typing import Annotated, Any, ClassVar, final

import torch
from annotated_types import Ge, Gt, Le, Lt, MinLen
from jaxtyping import Float, Int64, Shaped
from torch import Tensor

from unlearn_runner.evaluation.likelihood import latent_costs
from unlearn_runner.evaluation.metrics import Metric, Rows, measure_images
from unlearn_runner.evaluation.view import Samples, View
from unlearn_runner.models.model import DiffusionModel, GenerativeModel, evaluating, predict_eps
from unlearn_runner.options import BatchSize, PositiveInt, Seed
from unlearn_runner.types import make_generator

POPULATIONS = ("forget", "unseen")


def losses_at(
    model: DiffusionModel,
    x0: Float[Tensor, "b c h w"],
    cond: Shaped[Tensor, "b ..."] | None,
    timesteps: Int64[Tensor, "t"],
    eps: Float[Tensor, "t b l i j"],
) -> Float[Tensor, "b t"]:
    """The denoising loss of each image at each timestep: squared error of eps_pred, mean over pixels or a latent's
    entries.
    """
    columns = []
    with evaluating(model), torch.no_grad():
        x0 = model.encode(x0)
        for t, noise in zip(timesteps, eps, strict=True):
            eps_pred, _ = predict_eps(model, x0, noise, t.expand(len(x0)), cond)
            columns.append((eps_pred - noise).square().flatten(1).mean(1))
    return torch.stack(columns, 1)


def attack(members: Float[Tensor, "n"], others: Float[Tensor, "m"], false_positive_rate: float) -> tuple[float, float]:
    """AUC and true-positive rate at a false-positive rate, of calling an image a member when its loss is low.

    AUC: the chance that a member's loss lies below another image's, 0.5 if they cannot be distinguished. The rate: the
    share of members below the threshold under which at most that share of the others lies.
    """
    from sklearn.metrics import roc_auc_score, roc_curve

    truth = [1] * len(members) + [0] * len(others)
    scores = -torch.cat([members, others]).double().numpy()
    false_positives, true_positives, _ = roc_curve(truth, scores, drop_intermediate=False)
    reached = true_positives[false_positives <= false_positive_rate]
    return float(roc_auc_score(truth, scores)), float(reached.max())


@final
class Membership(Metric):
    """Loss-based membership inference (Matsumoto et al. 2023, 2302.03262) on what was to be forgotten.

    Members are forget images; the others are held-out images of the same content, which no model here has seen.
    The attack's score is the loss averaged over `timesteps` (of 1,000), with the same noise for every model.
    mia_auc and mia_tpr_at_1pct_fpr: 0.5 and 0.01 after perfect forgetting, as for the oracle; an AUC below 0.5
    means that the forget images stand out by high losses, which gives them away as well.
    per_timestep/mia_{loss_forget, loss_unseen, auc}/<t> show where the model tells them apart.

    Of a latent diffusion model it is the loss of the images' latents. A VAE has no timesteps: its score is minus the
    evidence lower bound, a mean over `num_draws` latents an image.
    """

    version = 1
    needs = ("training_loss",)
    held_out: ClassVar = {"mia": "forget_test"}

    def __init__(
        self,
        num_images: PositiveInt = 200,
        timesteps: Annotated[Sequence[Annotated[int, Ge(0), Lt(1000)]], MinLen(1)] = (
            50,
            150,
            250,
            350,
            450,
            550,
            650,
            750,
            850,
            950,
        ),
        num_draws: Annotated[int, Gt(0), Le(10_000)] = 10,
        batch_size: BatchSize = 200,
        seed: Seed = 0,
    ):
        self.num_images, self.timesteps, self.num_draws = num_images, list(timesteps), num_draws
        self.batch_size, self.seed = batch_size, seed

    def measure(self, view: View) -> Rows:
        model, data = view.model, view.data
        device = next(model.parameters()).device
        if model.is_diffusion:
            timesteps = torch.tensor(self.timesteps, device=device) * model.num_train_timesteps // 1000
            losses = partial(_noised_losses, model, timesteps)
        else:
            losses = partial(_drawn_bounds, model, self.num_draws)
        rows = {}
        for name, images in zip(POPULATIONS, (data.forget, data.forget_test), strict=True):
            generator = make_generator(self.seed, f"membership/{name}", device)
            table = measure_images(
                partial(losses, generator),
                images,
                data.spec.label_names is not None,
                self.num_images,
                self.batch_size,
                self.seed,
                device,
            )
            if table is not None:
                rows[name] = table
        return rows

    def score(self, samples: Samples, rows: Rows) -> dict[str, float]:
        if set(rows) != set(POPULATIONS):
            return {}  # nothing is held out
        forget, unseen = (rows[name] for name in POPULATIONS)
        if forget.ndim == 1:  # a VAE
            return dict(zip(("mia_auc", "mia_tpr_at_1pct_fpr"), attack(forget, unseen, 0.01), strict=True))
        auc, rate = attack(forget.mean(1), unseen.mean(1), 0.01)
        scores = {"mia_auc": auc, "mia_tpr_at_1pct_fpr": rate}
        for column, t in enumerate(self.timesteps):
            scores[f"per_timestep/mia_loss_forget/{t}"] = float(forget[:, column].mean())
            scores[f"per_timestep/mia_loss_unseen/{t}"] = float(unseen[:, column].mean())
            scores[f"per_timestep/mia_auc/{t}"] = attack(forget[:, column], unseen[:, column], 0.01)[0]
        return scores

    def provenance(self, model: GenerativeModel) -> dict[str, Any]:
        if model.is_diffusion:
            kind = {
                "attack": "threshold on the denoising loss, mean over timesteps",
                "timesteps": self.timesteps,
            }
        else:
            kind = {"attack": "threshold on minus the ELBO, mean over latents", "num_draws": self.num_draws}
        return {**kind, "num_images": self.num_images, "batch_size": self.batch_size, "seed": self.seed}


def _noised_losses(
    model: DiffusionModel,
    timesteps: Int64[Tensor, "t"],
    generator: torch.Generator,
    x0: Float[Tensor, "b c h w"],
    cond: Shaped[Tensor, "b ..."] | None,
) -> Float[Tensor, "b t"]:
    eps = torch.randn((len(timesteps), len(x0), *model.sample_shape), generator=generator, device=x0.device)
    return losses_at(model, x0, cond, timesteps, eps)


def _drawn_bounds(
    model: GenerativeModel,
    num_draws: int,
    generator: torch.Generator,
    x0: Float[Tensor, "b c h w"],
    cond: Shaped[Tensor, "b ..."] | None,
) -> Float[Tensor, "b"]:
    eps = torch.randn((num_draws, len(x0), *model.sample_shape), generator=generator, device=x0.device)
    return latent_costs(model, x0, cond, eps).mean(0)
