"""The report on a deletion request, and the removal of what still holds its data."""

import json
import shutil
import subprocess

import forget_traces
import numpy as np
import pytest
import report
import yaml
from PIL import Image

from unlearn_runner.comparison import request_report
from unlearn_runner.comparison.request_report import in_words, prose
from unlearn_runner.spec import BY_NAME
from unlearn_runner.training.recorder import in_context


@pytest.fixture
def ran(run, tmp_path, shared_cache):
    """A run of a request: three of thirty pictures, one of which has a likeness among the others."""
    folder = tmp_path / "photos"
    folder.mkdir()
    for number in range(30):
        coarse = np.random.default_rng(number).integers(0, 250, (4, 4), dtype=np.uint8)
        Image.fromarray(coarse).resize((16, 16), Image.Resampling.BILINEAR).save(folder / f"{number:02}.png")
    pixels = np.asarray(Image.open(folder / "00.png"))
    Image.fromarray(pixels + 3).save(folder / "like.png")
    (folder / "notes.doc").write_text("x")
    options = (f"dataset.source={folder}", "dataset.forget=['00.png','01.png','02.png']", "dataset.image_size=16")
    more = ("evaluation=instances", "trainer.keep_checkpoints=true", "dataset.test_fraction=0.2", "dataset.seed=3")
    return run("dataset=request", "method=siss", *options, *more, folder="a run")


def test_the_report(ran, capsys):
    assert report.main([str(ran), "--id", "17", "--text", "Remove <b>Ann</b>", "--received", "2026-11-02"]) == 0
    assert "report.html" in capsys.readouterr().out
    content = json.loads((ran / "report.json").read_text())
    assert content["request"] == {"number": "17", "text": "Remove <b>Ann</b>", "received": "2026-11-02"}
    assert [row["file"] for row in content["files"]["forget"]] == ["00.png", "01.png", "02.png"]
    assert content["files"]["counts"]["forget"] == 3 and content["files"]["counts"]["not read"] == 1
    scores = {score["key"]: score for score in content["scores"]}
    summary = json.loads((ran / "summary.json").read_text())
    assert scores["copy_rate"]["after"] == summary["metrics"]["eval/copy_rate"]
    assert scores["copy_rate"]["before"] == summary["metrics"]["base/copy_rate"]
    assert scores["copy_rate"]["interval"][0] <= scores["copy_rate"]["after"] <= scores["copy_rate"]["interval"][1]
    assert content["identity"]["base"] != content["identity"]["result"]
    assert content["identity"]["started"] <= content["identity"]["finished"]
    page = (ran / "report.html").read_text()
    assert len(page) < 2_000_000
    assert "Remove &lt;b&gt;Ann&lt;/b&gt;" in page and "<b>Ann" not in page
    assert page.count("data:image/png;base64,") == 2
    for row in content["files"]["forget"]:
        assert row["sha256"] in page
    done = subprocess.run(["sha256sum", "-c", "MANIFEST.sha256"], cwd=ran, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout
    assert "model/unet/diffusion_pytorch_model.safetensors: OK" in done.stdout and "data.jsonl: OK" in done.stdout
    older = {key: value for key, value in summary.items() if key != "identity"}
    (ran / "summary.json").write_text(json.dumps(older))
    assert report.main([str(ran)]) == 0, "summaries from before there were digests in them"
    (ran / "data.jsonl").write_text("{}\n")
    done = subprocess.run(["sha256sum", "-c", "MANIFEST.sha256"], cwd=ran, capture_output=True, text=True)
    assert done.returncode != 0


def test_a_judge_that_cannot_tell_the_images_is_no_fault():
    doubts = ["WARNING: train it longer", "WARNING: or on more"]
    (sentence,) = in_context(doubts, BY_NAME)
    assert "copy_rate, mia_auc and nll_forget" in sentence
    assert in_context(doubts, ("a", "b")) == doubts and in_context([], BY_NAME) == []


def test_the_model_has_a_card_that_names_no_file(ran):
    _, metadata, card = (ran / "model" / "README.md").read_text().split("---\n", 2)
    assert yaml.safe_load(metadata) == {"library_name": "diffusers", "tags": ["machine-unlearning", "siss"]}
    summary = json.loads((ran / "summary.json").read_text())
    assert summary["identity"]["result"] in card and summary["config_hash"] in card
    assert f"| {summary['metrics']['eval/copy_rate']:.3f}".rstrip("0").rstrip(".") in card
    assert 'DDPMPipeline.from_pretrained("<this folder>")' in card
    assert "Descends L_retain and ascends L_forget" in card and "00.png" not in card and "No model without" in card


def test_traces_are_shown_and_removed(ran, shared_cache, capsys):
    content = request_report.report(ran)
    places = {trace["place"]: trace["what"] for trace in content["traces"]}
    assert str(ran / "checkpoints") in places
    assert {"in the cache: a base trained on it", "in the cache: classifiers made of it"} <= set(places.values())
    kept = {str(folder) for folder in shared_cache.glob("*/*") if folder.is_dir()} - places.keys()
    assert forget_traces.main([str(ran)]) == 0
    shown = capsys.readouterr().out
    assert all(place in shown for place in places) and "Nothing was removed" in shown
    assert (ran / "checkpoints").is_dir()
    assert forget_traces.main([str(ran), "--delete"]) == 0
    assert not any((ran / "checkpoints").parent.joinpath(place).exists() for place in places)
    assert all((shared_cache / folder).exists() for folder in kept), "of other data"
    assert request_report.report(ran)["traces"] == []
    assert (ran / "model").is_dir() and (ran / "summary.json").is_file()


def test_a_pdf_where_there_is_a_browser(ran, monkeypatch, capsys):
    if not any(map(shutil.which, report.BROWSERS)):
        assert report.main([str(ran), "--pdf"]) == 1
        assert "--pdf needs one of chromium" in capsys.readouterr().err
        return
    assert report.main([str(ran), "--pdf"]) == 0
    assert (ran / "report.pdf").read_bytes()[:5] == b"%PDF-"


def test_what_has_nothing_to_report(tmp_path, capsys):
    assert report.main([str(tmp_path)]) == 1
    assert "expected the folder of a run" in capsys.readouterr().err
    (tmp_path / "summary.json").write_text('{"status": "diverged"}')
    (tmp_path / "config.yaml").write_text("a: 1\n")
    assert report.main([str(tmp_path)]) == 1
    assert "this run is diverged; there is a report of finished ones only" in capsys.readouterr().err
    assert forget_traces.main([str(tmp_path)]) == 1


def test_words():
    assert in_words(0.0, 1000, None) == "0 of 1,000 samples; at most 0.4% with 95 % confidence"
    some = in_words(0.5, 20, [0.3, 0.7])
    assert some == "10 of 20 samples; between 30.0% and 70.0% with 95 % confidence"
    assert (
        prose("share of `samples` that **lie** ([1904.06991](https://a.org/b))")
        == "Share of samples that lie (1904.06991)"
    )
