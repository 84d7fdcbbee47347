"""The whole command: what it leaves, that it repeats, resumes, survives signals, and refuses with one sentence."""

import json
import os
import re
import runpy
import shutil
import signal
import statistics
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import ROOT, assert_same_bits, weights_of
from PIL import Image

from unlearn_runner.comparison.pictures import cell_size
from unlearn_runner.errors import ConfigurationError, Interrupted, NonFiniteError
from unlearn_runner.schema import METRICS_VERSION
from unlearn_runner.training.run_folder import claim, config_hash


def command(*overrides: str, outputs: Path, cache: Path, timeout: float = 300, **more) -> subprocess.CompletedProcess:
    return subprocess.run(
        [sys.executable, str(ROOT / "train.py"), *overrides],
        capture_output=True,
        text=True,
        timeout=timeout,
        env=environment(outputs, cache),
        **more,
    )


def environment(outputs: Path, cache: Path) -> dict[str, str]:
    return {
        **os.environ,
        "UNLEARN_RUNNER_OUTPUTS": str(outputs),
        "UNLEARN_RUNNER_CACHE": str(cache),
        "WANDB_MODE": "offline",
        "OMP_NUM_THREADS": str(torch.get_num_threads()),
    }


def runs_below(outputs: Path) -> list[Path]:
    return sorted(path.parent for path in outputs.glob("*/*/*/summary.json"))


def summary(folder: Path) -> dict:
    return json.loads((folder / "summary.json").read_text())


def lines(folder: Path) -> list[dict]:
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


def timeless(line: dict) -> dict:
    return {key: value for key, value in line.items() if key.split("/")[-1] != "seconds"}


@pytest.fixture(scope="module")
def whole(tmp_path_factory, shared_cache):
    """One run of the command with W&B, offline."""
    outputs = tmp_path_factory.mktemp("outputs")
    done = command("debug=default", "evaluation.oracle=true", outputs=outputs, cache=shared_cache)
    assert done.returncode == 0, done.stderr
    (folder,) = runs_below(outputs)
    return folder, done


def test_leaves_the_run_folder_of_the_contract(whole):
    folder, done = whole
    assert re.fullmatch(r"\d{4}-\d\d-\d\d/digits_trousers-posterior/\d\d-\d\d-\d\d", "/".join(folder.parts[-3:]))
    for name in ("config.yaml", "metrics.jsonl", "summary.json", "samples/before.png", "samples/after.png",
                 "samples/oracle.png", "samples/step_000002.png", "model/model_index.json"):  # fmt: skip
        assert (folder / name).is_file(), name
    assert not (folder / "checkpoints").exists(), "a finished run keeps them only if asked to"
    content = summary(folder)
    assert content["status"] == "finished"
    metrics = content["metrics"]
    for prefix in ("base", "eval", "oracle", "oracle_gap"):
        for name in ("forget_rate", "restored_rate", "retain_accuracy", "is_retain", "ssim_forget"):
            assert f"{prefix}/{name}" in metrics
    for name in ("seconds", "images", "network_evaluations", "peak_memory_gb"):
        assert metrics[f"cost/{name}"] > 0
    assert content["provenance"]["evaluation"]["features"]["extractor"].startswith("classifiers/")
    assert content["provenance"]["environment"]["packages"]["torch"] == torch.__version__.split("+")[0]
    assert content["provenance"]["evaluation"]["data"]["name"] == "digits_trousers"
    assert lines(folder)[0] == {"step": 0, "version": METRICS_VERSION}
    steps = [line["step"] for line in lines(folder)]
    assert steps == sorted(steps)
    logged = [line for line in lines(folder) if "loss/forget" in line]
    assert [line["step"] for line in logged] == [1, 2, 3, 4]
    assert {"seconds", "images", "loss/retain", "grad_norm/update"} <= set(logged[0])
    for word in ("metric", "before", "after", "change", "forget_rate", str(folder.name)):
        assert word in done.stdout


def test_first_look_with_little_enough_is_scored(run, composed, tmp_path):
    """In the run's scores and lines, also after a resumption; nothing where no look finds it."""
    from unlearn_runner import assembly

    overrides = (
        "experiment=digits_trousers_lambda", "method=adaptive_siss", "evaluation.relearning=null",
        "evaluation.metrics.nll=null", "evaluation.metrics.mia=null",
        "trainer.max_steps=5", "trainer.checkpointing_steps=3", *KEPT,
    )  # fmt: skip
    whole = run(*overrides, "evaluation.threshold=1.0", folder="whole")
    metrics = summary(whole)["metrics"]
    assert metrics["reached/steps"] == 2.0
    assert 0 < metrics["reached/seconds"] < metrics["cost/seconds"]
    assert 0 < metrics["reached/network_evaluations"] < metrics["cost/network_evaluations"]
    assert {"reached/forget_rate", "reached/restored_rate", "reached/retain_accuracy", "reached/fid_retain",
            "reached/kid_retain"} <= set(metrics)  # fmt: skip
    assert [line["step"] for line in lines(whole) if "reached/steps" in line] == [2]
    assert (whole / "samples" / "lambda.png").is_file()
    looks = [line for line in lines(whole) if line["step"] == 2 and "eval/forget_rate" in line]
    assert looks
    assert "eval/retain_accuracy" not in looks[0], "this experiment looks at the forget condition alone"

    break_off(whole, "step_000005")
    fresh = tmp_path / "outputs" / "fresh"
    fresh.mkdir()
    assembly.unlearn(composed(*overrides, "evaluation.threshold=1.0", f"resume_from_checkpoint={whole}"), fresh)
    again = summary(whole)["metrics"]
    assert {key: again[key] for key in metrics if "reached" in key} == {
        key: value for key, value in metrics.items() if "reached" in key
    }

    never = run(*overrides, "evaluation.threshold=null", folder="never")
    assert not [key for key in summary(never)["metrics"] if "reached" in key]


