"""Pictures of a run's numbers."""

from math import exp
from pathlib import Path
from typing import Any

from unlearn_runner.methods.siss.lambda_controllers import AT_LEVEL


def draw_lambda(lines: list[dict[str, Any]], path: Path) -> bool:
    """A PNG of lambda over the steps and, where it depends on the timestep, over t; False if it never changed.

    `lines` are those of metrics.jsonl. The band is the inferred posterior's, one standard deviation of the logit on
    either side of its mean.
    """
    logged = [line for line in lines if "lambda/value" in line]
    values = [line.get("lambda/inferred", line["lambda/value"]) for line in logged]
    if len(set(values)) < 2:
        return False
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    levels = dict(sorted((float(key.removeprefix(AT_LEVEL)), key) for key in logged[-1] if key.startswith(AT_LEVEL)))
    figure = Figure(figsize=(10 if levels else 5, 3.2), layout="constrained")
    axes = figure.subplots(1, 2 if levels else 1, squeeze=False)[0]
    steps = [line["step"] for line in logged]
    axes[0].plot(steps, values, ".", markersize=2.5, label="lambda, mean of the batch")
    inferred = [line for line in logged if {"lambda/posterior_mean", "lambda/posterior_std"} <= line.keys()]
    if inferred:
        ends = [
            [1 / (1 + exp(-line["lambda/posterior_mean"] - sign * line["lambda/posterior_std"])) for line in inferred]
            for sign in (-1, 0, 1)
        ]
        at = [line["step"] for line in inferred]
        axes[0].fill_between(at, ends[0], ends[2], alpha=0.25, linewidth=0, label="posterior, one std")
        axes[0].plot(at, ends[1], linewidth=1, label="its mean")
    axes[0].set(xlabel="step", ylabel="lambda", ylim=(0, 1))
    axes[0].legend(fontsize=7)
    if levels:
        chosen = sorted({round(share * (len(logged) - 1)) for share in (0, 0.25, 0.5, 1)})
        for row in chosen:
            over_t = {level: logged[row][key] for level, key in levels.items() if key in logged[row]}
            axes[1].plot(list(over_t), list(over_t.values()), ".-", label=f"step {logged[row]['step']}")
        axes[1].set(xlabel="t / T", ylabel="lambda", xlim=(0, 1), ylim=(0, 1))
        axes[1].legend(fontsize=7)
    FigureCanvasAgg(figure).print_png(str(path))
    return True
