"""Make a saved workspace in a Weights & Biases project: what was forgotten and kept, lambda, cost, samples; by method.

    python scripts/wandb_dashboard.py --entity <you or your team>             # for the project unlearn_runner
    python scripts/wandb_dashboard.py --dry-run                               # print it as JSON; no login, no network

Needs `pip install 'unlearn_runner[dashboard]'` and, but for --dry-run, `wandb login`. docs/wandb.md says more.
"""

import sys
from typing import Any

from unlearn_runner.catalogue import COST, FORGETTING, RETENTION, In, keys
from unlearn_runner.comparison.choices import Parser
from unlearn_runner.errors import first_line


def eval_keys(about: str) -> tuple[str, ...]:
    """The headlines of the unlearned model."""
    return tuple(f"eval/{key}" for key in keys(In.SHORT, about))


# The keys that runs log over their steps, and those that stand in their summaries at the end.
OVER_STEPS = {
    "Forgetting": ("eval/forget_rate", "eval/restored_rate", "loss/forget"),
    "Retention": ("eval/retain_accuracy", "eval/fid_retain", "loss/retain"),
    "Lambda": (
        "lambda/value",
        "weights/ess_retain",
        "weights/ess_forget",
        "grad_norm/retain",
        "grad_norm/forget",
        "lambda/inferred",
    ),
}
AT_THE_END = {
    "Forgetting": (*eval_keys(FORGETTING), "reached/steps"),
    "Retention": (*eval_keys(RETENTION), "oracle_gap/fid_retain"),
    "Cost": (*keys(In.SHORT, COST), "cost/images"),
}
PICTURES = ("samples/base", "samples/oracle", "samples/eval", "samples/lambda")
TITLE = "What was forgotten, kept and paid"


def workspace(entity: str, project: str, name: str) -> Any:
    """The workspace, not saved yet. Lines are means of a method's runs, bands go from the lowest to the highest."""
    import wandb_workspaces.reports.v2 as panels
    import wandb_workspaces.workspaces as ws

    def line(key: str) -> Any:
        return panels.LinePlot(
            title=key, x="step", y=[key], groupby_aggfunc="mean", groupby_rangefunc="minmax", title_x="step"
        )

    def bar(key: str) -> Any:
        return panels.BarPlot(
            title=f"{key}, at the end", metrics=[panels.SummaryMetric(key)], groupby_aggfunc="mean",
            groupby_rangefunc="minmax",
        )  # fmt: skip

    sections = []
    for title in ("Forgetting", "Retention", "Lambda", "Cost"):
        drawn = [*map(bar, AT_THE_END.get(title, ())), *map(line, OVER_STEPS.get(title, ()))]
        if title == "Forgetting":
            ends = [panels.SummaryMetric(key) for key in ("eval/forget_rate", "eval/retain_accuracy")]
            drawn.insert(0, panels.ScatterPlot(title="forgetting against retention", x=ends[0], y=ends[1]))
        sections.append(ws.Section(name=title, panels=drawn, is_open=True))
    samples = panels.MediaBrowser(title="samples from the same noise", media_keys=list(PICTURES), num_columns=2)
    sections.append(ws.Section(name="Samples", panels=[samples], is_open=True))
    return ws.Workspace(
        entity=entity,
        project=project,
        name=name,
        sections=sections,
        settings=ws.WorkspaceSettings(x_axis="step", max_runs=100),
        runset_settings=ws.RunsetSettings(groupby=[ws.Config("label")]),
    )


def main() -> None:
    parser = Parser(__doc__)
    parser.add_argument("--project", default="unlearn_runner", help="as logger.project (default: %(default)s)")
    parser.add_argument("--entity", help="a user or a team; default: yours")
    parser.add_argument("--name", default=TITLE, help="the workspace's name (default: %(default)s)")
    parser.add_argument("--dry-run", action="store_true", help="print what would be saved as JSON")
    arguments = parser.parse_args()
    try:
        import wandb
        import wandb_workspaces.workspaces  # noqa: F401
    except ImportError:
        sys.exit("this needs the package wandb-workspaces: pip install 'unlearn_runner[dashboard]'.")
    if arguments.dry_run:
        made = workspace(arguments.entity or "<entity>", arguments.project, arguments.name)
        # The package has no public way to show what it would send.
        print(made._to_model().model_dump_json(by_alias=True, exclude_none=True, indent=2))
        return
    try:
        entity = arguments.entity or wandb.Api().default_entity
        made = workspace(entity, arguments.project, arguments.name)
        made.save()
    except Exception as error:  # what wandb, its server and its HTTP library raise
        sys.exit(f"Weights & Biases: {first_line(error)} Log in with `wandb login`; --dry-run needs none.")
    print(made.url)


if __name__ == "__main__":
    main()