@pytest.mark.parametrize("method", ["siss", "posterior"])
def test_several_classes_are_forgotten_in_one_run(run, capsys, method):
    folder = run("dataset=digits", "dataset.forget_class=[3,7]", f"method={method}")
    content = summary(folder)
    metrics = content["metrics"]
    assert content["status"] == "finished"
    for prefix in ("base", "eval"):
        apart = [metrics[f"{prefix}/per_class/forget_rate/{digit}"] for digit in (3, 7)]
        assert metrics[f"{prefix}/forget_rate"] == pytest.approx(sum(apart) / 2)
    assert content["provenance"]["evaluation"]["forget_rows"] == [3, 7]
    titles = content["provenance"]["evaluation"]["row_titles"]
    assert titles == ["0", "1", "2", "3 (forget)", "4", "5", "6", "7 (forget)", "8", "9"]
    with Image.open(folder / "samples" / "after.png") as picture:
        grid = np.asarray(picture)
    width, size = (
        int((grid[0, :, 0] < 200).sum()),
        cell_size(grid),
    )  # above the pictures is grey, above the titles white
    assert width % size == 2 and len(grid) == 2 + 10 * size
    for row in range(10):
        title = grid[2 + row * size : 2 + (row + 1) * size, width:]
        assert title.min() < 50 and title.max() == 255
    assert "forget_class:\n  - 3\n  - 7\n" in (folder / "config.yaml").read_text()
    printed = capsys.readouterr().out
    assert all(f"per_class/forget_rate/{digit}" in printed for digit in (3, 7))


def test_wandb_file_can_be_read_back(whole):
    folder, _ = whole
    (file,) = folder.glob("wandb/offline-run-*/run-*.wandb")
    read = subprocess.run(
        [sys.executable, "-m", "wandb", "leet", "inspect", "--json", str(file)],
        capture_output=True, text=True, timeout=120,
    )  # fmt: skip
    if "No such command" in read.stderr:
        pytest.skip("this wandb has no `leet inspect`")
    assert read.returncode == 0, read.stderr
    for key in ("loss/forget", "eval/forget_rate", "base/forget_rate", "digits_trousers-posterior", "samples/base"):
        assert key in read.stdout, key
    assert (folder / "wandb" / "run_id").read_text() in file.name


def test_model_loads_with_diffusers(whole):
    from diffusers import DDPMPipeline

    folder, _ = whole
    pipeline = DDPMPipeline.from_pretrained(folder / "model")
    assert pipeline.unet.config.num_class_embeds == 10
    assert pipeline.scheduler.config.num_train_timesteps == 1000


def test_saved_configuration_makes_the_run_again(whole, shared_cache, tmp_path):
    folder, _ = whole
    again = command(
        "--config-path", str(folder), "--config-name", "config", "logger.mode=disabled",
        f"hydra.run.dir={tmp_path / 'again'}", outputs=tmp_path, cache=shared_cache,
    )  # fmt: skip
    assert again.returncode == 0, again.stderr
    assert_same_bits(weights_of(tmp_path / "again"), weights_of(folder))


def test_same_seed_same_bits_other_seed_other_bits(run):
    a, b, c = run(folder="a"), run(folder="b"), run("seed=1", folder="c")
    assert_same_bits(weights_of(a), weights_of(b))
    assert [timeless(line) for line in lines(a)] == [timeless(line) for line in lines(b)]
    assert any(not torch.equal(x, weights_of(a)[key]) for key, x in weights_of(c).items())


@pytest.mark.parametrize("method", ["naive_deletion", "retrain", "neg_grad", "erase_diff", "siss_no_is"])
def test_every_method_runs_whole(run, method):
    metrics = summary(run(f"method={method}"))["metrics"]
    assert "eval/forget_rate" in metrics


def test_retrain_starts_from_scratch(run):
    """Its weights have nothing of the base's, whose neighbourhood a few steps of SISS do not leave."""
    retrained, unlearned = weights_of(run("method=retrain", "seed=5", folder="a")), weights_of(run(folder="b"))
    far, near = (torch.cat([w.flatten() for k, w in x.items() if "conv" in k]) for x in (retrained, unlearned))
    assert torch.corrcoef(torch.stack([far, near]))[0, 1] < 0.9


def test_resumed_run_equals_the_uninterrupted_one(run, composed, tmp_path):
    whole = run(*KEPT, folder="whole")
    broken = tmp_path / "outputs" / "broken"
    shutil.copytree(whole, broken)
    break_off(broken, "step_000004")
    (tmp_path / "outputs" / "fresh").mkdir()
    from unlearn_runner import assembly

    assembly.unlearn(composed(*KEPT, f"resume_from_checkpoint={broken}"), tmp_path / "outputs" / "fresh")
    assert not any((tmp_path / "outputs" / "fresh").iterdir()), "a resumed run goes on in its own folder"
    assert_same_bits(weights_of(broken), weights_of(whole))
    assert [timeless(line) for line in lines(broken)] == [timeless(line) for line in lines(whole)]
    assert summary(broken)["status"] == "finished"


KEPT = ("trainer.checkpoints_total_limit=null", "trainer.keep_checkpoints=true")


