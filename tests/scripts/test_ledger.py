"""Requests one after the other: what is run, what is measured again, and what is refused."""

import json
import subprocess
import sys

import ledger
import pytest
from conftest import ROOT

from unlearn_runner.comparison.ledger import draw, ledger_of, read_requests, table_of
from unlearn_runner.errors import ConfigurationError

ASKED = """
base: auto
overrides: [method=posterior, method.lambd=0.3, budget.max_steps=20, hardware=cpu]
requests:
  - {id: trousers, overrides: [dataset=digits_trousers], text: "No more trousers", received: 2026-11-02}
  - {id: seven, overrides: [dataset=digits, dataset.forget_class=7]}
"""


@pytest.fixture
def folder(tmp_path):
    (tmp_path / "requests.yaml").write_text(ASKED)
    return tmp_path


def finish(run, **metrics):
    """As a run leaves it."""
    run.mkdir(parents=True, exist_ok=True)
    identity = {"base": metrics.pop("base", "a"), "result": metrics.pop("result", "b")}
    scores = {key.replace("_of_", "/", 1): value for key, value in metrics.items()}
    (run / "summary.json").write_text(json.dumps({"status": "finished", "metrics": scores, "identity": identity}))


def test_each_request_begins_where_the_last_one_ended(folder):
    found = list(ledger.commands(folder, read_requests(folder), ["seed=3"]))
    first, again, second, *both = found
    assert [run.relative_to(folder).as_posix() for run, _ in found] == [
        "01-trousers", "01-trousers/measured/01-trousers",
        "02-seven", "02-seven/measured/01-trousers", "02-seven/measured/02-seven",
    ]  # fmt: skip
    assert not any(word.startswith("model.weights") for word in first[1]), "its base is trained"
    assert {"method=posterior", "dataset=digits_trousers", "seed=3"} <= set(first[1])
    assert f"model.weights='{folder}/01-trousers/model'" in second[1]
    assert "dataset.forget_class=7" in second[1] and "dataset=digits_trousers" not in second[1]
    for run, words in (again, *both):
        after = run.parents[1]
        assert words[0] == "method=given"
        assert f"method.weights='{after}/model'" in words and f"model.weights='{folder}/base/model'" in words
        assert not {"method=posterior", "method.lambd=0.3", "budget.max_steps=20"} & set(words)
        assert "hardware=cpu" in words and "seed=3" in words
    assert "dataset=digits_trousers" in both[0][1] and "dataset=digits" in both[1][1]


def test_what_is_done_is_not_done_again(folder):
    for run in ("01-trousers", "01-trousers/measured/01-trousers"):
        finish(folder / run)
    left = [run.name for run, _ in ledger.commands(folder, read_requests(folder), [])]
    assert left == ["02-seven", "01-trousers", "02-seven"]
    (folder / "01-trousers" / "request.json").write_text('["dataset=digits"]')
    with pytest.raises(ConfigurationError, match="request 'trousers' is done, and its overrides were others"):
        list(ledger.commands(folder, read_requests(folder), []))


def test_the_table(folder, tmp_path):
    finish(folder / "01-trousers", base="a", result="b")
    finish(folder / "01-trousers/measured/01-trousers", base_of_forget_rate=0.4, eval_of_forget_rate=0.0,
           base_of_retain_accuracy=0.9, eval_of_retain_accuracy=0.8)  # fmt: skip
    finish(folder / "02-seven", base="c", result="d")
    finish(folder / "02-seven/measured/01-trousers", base_of_forget_rate=0.4, eval_of_forget_rate=0.1,
           base_of_retain_accuracy=0.9, eval_of_retain_accuracy=0.6)  # fmt: skip
    assert len(ledger_of(folder)["requests"]) == 1, "the second is not measured yet"
    finish(folder / "02-seven/measured/02-seven", base_of_forget_rate=0.7, eval_of_forget_rate=0.05,
           base_of_retain_accuracy=0.95, eval_of_retain_accuracy=0.7, eval_of_relearn_steps=20)  # fmt: skip
    found = ledger_of(folder)
    assert table_of(found) == [
        ["after", "trousers", "seven", "retain_accuracy"],
        ["before", "0.400", "0.700", "0.900"],
        ["trousers", "0.000", "", "0.800"],
        ["seven", "0.100", "0.050", "0.700"],
    ]
    assert found["broken"] == ["seven"], "it did not begin with what the first one left"
    assert found["requests"][1]["back"] == [{}, {"relearn_steps": 20}]
    draw(found, tmp_path / "ledger.png")
    assert (tmp_path / "ledger.png").read_bytes().startswith(b"\x89PNG")


@pytest.mark.parametrize(
    "text, sentence",
    [
        (None, "expected a file of requests; [Errno 2] No such file"),
        ("- a", "expected base, overrides, requests, got list"),
        ("request: []", "there is no 'request'; near it: requests"),
        ("requests: []", "expected a list `requests` with one or more"),
        ("requests: [{id: a/b, overrides: []}]", "request 1 needs an id of letters"),
        ("requests: [{id: a}, {id: a}]", "request 2 has the id 'a', as one before it"),
        ("requests: [{id: a, overides: []}]", "there is no 'overides'; near it: overrides"),
        ("requests: [{id: a, overrides: [dataset]}]", "overrides must be a list of texts like method=siss"),
        ("requests: [{id: a, overrides: {dataset: digits}}]", "overrides must be a list of texts"),
    ],
)
def test_what_is_no_list_of_requests(tmp_path, text, sentence, capsys):
    if text is not None:
        (tmp_path / "requests.yaml").write_text(text)
    assert ledger.main([str(tmp_path)]) == 1
    said = capsys.readouterr().err
    assert sentence in said and len(said.strip().splitlines()) == 1


@pytest.mark.slow
def test_two_requests(tmp_path, shared_cache):
    """Whole runs: the second begins with the first one's model, and both are measured after it."""
    overrides = [
        "debug=default",
        "logger=jsonl",
        "hardware=cpu",
        "method=naive_deletion",
        f"paths.cache={shared_cache}",
    ]
    overrides += ["evaluation/relearning=benign", "evaluation.relearning.max_steps=2"]
    asked = {"overrides": overrides, "requests": [
        {"id": "trousers", "overrides": ["dataset=digits_trousers"], "text": "No more <trousers>"},
        {"id": "seven", "overrides": ["dataset=digits", "dataset.forget_class=7"]},
    ]}  # fmt: skip
    (tmp_path / "requests.yaml").write_text(json.dumps(asked))
    command = [sys.executable, str(ROOT / "scripts" / "ledger.py"), str(tmp_path)]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    found = json.loads((tmp_path / "ledger.json").read_text())
    assert [request["id"] for request in found["requests"]] == ["trousers", "seven"]
    assert found["broken"] == [] and found["requests"][0]["base"] != found["requests"][1]["base"]
    assert "relearn_steps" in found["requests"][1]["back"][0]
    again = subprocess.run(command, capture_output=True, text=True)
    assert again.returncode == 0 and "train.py" not in again.stdout, "nothing is left to do"
    pages = subprocess.run([sys.executable, str(ROOT / "scripts" / "report.py"), str(tmp_path)], capture_output=True)
    assert pages.returncode == 0, pages.stderr
    assert "No more &lt;trousers&gt;" in (tmp_path / "report.html").read_text()
    assert (tmp_path / "02-seven" / "report.html").is_file()
