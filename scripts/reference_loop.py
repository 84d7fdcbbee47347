"""SISS as a plain loop, written from its published algorithm (2503.01034): what scripts/bench.py compares with.

One pass forward over the whole mixed batch, two passes back over all of it with the graph retained, gradients cloned
for each parameter, norms in a Python loop, and what is logged fetched from the device at every step.
"""

import math

import torch
from torch import Tensor


class ReferenceLoop:
    """`step(x, a, labels_x, labels_a)` makes one update of a diffusers UNet2DModel that predicts eps.

    Args:
        importance_sampling: False: without it (section 4): x and a are noised and passed forward on their own.
        tau: norm of the forget gradient.
    """

    def __init__(self, unet, alphas_cumprod: Tensor, importance_sampling: bool, lambd: float, tau: float, lr: float):
        self.unet, self.alphas_cumprod = unet, alphas_cumprod
        self.importance_sampling, self.lambd, self.tau = importance_sampling, lambd, tau
        self.optimizer = torch.optim.AdamW(unet.parameters(), lr, betas=(0.95, 0.999), weight_decay=1e-6)
        self.log: list[dict[str, float]] = []

    def step(self, x: Tensor, a: Tensor, labels_x: Tensor | None, labels_a: Tensor | None) -> None:
        b, device = len(x), x.device
        t = torch.randint(len(self.alphas_cumprod), (b,), device=device)
        gamma = self.alphas_cumprod[t].sqrt()[:, None, None, None]
        sigma = (1 - self.alphas_cumprod[t]).sqrt()[:, None, None, None]
        eps = torch.randn_like(x)

        if self.importance_sampling:
            from_a = torch.rand(b, device=device) < self.lambd
            pick = from_a[:, None, None, None]
            m = torch.where(pick, gamma * a + sigma * eps, gamma * x + sigma * eps)
            labels = None if labels_x is None else torch.where(from_a, labels_a, labels_x)
            prediction = self.unet(m, t, class_labels=labels).sample
            eps_x, eps_a = (m - gamma * x) / sigma, (m - gamma * a) / sigma
            log_x, log_a = (-part.square().flatten(1).sum(1) / 2 for part in (eps_x, eps_a))
            w_x = 1 / (1 - self.lambd + self.lambd * (log_a - log_x).exp())
            w_a = 1 / ((1 - self.lambd) * (log_x - log_a).exp() + self.lambd)
            loss_x = (w_x * (prediction - eps_x).square().flatten(1).sum(1)).mean()
            loss_a = (w_a * (prediction - eps_a).square().flatten(1).sum(1)).mean()
        else:
            prediction_x = self.unet(gamma * x + sigma * eps, t, class_labels=labels_x).sample
            prediction_a = self.unet(gamma * a + sigma * eps, t, class_labels=labels_a).sample
            loss_x, loss_a = ((part - eps).square().flatten(1).sum(1).mean() for part in (prediction_x, prediction_a))

        self.optimizer.zero_grad()
        loss_x.backward(retain_graph=True)
        gradients_x = {name: weight.grad.clone() for name, weight in self.unet.named_parameters()}
        self.optimizer.zero_grad()
        loss_a.backward()
        gradients_a = {name: weight.grad.clone() for name, weight in self.unet.named_parameters()}

        norm_x, norm_a = 0.0, 0.0
        for name in gradients_x:
            norm_x += gradients_x[name].norm().item() ** 2
            norm_a += gradients_a[name].norm().item() ** 2
        scale = self.tau / math.sqrt(norm_a)
        for name, weight in self.unet.named_parameters():
            weight.grad = gradients_x[name] - scale * gradients_a[name]
        total = torch.nn.utils.clip_grad_norm_(self.unet.parameters(), 1.0)
        self.optimizer.step()
        self.log.append(
            {
                "loss_x": loss_x.item(),
                "loss_a": loss_a.item(),
                "norm_x": math.sqrt(norm_x),
                "norm_a": math.sqrt(norm_a),
                "norm": total.item(),
            }
        )