def break_off(folder: Path, *checkpoints: str) -> None:
    """Make a finished run one that was killed before these checkpoints were written."""
    for name in checkpoints:
        shutil.rmtree(folder / "checkpoints" / name)
    shutil.rmtree(folder / "model")
    (folder / "summary.json").write_text(json.dumps(summary(folder) | {"status": "running"}))


def in_training(*settings: str, outputs: Path, cache: Path) -> subprocess.Popen:
    """The command in a process of its own, which has logged a step of training."""
    process = subprocess.Popen(
        [sys.executable, str(ROOT / "train.py"), *settings],
        env=environment(outputs, cache), stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
    )  # fmt: skip
    deadline = time.monotonic() + 120
    while time.monotonic() < deadline:
        found = runs_below(outputs)
        if found and '"loss/forget"' in (found[0] / "metrics.jsonl").read_text():
            break
        time.sleep(0.05)
    return process


def test_signal_finishes_the_step_and_the_printed_command_goes_on(run, tmp_path, shared_cache):
    """SIGTERM in the middle of training, in a folder of an odd name. What is printed runs as it is, and continues in
    the same folder; the result is the uninterrupted one.
    """
    settings = ("trainer.max_steps=60", "evaluation.every=null", "trainer.checkpointing_steps=null")
    outputs = tmp_path / "a[/b] :smile: c=é,'{x}'"
    process = in_training("debug=default", "logger=jsonl", *settings, outputs=outputs, cache=shared_cache)
    for _ in range(3):
        process.send_signal(signal.SIGTERM)
    said, _ = process.communicate(timeout=60)
    assert process.returncode == 130, said
    (folder,) = runs_below(outputs)
    assert summary(folder)["status"] == "interrupted"
    assert 0 < lines(folder)[-1]["step"] < 60

    printed = said.split("interrupted; go on with: ")[1].splitlines()[0]
    again = subprocess.run(
        printed.replace("python", sys.executable, 1), shell=True, capture_output=True, text=True,
        env=environment(outputs, shared_cache),
    )  # fmt: skip
    assert again.returncode == 0, again.stderr
    assert list(outputs.glob("*/*/*")) == [folder], "in the same folder, and no empty one is left"
    assert summary(folder)["status"] == "finished"
    assert "resume_from_checkpoint: null" in (folder / "config.yaml").read_text()
    assert [line["step"] for line in lines(folder) if "loss/forget" in line] == list(range(1, 61))
    assert_same_bits(weights_of(folder), weights_of(run(*settings)))


def test_latest_goes_on_or_begins(run, composed, tmp_path):
    """With the newest unfinished run of this configuration in its folder, or anew where there is none."""
    from unlearn_runner import assembly

    outputs = tmp_path / "outputs"
    whole = run(*KEPT, folder="whole")
    for folder in ("anew", "fresh"):
        (outputs / folder).mkdir()
    latest = composed(*KEPT, "resume_from_checkpoint=latest")
    assert assembly.unlearn(latest, outputs / "anew") == outputs / "anew", "one that has finished is not gone on with"
    break_off(whole, "step_000004")
    assert assembly.unlearn(latest, outputs / "fresh") == whole
    assert not any((outputs / "fresh").iterdir())
    assert_same_bits(weights_of(whole), weights_of(outputs / "anew"))


def test_an_interrupted_look_leaves_a_checkpoint_and_what_was_spent(run, tmp_path, monkeypatch):
    """Whoever owns the trainer has it saved before the record is closed, wherever the interruption came."""
    from unlearn_runner.training.recorder import RunRecorder

    look, settings = RunRecorder.evaluate, ("evaluation.every=2", "trainer.checkpointing_steps=null")

    def interrupted(self, clock, model):
        look(self, clock, model)
        raise Interrupted("SIGTERM received")

    monkeypatch.setattr(RunRecorder, "evaluate", interrupted)
    with pytest.raises(Interrupted):
        run(*settings, folder="first")
    folder = tmp_path / "outputs" / "first"
    found = summary(folder)
    assert found["status"] == "interrupted"
    assert [path.name for path in (folder / "checkpoints").glob("step_*")] == ["step_000002"]
    assert lines(folder)[-1]["step"] == 2 and "loss/forget" in lines(folder)[-1], "nothing of the look is left"
    spent = found["metrics"]["cost/images"]

    monkeypatch.setattr(RunRecorder, "evaluate", look)
    run(f"resume_from_checkpoint={folder}", *settings, folder="unused")
    whole = run(*settings, folder="whole")
    assert_same_bits(weights_of(folder), weights_of(whole))
    assert summary(folder)["metrics"]["cost/images"] == summary(whole)["metrics"]["cost/images"] == 2 * spent
    assert list(summary(folder)["metrics"]) == list(summary(whole)["metrics"])


def test_non_finite_loss_stops_the_run(run, tmp_path):
    with pytest.raises(NonFiniteError, match=r"became (nan|inf|-inf) at step \d"):
        run("method=neg_grad", "method.update.optimizer.lr=1e30", "trainer.checkpointing_steps=1", folder="bad")
    content = summary(tmp_path / "outputs" / "bad")
    assert content["status"] == "diverged"
    assert "at step" in content["error"]
    kept = list((tmp_path / "outputs" / "bad" / "checkpoints").glob("step_*"))
    assert [path.name for path in kept] == ["step_000001"], "the last good checkpoint is kept"


