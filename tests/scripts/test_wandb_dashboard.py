"""The workspace without a login, and that docs/wandb.md says nothing that the installed wandb does not know."""

import json
import os
import re
import shlex
import subprocess
import sys

import pytest
import wandb_dashboard
import yaml
from conftest import ROOT

from unlearn_runner.comparison.packs import runs_in

DOCS = (ROOT / "docs" / "wandb.md").read_text()


def command(home, *arguments):
    """The script as somebody who has no login and no network."""
    hidden = {name: value for name, value in os.environ.items() if not name.startswith("WANDB")}
    environment = hidden | {"HOME": str(home), "WANDB_BASE_URL": "http://127.0.0.1:9"}
    script = str(ROOT / "scripts" / "wandb_dashboard.py")
    return subprocess.run([sys.executable, script, *arguments], capture_output=True, text=True, env=environment)


def test_dry_run_prints_the_workspace_without_a_login(tmp_path):
    pytest.importorskip("wandb_workspaces", reason="wandb-workspaces is not installed: pip install -e '.[dashboard]'")
    done = command(tmp_path, "--dry-run", "--project", "forgetting", "--entity", "me")
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout)
    assert (found["entity"], found["project"]) == ("me", "forgetting")
    spec = found["spec"]["section"]
    sections = spec["panelBankConfig"]["sections"]
    assert [section["name"] for section in sections] == ["Forgetting", "Retention", "Lambda", "Cost", "Samples"]
    assert [len(section["panels"]) for section in sections] == [12, 7, 6, 4, 1]
    assert spec["runSets"][0]["grouping"] == [{"section": "config", "name": "label.value"}]
    drawn = [panel["config"] for section in sections for panel in section["panels"]]
    assert ["eval/forget_rate"] in [config.get("metrics") for config in drawn]
    assert {"mediaKeys": list(wandb_dashboard.PICTURES)}.items() <= drawn[-1].items()


def test_saving_without_a_login_gets_one_sentence(tmp_path):
    pytest.importorskip("wandb_workspaces", reason="wandb-workspaces is not installed: pip install -e '.[dashboard]'")
    done = command(tmp_path, "--entity", "me")
    assert done.returncode == 1
    assert "wandb login" in done.stderr
    assert "Traceback" not in done.stderr


def test_what_it_draws_is_what_runs_log():
    """Final keys are in the published summaries; keys over steps and pictures are named where they are written."""
    packs = [dict(runs_in(file)) for file in (ROOT / "docs" / "runs").iterdir()]
    written = set().union(*(json.loads(run["summary.json"])["metrics"] for runs in packs for run in runs.values()))
    at_the_end = {key for keys in wandb_dashboard.AT_THE_END.values() for key in keys}
    assert at_the_end <= written
    over_steps = {key for keys in wandb_dashboard.OVER_STEPS.values() for key in keys} - written
    text = (ROOT / "docs" / "metrics.md").read_text()
    assert {key for key in over_steps if f"`{key}`" not in text} == set()
    record = (ROOT / "unlearn_runner" / "training" / "record.py").read_text()
    assert 'f"samples/{shown_as or name}"' in record
    assert "self.picture(step, found, picture, prefix)" in record
    assert '"samples/lambda"' in record
    assert {f"samples/{prefix}" for prefix in ("base", "oracle", "eval", "lambda")} == set(wandb_dashboard.PICTURES)


def wandb_lines():
    """The commands of the docs that begin with wandb, after variables and without comments."""
    lines = [line.strip().partition("  #")[0] for line in DOCS.splitlines() if line.startswith("    ")]
    found = [re.sub(r"^(\w+=\S+ )+", "", line) for line in lines]
    found += [line.partition("-exec ")[2] for line in lines if "-exec wandb" in line]
    return [line for line in found if line.startswith("wandb ")]


@pytest.mark.parametrize("line", wandb_lines())
def test_commands_in_the_docs_exist(line):
    from wandb.cli.cli import cli

    words = shlex.split(re.sub(r"<[^>]*>", "x", line))[1:]
    here = cli.commands[words.pop(0)]
    while words and hasattr(here, "commands") and words[0] in here.commands:
        here = here.commands[words.pop(0)]
    if hasattr(here, "commands"):  # `wandb leet PATH` is `wandb leet run PATH`
        here = here.commands["run"]
    known = {option for parameter in here.params for option in parameter.opts}
    assert {word for word in words if word.startswith("-")} <= known


def test_all_parts_of_the_docs_have_commands():
    assert {line.split()[1] for line in wandb_lines()} >= {"login", "sync", "sweep", "agent", "verify", "leet"}


def test_the_sweep_in_the_docs_gives_overrides_that_compose(composed):
    from wandb.sdk.launch.sweeps.utils import create_sweep_command, create_sweep_command_args

    (sweep,) = [yaml.safe_load(text) for text in re.findall(r"```yaml\n(.*?)```", DOCS, re.DOTALL)]
    assert (ROOT / sweep["program"]).is_file()
    values = {
        name: {"value": node["values"][0] if "values" in node else node["min"]}
        for name, node in sweep["parameters"].items()
    }
    chosen = create_sweep_command_args({"args": values})["args_no_hyphens"]
    words = create_sweep_command(list(sweep["command"]))
    assert words[-1] == "${args_no_hyphens}", "what the agent replaces by the values"
    overrides = [word for word in words if "=" in word] + chosen
    cfg = composed(*overrides, debug=False)
    assert (cfg["method"]["lambd"], cfg["method"]["rho"], cfg["seed"]) == (0.05, 0.02, 0)
    published = json.loads(dict(runs_in(ROOT / "docs" / "runs" / "digits_trousers.parquet"))["siss_0"]["summary.json"])
    assert sweep["metric"]["name"] in published["metrics"]


def test_settings_in_the_docs_compose(composed):
    """Every `python train.py` of the docs; of a grid its first point."""
    found = [line.strip().partition("  #")[0] for line in DOCS.splitlines() if line.startswith("    ")]
    commands = [line.partition("python train.py")[2] for line in found if "python train.py" in line]
    assert len(commands) >= 4
    for line in commands:
        words = [word for word in shlex.split(line) if word != "-m"]
        first = [word if "[" in word else word.partition(",")[0] for word in words]
        composed("logger=wandb", *first, debug=False)