def test_failing_evaluation_loses_nothing(run, tmp_path, monkeypatch):
    from unlearn_runner.evaluation.evaluator import Evaluator

    original, calls = Evaluator.__call__, []

    def fails_at_the_end(self, model, before=None):
        calls.append(1)
        if before is not None:
            raise RuntimeError("metric broke")
        return original(self, model, before)

    monkeypatch.setattr(Evaluator, "__call__", fails_at_the_end)
    with pytest.raises(RuntimeError, match="metric broke"):
        run(folder="bad")
    folder = tmp_path / "outputs" / "bad"
    assert weights_of(folder)
    assert summary(folder)["status"] == "failed"
    assert (folder / "checkpoints" / "step_000004").is_dir()

    monkeypatch.setattr(Evaluator, "__call__", original)
    run(f"resume_from_checkpoint={folder}", folder="unused")
    assert summary(folder)["status"] == "finished"
    assert "eval/fid_retain" in summary(folder)["metrics"], "only the evaluation is made up for"


def test_the_whole_evaluation(run, tmp_path):
    """Every metric of evaluation=full, with intervals, an oracle and relearning, on a model that knows nothing."""
    folder = run("evaluation=full", "evaluation.oracle=true", "evaluation.bootstrap=20")
    content = summary(folder)
    wanted = {
        "forget_rate", "restored_rate", "retain_accuracy", "fid_forget", "fid_retain", "kid_forget", "kid_retain",
        "precision_retain", "recall_retain", "is_forget", "is_retain", "ssim_forget", "ssim_retain", "nll_forget",
        "nll_retain", "nll_bound_forget", "nll_bound_retain", "mia_auc", "mia_tpr_at_1pct_fpr",
    }  # fmt: skip
    for prefix in ("base", "eval", "oracle", "oracle_gap"):
        assert {f"{prefix}/{name}" for name in wanted} <= set(content["metrics"])
    for prefix in ("eval", "oracle", "oracle_gap"):
        assert f"{prefix}/relearn_steps" in content["metrics"]
    for prefix in ("base", "eval", "oracle"):
        for name in wanted - {"kid_forget", "kid_retain", "recall_retain"}:
            low, high = content["intervals"][f"{prefix}/{name}"]
            assert low <= high
    assert content["metrics"]["cost/evaluation_seconds"] > content["metrics"]["cost/sampling_seconds"] > 0
    assert {"sampling", "judging", "nll", "mia", "bootstrap"} <= set(content["provenance"]["evaluation"]["seconds"])


SEEDS = "evaluation.oracle_seeds=[0,1,2]"


def test_several_oracles_and_the_distance_in_units_of_their_spread(run, shared_cache, capsys):
    folder = run("method=siss", SEEDS)
    said = capsys.readouterr().out
    content = summary(folder)
    metrics, oracles = content["metrics"], content["oracles"]
    assert [oracle["seed"] for oracle in oracles] == [0, 1, 2]
    assert len({oracle["digest"] for oracle in oracles}) == 3
    for name in ("fid_retain", "forget_rate", "retain_accuracy", "ssim_retain"):
        scores = [oracle["metrics"][name] for oracle in oracles]
        assert metrics[f"oracle/{name}"] == pytest.approx(statistics.mean(scores))
        assert metrics[f"oracle_std/{name}"] == pytest.approx(statistics.stdev(scores))
        away = metrics[f"eval/{name}"] - metrics[f"oracle/{name}"]
        assert metrics[f"oracle_gap/{name}"] == pytest.approx(abs(away))
        meant = "ssim" not in name and "fid_base" not in name  # no oracle is to draw what the base draws
        assert (f"gap_z/{name}" in metrics) == (meant and len(set(scores)) > 1)
    away = metrics["eval/fid_retain"] - metrics["oracle/fid_retain"]
    assert metrics["gap_z/fid_retain"] == pytest.approx(away / metrics["oracle_std/fid_retain"])
    for name in ("oracle", "oracle_2", "oracle_3"):
        assert (folder / "samples" / f"{name}.png").is_file()
    (head,) = (line for line in said.splitlines() if "metric" in line and "before" in line)
    assert [title.strip() for title in head.split("┃")][4:6] == ["oracle", "z"]
    (row,) = (line for line in said.splitlines() if "fid_retain" in line and "│" in line)
    assert f"{metrics['oracle/fid_retain']:.3f} ± {metrics['oracle_std/fid_retain']:.3f}" in row
    assert f"{metrics['gap_z/fid_retain']:+.1f}" in row
    assert "z: distance from the mean of the 3 oracles" in said

    trained = {path.name for path in (shared_cache / "oracles").iterdir()}
    one = summary(run("method=siss", "model.pretraining.seed=1", "evaluation.oracle=true", folder="one"))
    assert [oracle["digest"] for oracle in one["oracles"]] == [oracles[1]["digest"]]
    assert {path.name for path in (shared_cache / "oracles").iterdir()} == trained, "a base of seed 1 has this oracle"
    assert not [key for key in one["metrics"] if key.startswith(("oracle_std/", "gap_z/"))]
    single = summary(run("method=siss", "evaluation.oracle_seeds=[2]", folder="single"))
    assert [oracle["digest"] for oracle in single["oracles"]] == [oracles[2]["digest"]]
    assert single["metrics"]["oracle/fid_retain"] == oracles[2]["metrics"]["fid_retain"]
    assert not [key for key in single["metrics"] if key.startswith(("oracle_std/", "gap_z/"))]


def test_an_oracle_relearns_once_for_all_runs_with_the_same_base(run, capsys):
    def relearnt(method, max_steps):
        folder = run(
            f"method={method}", "evaluation=full", "evaluation.oracle=true", "evaluation.metrics.nll=null",
            "evaluation.metrics.mia=null", "evaluation.relearning.every=1",
            f"evaluation.relearning.max_steps={max_steps}", folder=f"{method}_{max_steps}",
        )  # fmt: skip
        scores = {key: value for key, value in summary(folder)["metrics"].items() if key.startswith("oracle/")}
        return scores, "relearning (the oracle" in capsys.readouterr().out

    first, said = relearnt("siss", 3)
    assert said
    assert first["oracle/relearn_steps"] <= 3
    assert relearnt("naive_deletion", 3) == (first, False)
    more, said = relearnt("naive_deletion", 2)
    assert said, "another question"
    shared = {key for key in more if "per_step/relearn" in key}
    assert shared
    assert {key: more[key] for key in shared} == {key: first[key] for key in shared}


def test_a_run_that_is_interrupted_between_two_oracles_goes_on(run, tmp_path, monkeypatch):
    """Each oracle is scored once, and the scores are those of a run that was not interrupted."""
    from unlearn_runner.evaluation.evaluator import Evaluator

    settings = ("method=siss", SEEDS, f"paths.cache={tmp_path / 'apart'}")
    whole = run(*settings, folder="whole")
    shutil.rmtree(tmp_path / "apart" / "evaluations")
    once, measured = Evaluator.once, Evaluator.__call__
    calls, scored = [], []

    def interrupted_at_the_third(self, model, before=None):
        calls.append(model)
        if len(calls) == 4:  # the base's comes first
            raise Interrupted("SIGTERM")
        return once(self, model, before)

    def counted(self, model, before=None):
        scored.append(model)
        return measured(self, model, before)

    monkeypatch.setattr(Evaluator, "once", interrupted_at_the_third)
    with pytest.raises(Interrupted):
        run(*settings, folder="broken")
    folder = tmp_path / "outputs" / "broken"
    assert summary(folder)["status"] == "interrupted"
    assert "oracles" not in summary(folder)
    assert not [key for line in lines(folder) for key in line if key.startswith("oracle")]

    monkeypatch.setattr(Evaluator, "once", once)
    monkeypatch.setattr(Evaluator, "__call__", counted)
    run(*settings, f"resume_from_checkpoint={folder}", folder="unused")
    assert len(scored) == 2, "the unlearned model, and the oracle that was not scored before"
    again, wanted = summary(folder), summary(whole)
    assert again["status"] == "finished"
    assert again["oracles"] == wanted["oracles"]
    for prefix in ("oracle/", "oracle_std/", "gap_z/", "oracle_gap/"):
        found = [{key: value for key, value in each["metrics"].items() if key.startswith(prefix)}
                 for each in (again, wanted)]  # fmt: skip
        assert found[0]
        assert found[0] == found[1]
    assert len([line for line in lines(folder) if "oracle/fid_retain" in line]) == 1


def test_oracles_of_ones_own(run, composed, shared_cache, tmp_path):
    """A run's folder or a model's; none is trained; one that cannot be used is refused before anything is made."""
    own = run("method=retrain", folder="own")
    other = run("method=retrain", "seed=1", folder="other")
    there = {path.name for path in (shared_cache / "oracles").glob("*")}
    found = summary(run("method=siss", f"evaluation.oracle=[{own},{other / 'model'}]", folder="both"))
    assert [oracle["folder"] for oracle in found["oracles"]] == [str(own), str(other / "model")]
    assert {path.name for path in (shared_cache / "oracles").glob("*")} == there
    for oracle, folder in zip(found["oracles"], (own, other), strict=True):
        same = {name: value for name, value in oracle["metrics"].items() if name in ("fid_retain", "forget_rate")}
        assert same == pytest.approx({name: summary(folder)["metrics"][f"eval/{name}"] for name in same})
    assert "gap_z/fid_retain" in found["metrics"]
    moved = tmp_path / "moved"
    shutil.copytree(own / "model", moved)
    alone = summary(run("method=siss", f"evaluation.oracle={moved}", folder="alone"))
    assert alone["oracles"][0]["digest"] == found["oracles"][0]["digest"], "wherever it lies"
    assert "oracle/fid_retain" in alone["metrics"]
    assert "gap_z/fid_retain" not in alone["metrics"]

    empty = f"paths.cache={tmp_path / 'empty'}"
    for wrong, sentence in (
        (["dataset.conditional=false"], r"describes another network: num_class_embeds is 10, not None"),
        (["model.network.norm_num_groups=4"], r"describes another network: norm_num_groups is 8, not 4"),
        (["model=vae"], r"expected a model of the base's architecture"),
    ):
        with pytest.raises(ConfigurationError, match=f"evaluation.oracle={moved}.*{sentence}"):
            run("method=siss", f"evaluation.oracle={moved}", empty, *wrong, folder="refused")
    with pytest.raises(ConfigurationError, match="holds the same model as"):
        composed("method=siss", f"evaluation.oracle=[{own},{moved}]")
    assert not (tmp_path / "empty").exists()


def test_an_oracle_with_a_weight_that_is_not_finite_is_refused_before_unlearning(run, tmp_path):
    from safetensors.torch import load_file, save_file

    own = run("method=retrain", folder="own")
    (file,) = (own / "model").rglob("*.safetensors")
    weights = load_file(file)
    weights["conv_in.bias"][0] = torch.nan
    save_file(weights, file, {"format": "pt"})
    with pytest.raises(ConfigurationError, match=rf"evaluation.oracle={own}: .*the oracle"):
        run("method=siss", f"evaluation.oracle={own}", folder="refused")
    assert "base/fid_retain" not in summary(tmp_path / "outputs" / "refused")["metrics"]


def test_a_configuration_from_before_oracle_seeds_makes_a_run(composed):
    from unlearn_runner.assembly import build_parts
    from unlearn_runner.validation import checked

    cfg = composed("method=siss", "evaluation.oracle=true", "objective=oracle_gap/fid_retain")
    del cfg["evaluation"]["oracle_seeds"]
    assert build_parts(checked(cfg)).evaluation.seeds_of_oracles(3) == [3]


def test_a_vae_has_the_whole_evaluation_and_keeps_its_encoder(run):
    full = run("model=vae", "evaluation=full", "evaluation.oracle=true", folder="full")
    metrics = summary(full)["metrics"]
    wanted = {
        "forget_rate", "retain_accuracy", "fid_retain", "ssim_retain", "nll_forget", "nll_retain", "nll_bound_forget",
        "nll_bound_retain", "mia_auc", "mia_tpr_at_1pct_fpr",
    }  # fmt: skip
    for prefix in ("base", "eval", "oracle", "oracle_gap"):
        assert {f"{prefix}/{name}" for name in wanted} <= set(metrics)
    assert not [key for key in metrics if "per_timestep" in key]
    assert "eval/relearn_steps" in metrics

    deleted, retrained = (weights_of(run("model=vae", f"method={m}", folder=m)) for m in ("naive_deletion", "retrain"))
    unlearned = weights_of(full)
    moved = {key.split(".")[0] for key, weight in unlearned.items() if not torch.equal(weight, deleted[key])}
    assert moved == {"decoder"}, "encoder and sigma are the base's"
    moved = {key.split(".")[0] for key, weight in unlearned.items() if not torch.equal(weight, retrained[key])}
    assert moved == {"encoder", "decoder", "log_sigma"}


def test_deletion_steps_are_the_first_look_without_the_content(run, tmp_path, monkeypatch):
    from unlearn_runner.evaluation.metrics import Rates

    original, rates = Rates.score, iter([0.5, 0.25, 0.0, 0.5, 0.0])  # base, three looks on the way, after

    def known(self, samples, rows):
        return original(self, samples, rows) | {"forget_rate": next(rates)}

    monkeypatch.setattr(Rates, "score", known)
    # other metrics than other tests, so that no cached evaluation of the base is met
    folder = run("evaluation.every=1", "evaluation.metrics.ssim=null", "evaluation.metrics.kid=null")
    assert summary(folder)["metrics"]["eval/deletion_steps"] == 2
    assert "eval/lasting_deletion_steps" not in summary(folder)["metrics"], "it came back"

    rates = iter([0.0, 0.5, 0.0, 0.0])  # the base's scores are cached by now
    folder = run("evaluation.every=1", "evaluation.metrics.ssim=null", "evaluation.metrics.kid=null", folder="again")
    assert summary(folder)["metrics"]["eval/deletion_steps"] == 1
    assert summary(folder)["metrics"]["eval/lasting_deletion_steps"] == 3

    rates = iter([0.0] * 5)  # also of the base
    folder = run("evaluation.every=1", "evaluation.metrics.ssim=null", "evaluation.metrics.prc=null", folder="nothing")
    assert "eval/deletion_steps" not in summary(folder)["metrics"]


@pytest.mark.slow  # test_cache.py has it of one entry
def test_parallel_jobs_make_one_base(tmp_path):
    """Two commands at once with an empty cache: one trains base and classifier, the other waits and reads."""
    outputs, cache = tmp_path / "outputs", tmp_path / "cache"
    jobs = [
        subprocess.Popen(
            [sys.executable, str(ROOT / "train.py"), "debug=default", "logger=jsonl", f"seed={seed}"],
            env=environment(outputs, cache), stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
        )
        for seed in (0, 1)
    ]  # fmt: skip
    said = [job.communicate(timeout=240)[0] for job in jobs]
    assert [job.returncode for job in jobs] == [0, 0], said
    assert len([1 for text in said if "training the base model" in text]) == 1
    assert len([path for path in (cache / "bases").iterdir() if path.is_dir()]) == 1
    assert len(runs_below(outputs)) == 2, "two folders, though begun in the same second"


@pytest.mark.slow  # test_sweeps.py has the same of more
def test_multirun_makes_a_folder_each(tmp_path, shared_cache):
    done = command(
        "-m", "debug=default", "logger=jsonl", "method.lambd=0.3,1.3", "seed=0,1",
        outputs=tmp_path, cache=shared_cache,
    )  # fmt: skip
    assert done.returncode == 1, "a job that fails is reported"
    assert (
        "method.lambd must be a number in [0, 1] or a group of options that makes a LambdaController, got 1.3"
        in done.stderr
    )
    assert [summary(folder)["status"] for folder in runs_below(tmp_path)] == ["finished"] * 2, "the others finish"


def test_folders_do_not_collide(tmp_path):
    wanted = tmp_path / "12-00-00"
    assert [claim(wanted).name for _ in range(3)] == ["12-00-00", "12-00-00-2", "12-00-00-3"]


def test_config_hash_is_of_what_changes_the_result(composed):
    assert config_hash(composed("resume_from_checkpoint=latest")) == config_hash(composed())
    assert config_hash(composed("logger=wandb")) == config_hash(composed())
    assert config_hash(composed("seed=1")) != config_hash(composed())


@pytest.mark.parametrize(
    "overrides, sentence",
    [
        (["method=sis"], r"method=sis: there is no such option; near it: siss"),
        (["dataset=digit"], r"dataset=digit: there is no such option; near it: digits"),
        (
            ["dataset=sd_concepts", "dataset/concepts@dataset=celebrity"],
            r"dataset/concepts@dataset: there is no such group of options; did you mean dataset=celebrity\?",
        ),
        (["trainer.max_step=3"], r"trainer\.max_step: there is no such option; near it: max_steps"),
        (["method.lambd=1.5"], r"^method\.lambd must be a number in \[0, 1\], got 1\.5\.$"),
        (["method=siss", "method.lambd=1.5"], r"method\.lambd must be a number in \[0, 1\] or .*, got 1\.5"),
        (["model=vae", "method=erase_diff"], r"method=erase_diff needs a diffusion model"),
        (["model=vae", "model.network.norm_num_groups=7"], r"divide by norm_num_groups=7, got \[16, 32\]"),
        (["method=siss", "method.tau=1.0"], r"give method\.tau or method\.rho, not both"),
        (["trainer.max_steps=0"], r"trainer\.max_steps must be a whole number above 0, got 0"),
        (["dataset=cifar10", "dataset.source=./nowhere"], r"dataset\.source=\./nowhere: there is no such folder"),
        (["dataset=image_folder"], r"dataset\.forget_dir is missing: give it, dataset\.forget_dir=\.\.\."),
        (["dataset=image_folder", "dataset.forget_dir=/nowhere", "dataset.retain_dir=."], r"no such folder"),
        (["dataset.contamination=1.0"], r"dataset\.contamination must be a number in \(0, 0\.99\], got 1\.0"),
        (["resume_from_checkpoint=/nowhere"], r"found no checkpoint there"),
        (["model.weights=./nowhere"], r"model\.weights=\./nowhere: there is no such folder"),
        (["method=given"], r"method\.weights is missing: give it, method\.weights=\.\.\."),
        (["method=given", "method.weights=./nowhere"], r"method\.weights=\./nowhere: there is no such folder"),
        (["hardware=single_gpu"], r"torch finds none here"),
        (["logger.mode=sometimes"], r"must be online, offline, disabled or shared"),
        (["evaluation.num_samples=-1"], r"evaluation\.num_samples must be a whole number above 0, got -1"),
        (["evaluation.num_samples=10"], r"evaluation\.metrics\.fid needs at least 20 samples .* gives 10"),
        (["evaluation.features=resnet"], r"evaluation\.features must be one of classifier, inception, efficientnet, "),
        (["evaluation.bootstrap=3"], r"evaluation\.bootstrap must be a whole number of at least 20 or null, got 3"),
        (["experiment=mnist_trouser"], r"experiment=mnist_trouser: there is no such option; near it: mnist_trousers"),
        (["experiment=null"], r"a group needs one of its options, got null"),
        (["+method.lambda=0.5"], r"method\.lambda: Posterior has no such option; near it: lambd"),
        (["~method"], r"~method: no run goes without"),
        (["~objective"], r"~objective: there is nothing to take away: no such option, or it is null"),
        (["method=siss", "method/lambd=blend"], r"method/lambd: this method has no such .*: method=adaptive_siss"),
        (["hydra.run.dir=null"], r"hydra\.run\.dir: field 'hydra\.run\.dir' is not Optional"),
        (["seed=1,2"], r"seed=1,2: several values are a sweep, python train\.py -m .* a list 'seed=\[1,2\]'"),
        (["--method", "siss"], r"--method: there is no such option of the command; .* as in method=siss"),
        (["hardware=gpu"], r"hardware=gpu: there is no such option; near it: multi_gpu, single_gpu, cpu"),
    ],
)  # fmt: skip
def test_mistakes_get_one_sentence(tmp_path, refused, overrides, sentence):
    if overrides == ["hardware=single_gpu"] and torch.cuda.is_available():
        pytest.skip("there is a GPU")
    said = refused("debug=default", *overrides)
    assert re.search(sentence, said), said
    assert "Traceback" not in said
    assert not (tmp_path / "c").exists(), "nothing is made before the mistake is reported"
    assert not runs_below(tmp_path / "o")


@pytest.fixture
def refused(tmp_path, monkeypatch, capsys):
    """`refused("method=sis")`: what the command says to a mistake before it ends with status 1, in this process."""
    from hydra.core.global_hydra import GlobalHydra

    def said(*overrides: str) -> str:
        as_a_script = {"HYDRA_MAIN_MODULE": "__main__", "HYDRA_FULL_ERROR": "0"}
        for name, value in (environment(tmp_path / "o", tmp_path / "c") | as_a_script).items():
            monkeypatch.setenv(name, value)
        monkeypatch.setattr(sys, "argv", ["train.py", *overrides])
        monkeypatch.chdir(tmp_path)
        with pytest.raises(SystemExit) as end:
            runpy.run_path(str(ROOT / "train.py"), run_name="__main__")
        assert end.value.code == 1
        return capsys.readouterr().err

    yield said
    GlobalHydra.instance().clear()


@pytest.mark.parametrize(  # of types that the tests' own type checker would refuse first
    "overrides, sentence",
    [
        (["method=siss", "method.lambd=variance"], r"\[0, 1\] .*got 'variance'; did you mean method/lambd=variance"),
        (["evaluation.threshold=few"], r"evaluation\.threshold must be a number in \[0, 1\] or null, got 'few'"),
    ],
)
def test_a_mistake_ends_the_command(tmp_path, overrides, sentence):
    done = command("debug=default", *overrides, outputs=tmp_path / "o", cache=tmp_path / "c", cwd=tmp_path)
    assert done.returncode == 1
    assert re.search(sentence, done.stderr), done.stderr
    assert "Traceback" not in done.stderr
    assert not (tmp_path / "c").exists()


def test_unwritable_outputs_get_one_sentence(tmp_path, shared_cache):
    (tmp_path / "o").write_text("a file, not a folder")
    done = command("debug=default", outputs=tmp_path / "o", cache=shared_cache)
    assert done.returncode == 1
    assert "hydra.run.dir" in done.stderr
    assert "Traceback" not in done.stderr


@pytest.fixture
def resumed(composed, tmp_path):
    """`resumed(folder, "seed=1")`: a debug run that goes on with another; returns the folder it was made in."""
    from unlearn_runner import assembly

    def resume(folder: Path, *overrides: str) -> Path:
        fresh = tmp_path / "outputs" / "fresh"
        fresh.mkdir(parents=True, exist_ok=True)
        return assembly.unlearn(composed(f"resume_from_checkpoint={folder}", *overrides), fresh)

    return resume


def test_checkpoint_of_another_run_is_refused(run, resumed):
    folder = run(*KEPT)
    before = {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}
    for override, sentence in {
        "method=neg_grad": r"of another method \(Posterior\) than this run's \(NegGrad\)",
        "seed=1": r"of another seed \(0\) than this run's \(1\)",
        "dataset.seed=1": r"of another dataset\.seed \(0\) than this run's \(1\)",
        "trainer.batch_size=4": r"of another trainer\.batch_size \(8\) than this run's \(4\)",
        "method/update=sgd": r"of another method\.update\.optimizer \(AdamW\) than this run's \(SGD\)",
        "method.lambd=0.3": r"of another method\.lambd \(0\.25\) than this run's \(0\.3\)",
        "trainer.max_steps=2": r"of another trainer\.max_steps \(4\) than this run's \(2\)",
        "hardware.mixed_precision=bf16": r"of another hardware\.mixed_precision \(no\) than this run's \(bfloat16\)",
        "trainer.log_every=2": "this run has finished, nothing is left to do",
    }.items():
        with pytest.raises(ConfigurationError, match=sentence):
            resumed(folder, override)
    assert {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()} == before


def test_a_longer_run_goes_on_from_a_finished_one(run, resumed, tmp_path):
    folder = run(*KEPT)
    before = {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}
    longer = resumed(folder, "trainer.max_steps=6")
    assert longer == tmp_path / "outputs" / "fresh"
    content = summary(longer)
    assert content["status"] == "finished"
    checkpoint = folder / "checkpoints" / "step_000004"
    parent = {"checkpoint": str(checkpoint), "step": 4, "config_hash": summary(folder)["config_hash"]}
    assert content["parent"] == parent
    assert [line["step"] for line in lines(longer) if "loss/forget" in line] == [1, 2, 3, 4, 5, 6]
    assert content["metrics"]["cost/images"] == 6 / 4 * summary(folder)["metrics"]["cost/images"]
    assert before == {path: path.read_bytes() for path in before}
    (longer / ".claimed").unlink()
    again = tmp_path / "outputs" / "again"
    again.mkdir()
    import yaml

    from unlearn_runner import assembly

    assert assembly.unlearn(yaml.safe_load((longer / "config.yaml").read_text()), again) == again, (
        "from what it has left"
    )
    assert_same_bits(weights_of(again), weights_of(longer))


def test_a_run_whose_end_cannot_be_written_says_so_and_can_be_gone_on_with(run, resumed, monkeypatch, capsys):
    """The disk is full when the summary is written: the model and the checkpoint are there, the status is not."""
    import errno

    from unlearn_runner.training.run_folder import RunFolder

    original = RunFolder.write_summary

    def full(self, status, *arguments, **more):
        if status == "finished":
            raise OSError(errno.ENOSPC, "No space left on device", "summary.json")
        original(self, status, *arguments, **more)

    with monkeypatch.context() as patched, pytest.raises(OSError, match="No space left"):
        patched.setattr(RunFolder, "write_summary", full)
        run("trainer.checkpointing_steps=null", folder="full")
    (folder,) = Path(capsys.readouterr().out.split("everything is in ")[1].splitlines()[0]).parent.glob("full")
    assert summary(folder)["status"] == "running"
    assert resumed(folder, "trainer.checkpointing_steps=null") == folder
    assert summary(folder)["status"] == "finished"


@pytest.mark.slow  # tests/test_kills.py stops runs anywhere
def test_interrupted_while_the_base_is_trained(tmp_path):
    """The command to repeat is printed, and the base's training goes on; as printed, in odd folders, by a shell."""
    outputs, cache = tmp_path / "o[/x] y=z", tmp_path / "c é, 'q'"
    settings = ("debug=default", "logger=jsonl", "model.pretraining.max_steps=100")
    process = subprocess.Popen(
        [sys.executable, str(ROOT / "train.py"), *settings], env=environment(outputs, cache),
        stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
    )  # fmt: skip
    seen = ""
    while "training the base model: step" not in seen:
        seen = process.stdout.readline()
    process.send_signal(signal.SIGHUP)
    said, _ = process.communicate(timeout=60)
    assert process.returncode == 130, said
    (folder,) = runs_below(outputs)
    assert summary(folder)["status"] == "interrupted"
    assert list(cache.glob("bases/*.partial/checkpoints/step_*"))
    printed = said.split("in the cache, go on with: ")[1].splitlines()[0]
    again = subprocess.run(
        printed.replace("python", sys.executable, 1), shell=True, capture_output=True, text=True,
        env=environment(outputs, cache), timeout=300,
    )  # fmt: skip
    assert again.returncode == 0, again.stderr
    first_step = int(re.search(r"training the base model: step (\d+)/100", again.stdout)[1])
    assert first_step > 10, "it began where it had stopped"
