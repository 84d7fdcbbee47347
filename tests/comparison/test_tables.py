"""Which runs share a table, a row, an average and a star."""

import pytest
from run_folders import PROVENANCE, changed, make_run

from unlearn_runner.catalogue import ORACLE
from unlearn_runner.comparison.columns import choose
from unlearn_runner.comparison.comparison import Wanted, compare
from unlearn_runner.comparison.runs import read_runs
from unlearn_runner.comparison.statistics import wilson
from unlearn_runner.comparison.tables import Cell, badness, number, text, way_of
from unlearn_runner.comparison.tradeoff import tradeoffs_of
from unlearn_runner.comparison.verdicts import sentence, verdicts_of
from unlearn_runner.errors import ConfigurationError

USUAL = Wanted(metrics=[], short=False, sort=None, baseline=None, test="t")


def comparison(folder, **wanted):
    return compare(read_runs([folder]), USUAL._replace(**wanted))


def only(folder, **wanted):
    (table,) = comparison(folder, **wanted).tables
    return table


def best(table, column):
    return [
        row.label for row, cells in zip(table.rows, table.cells, strict=True) if column in cells and cells[column].best
    ]


def test_base_and_oracle_are_counted_once_a_seed_and_never_best(tmp_path):
    for method, rate in (("a", 0.2), ("b", 0.3)):
        for seed in (0, 1):
            shared = {"base/forget_rate": 0.5 + seed, "oracle/forget_rate": 0.0}
            make_run(tmp_path, method, seed, shared | {"eval/forget_rate": rate})
    table = only(tmp_path)
    assert [row.label for row in table.rows] == ["base", "oracle", "a", "b"]
    assert table.cells[0]["forget_rate"] == Cell(1.0, (0.0, 1.0), 2, 2, False), "cut at what a share can be"
    assert best(table, "forget_rate") == ["a"]


def test_a_method_may_be_called_oracle(tmp_path):
    make_run(tmp_path, "oracle", 0, {"eval/forget_rate": 0.25, "oracle/forget_rate": 0.0})
    table = only(tmp_path)
    assert [(row.label, row.is_method) for row in table.rows] == [("oracle", False), ("oracle", True)]
    assert [cells["forget_rate"].mean for cells in table.cells] == [0.0, 0.25]


@pytest.mark.parametrize(
    "column, winner",
    [
        ("forget_rate", "a"),
        ("restored_rate", "c"),
        ("retain_accuracy", "c"),
        ("mia_auc", "b"),
        ("mia_tpr_at_1pct_fpr", "a"),
        ("nll_forget", None),
        ("fid_forget", None),
        ("kid_forget", None),
        ("cost/seconds", "a"),
        ("reached/fid_retain", "a"),
        ("oracle_gap/retain_accuracy", "a"),
        ("mean/lambda/value", None),
        ("ssim_forget", None),
    ],
)
def test_the_best_knows_its_direction(tmp_path, column, winner):
    key = column if "/" in column else f"eval/{column}"
    for method, value in (("a", 0.1), ("b", 0.45), ("c", 0.9)):
        make_run(tmp_path, method, 0, {key: value})
    table = only(tmp_path, metrics=[column])
    assert best(table, column) == ([winner] if winner else [])
    assert (way_of(table.rows, column) is None) == (winner is None)


FORGETTING = [
    "forget_rate", "restored_rate", "mia_auc", "mia_tpr_at_1pct_fpr", "nll_forget", "nll_bound_forget", "fid_forget",
    "kid_forget", "outliers_forget", "relearn_steps", "attack_success", "forget_rate_paraphrases",
]  # fmt: skip


@pytest.mark.parametrize("column", FORGETTING)
def test_forgetting_is_best_as_the_oracles(tmp_path, column):
    """Less of the content than a model draws that never saw it is no better, nor more of it."""
    for method, value in (("less", 0.1), ("near", 0.32), ("more", 0.6)):
        make_run(tmp_path, method, 0, {f"eval/{column}": value, f"oracle/{column}": 0.3})
    table = only(tmp_path, metrics=[column], sort=column)
    assert best(table, column) == ["near"]
    assert [row.label for row in table.rows if row.is_method] == ["near", "less", "more"]
    assert way_of(table.rows, column) == ORACLE


def test_retention_is_no_better_for_being_like_the_oracles(tmp_path):
    for method, value in (("near", 0.9), ("more", 0.99)):
        make_run(tmp_path, method, 0, {"eval/retain_accuracy": value, "oracle/retain_accuracy": 0.9})
    assert best(only(tmp_path), "retain_accuracy") == ["more"]


def test_the_distance_is_from_the_oracle_of_the_same_seed(tmp_path):
    """The means of both methods are equally near to the oracles' mean; only one goes with them."""
    for seed, oracle in enumerate((0.1, 0.3)):
        for method, value in (("along", oracle + 0.01), ("against", 0.41 - oracle)):
            make_run(tmp_path, method, seed, {"eval/forget_rate": value, "oracle/forget_rate": oracle})
    table = only(tmp_path)
    assert best(table, "forget_rate") == ["along"]
    (verdict,) = table.verdicts
    assert (verdict.label, verdict.oracle) == ("along", pytest.approx(0.2))
    row = next(row for row in table.rows if row.label == "against")
    assert badness(table.rows, row, "forget_rate") == {0: pytest.approx(0.21), 1: pytest.approx(0.19)}
    make_run(tmp_path, "along", 2, {"eval/forget_rate": 0.2})
    table = only(tmp_path)
    row = next(row for row in table.rows if row.label == "along")
    assert badness(table.rows, row, "forget_rate")[2] == pytest.approx(0.0), "without an oracle of its own: their mean"


def oracles(**rates):
    """What a summary says of oracles with these forget_rates, by digest."""
    return [{"seed": 0, "digest": digest, "metrics": {"forget_rate": rate}} for digest, rate in rates.items()]


def test_each_of_several_oracles_counts_once_however_many_runs_share_it(tmp_path):
    for method, values in (("a", (0.3, 0.5)), ("b", (0.2, 0.2))):
        for seed, value in enumerate(values):
            metrics = {"eval/forget_rate": value, "oracle/forget_rate": 0.2, "eval/retain_accuracy": 0.9}
            make_run(tmp_path, method, seed, metrics, oracles=oracles(x=0.1, y=0.2, z=0.3))
    table = only(tmp_path, sort="label")
    oracle, a, b = (cells["forget_rate"] for cells in table.cells)
    assert (oracle.mean, oracle.std) == (pytest.approx(0.2), pytest.approx(0.1))
    assert (oracle.n, oracle.of, oracle.z) == (3, 3, None)
    assert text(oracle) == "0.200 ± 0.100"
    assert (a.z, b.z, a.std) == (pytest.approx(2.0), pytest.approx(0.0, abs=1e-9), None)
    assert text(a).endswith(", z=+2.0")
    assert "retain_accuracy" not in table.cells[0], "the oracles do not have it"
    assert table.cells[1]["retain_accuracy"].z is None
    (said,) = [remark for remark in table.remarks if "oracle" in remark]
    assert said.startswith("oracle: mean ± standard deviation of 3 models that never saw the forget set; all else")
    assert "one more oracle would lie within ±5.0 in 95 % of cases" in said


def test_oracles_that_are_alike_give_no_z(tmp_path):
    metrics = {"eval/forget_rate": 0.3, "oracle/forget_rate": 0.2}
    make_run(tmp_path, "a", 0, metrics, oracles=oracles(x=0.2, y=0.2))
    table = only(tmp_path)
    assert table.cells[1]["forget_rate"].z is None
    (said,) = [remark for remark in table.remarks if "oracle" in remark]
    assert said.endswith("No z, for all of them have the same scores.")


def test_the_distance_is_to_the_mean_of_oracles_that_are_shared(tmp_path):
    """And not to the oracle whose place among all is the run's seed."""
    for method, value in (("near", 0.22), ("far", 0.1)):
        for seed in (0, 1):
            metrics = {"eval/forget_rate": value, "oracle/forget_rate": 0.2}
            make_run(tmp_path, method, seed, metrics, oracles=oracles(x=0.1, y=0.1, z=0.4))
    table = only(tmp_path)
    found = {row.label: badness(table.rows, row, "forget_rate") for row in table.rows if row.is_method}
    assert found == {"near": pytest.approx({0: 0.02, 1: 0.02}), "far": pytest.approx({0: 0.1, 1: 0.1})}
    assert best(table, "forget_rate") == ["near"]
    assert list(badness(table.rows, table.rows[0], "forget_rate").values()) == pytest.approx([0.1, 0.1, 0.2])


def test_the_distance_is_to_the_seeds_own_oracle_where_each_has_one(tmp_path):
    """As in test_the_distance_is_from_the_oracle_of_the_same_seed, of runs that say which oracles they had."""
    for seed, rate in ((7, 0.1), (1, 0.3), (0, 0.5)):
        metrics = {"eval/forget_rate": rate + 0.01, "oracle/forget_rate": rate}
        make_run(tmp_path, "along", seed, metrics, oracles=oracles(**{f"of_{seed}": rate}))
    table = only(tmp_path)
    row = next(row for row in table.rows if row.is_method)
    assert badness(table.rows, row, "forget_rate") == pytest.approx({7: 0.01, 1: 0.01, 0: 0.01})
    assert (table.cells[0]["forget_rate"].n, table.cells[0]["forget_rate"].std) == (3, pytest.approx(0.2))
    assert table.cells[1]["forget_rate"].z == pytest.approx(0.05)


def test_one_oracle_has_no_spread_and_gives_no_z(tmp_path):
    for seed in (0, 1):
        metrics = {"eval/forget_rate": 0.1 * seed, "oracle/forget_rate": 0.2}
        make_run(tmp_path, "a", seed, metrics, oracles=oracles(x=0.2))
    table = only(tmp_path)
    assert (table.cells[0]["forget_rate"].n, table.cells[0]["forget_rate"].std) == (1, None)
    assert table.cells[1]["forget_rate"].z is None
    assert not [remark for remark in table.remarks if "oracle" in remark]


def test_beside_runs_that_do_not_name_their_oracles_each_seed_counts_once(tmp_path):
    """Which of them are the same is not known."""
    make_run(tmp_path, "new", 0, {"eval/forget_rate": 0.1, "oracle/forget_rate": 0.2}, oracles=oracles(x=0.1, y=0.3))
    make_run(tmp_path, "old", 1, {"eval/forget_rate": 0.1, "oracle/forget_rate": 0.4})
    table = only(tmp_path)
    cell = table.cells[0]["forget_rate"]
    assert (cell.mean, cell.n, cell.std) == (pytest.approx(0.3), 2, None)
    assert {found["forget_rate"].z for found in table.cells} == {None}


def test_an_oracle_without_a_finite_score_is_not_counted(tmp_path):
    metrics = {"eval/forget_rate": 0.1, "oracle/restored_rate": 0.5}
    make_run(tmp_path, "a", 0, metrics, oracles=oracles(x=0.1, y=0.2, z=float("nan")))
    cell = only(tmp_path).cells[0]["forget_rate"]
    assert (cell.mean, cell.n, cell.of) == (pytest.approx(0.15), 2, 2)


@pytest.mark.parametrize("broken", [[{"metrics": {}}], ["x"], [{"digest": "x"}], 3, {"x": 1}])
def test_a_summary_with_broken_oracles_stands_apart(tmp_path, broken):
    make_run(tmp_path, "a", 0, {"eval/forget_rate": 0.1}, oracles=broken)
    found = read_runs([tmp_path])
    assert (len(found.runs), len(found.apart)) == (0, 1)
    assert "summary.json or config.yaml" in found.apart[0].why


def test_equal_ones_share_the_star_unless_all_are(tmp_path):
    for method, value in (("a", 0.1), ("b", 0.1), ("c", 0.2)):
        make_run(tmp_path, method, 0, {"eval/forget_rate": value, "eval/retain_accuracy": 0.5})
    table = only(tmp_path)
    assert best(table, "forget_rate") == ["a", "b"]
    assert best(table, "retain_accuracy") == []


def test_what_only_some_seeds_have_is_not_the_best(tmp_path):
    make_run(tmp_path, "a", 0, {"eval/deletion_steps": 1.0})
    make_run(tmp_path, "a", 1, {})
    for method, value in (("b", 5.0), ("c", 6.0)):
        make_run(tmp_path, method, 0, {"eval/deletion_steps": value})
        make_run(tmp_path, method, 1, {"eval/deletion_steps": value})
    assert best(only(tmp_path), "deletion_steps") == ["b"]


def test_a_single_seed_is_not_the_best_where_others_have_several(tmp_path):
    make_run(tmp_path, "a", 0, {"eval/forget_rate": 0.0})
    for method, value in (("b", 0.1), ("c", 0.2)):
        for seed in (0, 1):
            make_run(tmp_path, method, seed, {"eval/forget_rate": value})
    table = only(tmp_path)
    assert best(table, "forget_rate") == ["b"]
    assert "and not called the best where a method of several may be: a." in table.remarks[0]


def test_who_draws_rubble_is_not_the_best(tmp_path):
    """What it forgets by is noise; as much as the base draws anyhow is none."""
    for method, rate, nothing in (("noise", 0.0, 0.9), ("keeps it", 0.9, 0.1), ("good", 0.1, 0.3), ("fair", 0.2, 0.1)):
        for seed in (0, 1):
            scores = {"eval/forget_rate": rate, "eval/nothing_rate": nothing, "eval/outliers_retain": 0.1}
            make_run(tmp_path, method, seed, scores | {"base/outliers_retain": 0.15})
    table = only(tmp_path)
    assert best(table, "forget_rate") == ["good"]
    assert [verdict.label for verdict in table.verdicts] == ["good"]
    assert "noise" not in sentence(table.verdicts[0])
    assert [remark for remark in table.remarks if "never called" in remark or "not called" in remark] == [
        "never called the best, for much of what they draw under the forget condition is like no real image "
        "(nothing_rate): noise (90%).",
        "first, but not called the best: noise by forget_rate (draws what is like no real image).",
    ]
    assert best(only(tmp_path, metrics=["forget_rate"]), "forget_rate") == ["good"], "asked or not"
    in_order = [row.label for row in table.rows if row.is_method]
    assert in_order == ["good", "fair", "keeps it", "noise"], "who is never called the best stands last"
    assert [row.label for row in only(tmp_path, sort="label").rows][1:] == ["fair", "good", "keeps it", "noise"]


def test_without_outliers_the_bases_own_rubble_is_usual(tmp_path):
    """As with evaluation.metrics.outliers=null."""
    for method, nothing in (("noise", 0.9), ("as the base", 0.4)):
        make_run(tmp_path, method, 0, {"eval/nothing_rate": nothing, "base/nothing_rate": 0.35})
    (sentence,) = [remark for remark in only(tmp_path).remarks if "never called" in remark]
    assert sentence.endswith("(nothing_rate): noise (90%).")


def test_an_oracle_that_draws_rubble_excuses_nobody(tmp_path):
    """As under a class of which no image is kept: it was never trained under it, and is no aim."""
    for method, rate, nothing in (("noise", 0.0, 1.0), ("good", 0.0, 0.2), ("fair", 0.1, 0.3)):
        for seed in (0, 1):
            scores = {"eval/forget_rate": rate, "eval/nothing_rate": nothing, "eval/restored_rate": 1 - rate - nothing}
            oracle = {"oracle/forget_rate": 0.0, "oracle/nothing_rate": 0.9, "oracle/restored_rate": 0.1}
            usual = {"eval/outliers_retain": 0.2, "base/outliers_retain": 0.2}
            make_run(tmp_path, method, seed, scores | oracle | usual)
    table = only(tmp_path)
    assert best(table, "forget_rate") == best(table, "restored_rate") == ["good"]
    assert best(table, "nothing_rate") == []
    said = [remark for remark in table.remarks if "like no real image" in remark]
    assert said[0].endswith("(nothing_rate): noise (100%).")
    assert said[1].startswith("90% of what the oracle draws under the forget condition is like no real image")


def test_a_base_that_draws_rubble_hides_it(tmp_path):
    """Black squares are no more than 0.2 beyond what such a base draws, so it is said that they may be such."""
    for method, nothing in (("black", 1.0), ("good", 0.8)):
        scores = {"eval/nothing_rate": nothing, "eval/outliers_retain": 0.9, "base/outliers_retain": 0.85}
        make_run(tmp_path, method, 0, scores)
    (sentence,) = [remark for remark in only(tmp_path).remarks if "rubble" in remark]
    assert sentence.startswith("85% of what the base draws is like no real image")


def test_who_keeps_too_little_is_not_the_best(tmp_path):
    """At anything: neither at forgetting, which is easy for what forgets all, nor at costs."""
    for method, rate, kept, cost in (("all", 0.0, 0.1, 1.0), ("some", 0.1, 0.85, 2.0), ("good", 0.2, 0.9, 3.0)):
        for seed in (0, 1):
            scores = {"eval/forget_rate": rate, "eval/retain_accuracy": kept, "cost/network_evaluations": cost}
            make_run(tmp_path, method, seed, scores | {"base/retain_accuracy": 0.94})
    table = only(tmp_path)
    assert {column: best(table, column) for column in ("forget_rate", "cost/network_evaluations")} == {
        "forget_rate": ["some"],
        "cost/network_evaluations": ["some"],
    }
    assert table.remarks[-1] == (
        "first, but not called the best: all by forget_rate and cost/network_evaluations "
        "(retain_accuracy 0.100, below 0.846)."
    )
    assert [verdict.label for verdict in table.verdicts] == ["some", "good", "some"]
    everyone = only(tmp_path, floor=0.0)
    assert best(everyone, "forget_rate") == ["all"]
    assert not [remark for remark in everyone.remarks if "not called" in remark]
    strict = only(tmp_path, floor=0.95)
    assert (best(strict, "forget_rate"), strict.verdicts) == ([], []), "one is left: there is nothing to compare"


def test_sorted_from_the_best_on_and_by_label(tmp_path):
    for method, values in (("a", (0.3, 0.1)), ("b", (0.1, 0.2)), ("c", (0.2, None))):
        accuracy = {} if values[1] is None else {"eval/retain_accuracy": values[1]}
        make_run(tmp_path, method, 0, {"eval/forget_rate": values[0]} | accuracy)

    def order(**wanted):
        return [row.label for row in only(tmp_path, **wanted).rows]

    assert order() == ["b", "c", "a"]
    assert order(sort="eval/retain_accuracy") == ["b", "a", "c"]
    assert order(sort="retain_accuracy", metrics=["forget_rate"]) == ["b", "a", "c"]
    assert order(sort="label") == ["a", "b", "c"]


def test_unknown_metrics_and_baselines_get_the_nearest_names(tmp_path):
    make_run(tmp_path, "naive_deletion", 0, {"eval/forget_rate": 0.1, "eval/fid_retain": 1.0})
    with pytest.raises(ConfigurationError, match="'forget_rat'; near it: forget_rate"):
        comparison(tmp_path, sort="forget_rat")
    with pytest.raises(ConfigurationError, match="fid_retain"):
        comparison(tmp_path, metrics=["reached/fid_retain"])
    with pytest.raises(ConfigurationError, match="'forget_rat'; near it: forget_rate"):
        comparison(tmp_path, metrics=["forget_rate", "forget_rat"])
    with pytest.raises(ConfigurationError, match="near it: naive_deletion"):
        comparison(tmp_path, baseline="naive-deletion")
    assert choose(["eval/forget_rate", "forget_rate"], {"eval/forget_rate"}) == ["forget_rate"]


def test_a_metric_that_was_not_measured_is_left_out_beside_others(tmp_path):
    make_run(tmp_path, "a", 0, {"eval/forget_rate": 0.1})
    found = comparison(tmp_path, metrics=["eval/restored_rate", "forget_rate"])
    assert found.tables[0].columns == ["forget_rate"]
    assert found.remarks == ["no run has eval/restored_rate."]


@pytest.mark.parametrize(
    "more, said",
    [
        ({"provenance": changed(sampler="ddpm")}, "sampler ddpm"),
        ({"provenance": changed(num_samples={"forget": 50})}, "samples under forget 50"),
        ({"provenance": changed(num_inference_steps=50)}, "sampling steps 50"),
        ({"provenance": changed(features={"extractor": "inception"})}, "features.extractor inception"),
        ({"provenance": changed(data={"name": "digits", "fingerprint": "bb"})}, "data.fingerprint bb"),
        ({"config": {"trainer": {"max_steps": 20, "batch_size": 4}}}, "steps 20"),
        ({"config": {"choices": {"method": "b", "dataset": "cifar10", "model": "tiny"}}}, "dataset cifar10"),
    ],
)
def test_runs_not_measured_alike_stand_in_two_tables(tmp_path, more, said):
    for seed in (0, 1):
        make_run(tmp_path, "a", seed, {"eval/forget_rate": 0.1})
    make_run(tmp_path, "b", 0, {"eval/forget_rate": 0.9}, **more)
    found = comparison(tmp_path)
    first, second = found.tables
    assert [row.label for row in first.rows if row.is_method] == ["a"]
    assert [row.label for row in second.rows if row.is_method] == ["b"]
    assert second.title == said
    assert "not measured alike" in found.remarks[0]


def test_real_images_have_a_row_of_their_own(tmp_path):
    """Once if every seed has the same ones; they are never best."""
    for seed in (0, 1):
        make_run(tmp_path / "same", "a", seed, {"eval/fid_retain": 0.5, "floor/fid_retain": 0.25})
        make_run(tmp_path / "other", "a", seed, {"eval/fid_retain": 0.5, "floor/fid_retain": 0.25 + seed})
        make_run(tmp_path / "none", "a", seed, {"eval/fid_retain": 0.5})
        for folder in ("same", "other", "none"):
            make_run(tmp_path / folder, "b", seed, {"eval/fid_retain": 0.75})
    for folder, n, mean in (("same", 1, 0.25), ("other", 2, 0.75)):
        table = only(tmp_path / folder)
        assert [(row.label, row.is_method) for row in table.rows] == [("real images", False), ("a", True), ("b", True)]
        assert (table.cells[0]["fid_retain"].n, table.cells[0]["fid_retain"].mean) == (n, mean)
        assert best(table, "fid_retain") == ["a"]
    assert [row.label for row in only(tmp_path / "none").rows] == ["a", "b"]


def test_runs_of_any_budget_share_a_table_when_asked_to(tmp_path):
    for label, steps in (("a", 20), ("b", 20), ("a", 10)):
        for seed in (0, 1):
            metrics = {"eval/forget_rate": 0.1 * steps, "cost/network_evaluations": 64 * steps}
            schedule = {"update": {"lr_schedule": {"num_training_steps": steps}}}  # goes without saying
            plan = {"trainer": {"max_steps": steps, "batch_size": 4}, "method": schedule}
            make_run(tmp_path / str(steps), label, seed, metrics, config=plan)
    assert [table.title for table in comparison(tmp_path).tables] == ["steps 20", "steps 10"]
    table = only(tmp_path, any_budget=True)
    assert table.title == ""
    assert [row.label for row in table.rows] == ["a steps=10", "a steps=20", "b"]
    assert [cells["forget_rate"].n for cells in table.cells] == [2, 2, 2]
    make_run(tmp_path, "c", 0, {"eval/forget_rate": 0.1}, provenance=changed(sampler="ddpm"))
    assert len(comparison(tmp_path, any_budget=True).tables) == 2


def test_a_methods_own_batch_size_hides_no_budget(tmp_path):
    for batch_size in (4, 8):
        settings = {"trainer": {"max_steps": 10, "batch_size": batch_size}, "method": {"batch_size": 2}}
        make_run(tmp_path / str(batch_size), "esd", 0, {"eval/forget_rate": 0.1}, config=settings)
    found = comparison(tmp_path, any_budget=True)
    assert [row.label for row in found.tables[0].rows] == ["esd batch_size=4", "esd batch_size=8"]
    assert found.apart == []


def test_tables_keep_their_order_whenever_files_were_written(tmp_path):
    titles = []
    for order in ("abc", "cab", "bca"):
        for label in order:
            make_run(
                tmp_path / order, label, 0, {}, config={"trainer": {"max_steps": 10 * ord(label), "batch_size": 4}}
            )
        titles.append([table.title for table in comparison(tmp_path / order).tables])
    assert titles == [["steps 970", "steps 980", "steps 990"]] * 3


def test_a_fact_that_an_older_run_does_not_tell_separates_nothing(tmp_path):
    evaluation = {key: value for key, value in PROVENANCE["evaluation"].items() if key != "data"}
    make_run(tmp_path, "a", 0, {"eval/forget_rate": 0.1})
    make_run(tmp_path, "b", 0, {"eval/forget_rate": 0.9}, provenance={"evaluation": evaluation}, version=1)
    assert [row.label for row in only(tmp_path).rows] == ["a", "b"]


def test_settings_that_differ_within_a_label_make_rows_of_their_own(tmp_path):
    for lambd in (0.1, 0.5):
        for seed in (0, 1):
            settings = {"method": {"lambd": lambd, "seed": seed, "policy": f"runs/{seed}/policy"}}
            make_run(tmp_path / str(lambd), "siss", seed, {"eval/forget_rate": lambd}, config=settings)
    table = only(tmp_path)
    assert [row.label for row in table.rows] == ["siss lambd=0.1", "siss lambd=0.5"]
    assert [cells["forget_rate"].n for cells in table.cells] == [2, 2]


def test_a_class_that_has_moved_to_another_file_is_the_same_one(tmp_path):
    for seed, target in enumerate(("methods.posterior.ReTrack", "methods.retrack.ReTrack")):
        make_run(tmp_path, "retrack", seed, {"eval/forget_rate": 0.1}, config={"method": {"_target_": target}})
    (row,) = only(tmp_path).rows
    assert (row.label, sorted(row.seeds)) == ("retrack", [0, 1])
    make_run(
        tmp_path, "retrack", 2, {"eval/forget_rate": 0.1}, config={"method": {"_target_": "methods.siss.siss.SISS"}}
    )
    assert {row.label for row in only(tmp_path).rows} == {"retrack _target_=ReTrack", "retrack _target_=SISS"}


def test_two_settings_that_end_alike_keep_their_whole_names(tmp_path):
    for a, b in ((1, 2), (3, 4)):
        make_run(tmp_path / str(a), "m", 0, {}, config={"method": {"x": {"lr": a}, "y": {"lr": b, "_target_": "p.Q"}}})
    assert [row.label for row in only(tmp_path).rows] == ["m x.lr=1 y.lr=2", "m x.lr=3 y.lr=4"]


def test_paired_tests_are_corrected_over_the_methods(tmp_path):
    values = {"base_line": (0.5, 0.6, 0.7), "b": (0.1, 0.25, 0.3), "c": (0.5, 0.61, 0.69)}
    for method, of_seed in values.items():
        for seed, value in enumerate(of_seed):
            make_run(tmp_path, method, seed, {"eval/forget_rate": value})
    tests = only(tmp_path, baseline="base_line").tests
    assert set(tests) == {"b", "c"}
    b, c = tests["b"]["forget_rate"], tests["c"]["forget_rate"]
    assert b.difference == pytest.approx(-0.38333, abs=1e-4)
    assert b.adjusted == pytest.approx(2 * b.p)
    assert c.adjusted == pytest.approx(max(c.p, b.adjusted))


def test_verdicts_name_the_best_and_its_doubts(tmp_path):
    for seed in range(4):
        noise = (0.0, 0.02, -0.02, 0.01)[seed]
        make_run(tmp_path, "far", seed, {"eval/forget_rate": 0.9 + noise / 2, "cost/network_evaluations": 5.0})
        make_run(tmp_path, "near", seed, {"eval/forget_rate": 0.11 - 2 * noise, "cost/network_evaluations": 9.0})
        make_run(tmp_path, "best", seed, {"eval/forget_rate": 0.1 + noise, "cost/network_evaluations": 9.0})
    forgets, costs = only(tmp_path).verdicts
    assert (forgets.question, forgets.label, forgets.close) == ("forgets best", "best", ["near"])
    assert sentence(forgets) == "not distinguished by these seeds: near; distinguished from: far"
    assert (costs.label, costs.close, costs.unknown) == ("far", [], [])
    assert sentence(costs) == "the same difference in every seed, so without a test: best, near"
    forgets, _ = only(tmp_path, test="permutation").verdicts
    assert sentence(forgets) == "not distinguished by these seeds: near, far", "four pairs have 0.125 at the least"


def test_methods_of_one_value_are_equal_and_not_distinguished(tmp_path):
    for seed in range(3):
        for method in ("a", "b"):
            make_run(tmp_path, method, seed, {"eval/forget_rate": 0.0})
        make_run(tmp_path, "c", seed, {"eval/forget_rate": 0.5 + 0.01 * seed})
    table = only(tmp_path)
    (forgets,) = table.verdicts
    assert (forgets.label, forgets.equal, forgets.apart) == ("a", ["b"], ["c"])
    assert sentence(forgets) == "equal: b; distinguished from: c"
    (forgets,) = verdicts_of([row for row in table.rows if row.label != "b"], {})
    assert sentence(forgets) == "distinguished from: c"


@pytest.mark.parametrize("test", ["t", "permutation"])
def test_what_subtracting_leaves_is_no_difference(tmp_path, test):
    """0.05 and 0.06 are equally far from 0.055, and 0.45 and 0.55 from 0.5, but not in floating point."""
    for seed, (oracle, away) in enumerate([(0.055, 0.005), (0.13, 0.03), (0.07, 0.02), (3000.3, 0.7)]):
        for method, rate in (("above", oracle + away), ("below", oracle - away), ("far", oracle + 2)):
            auc = 0.5 + 0.05 * (seed + 1) * {"above": 1, "below": -1, "far": 1.5}[method]
            scores = {"oracle/forget_rate": oracle, "eval/forget_rate": round(rate, 9), "eval/mia_auc": round(auc, 9)}
            make_run(tmp_path, method, seed, scores)
    table = only(tmp_path, test=test)
    (forgets,) = table.verdicts
    assert (forgets.label, forgets.equal) == ("above", ["below"])
    assert best(table, "mia_auc") == ["above", "below"]
    above, below, _ = (badness(table.rows, row, "mia_auc") for row in table.rows if row.is_method)
    assert above == below


def test_tradeoffs_have_a_front_and_a_hypervolume(tmp_path):
    points = {"a": (0.1, 0.5), "b": (0.4, 0.9), "c": (0.5, 0.4)}
    for method, (forget, keep) in points.items():
        for seed in (0, 1):
            make_run(
                tmp_path, method, seed, {"eval/forget_rate": forget, "eval/retain_accuracy": keep + 0.1 * seed - 0.05}
            )
    (found,) = tradeoffs_of(only(tmp_path).rows)
    assert found.front == ["a", "b"]
    assert found.hypervolume == pytest.approx(0.9 * 0.5 + 0.6 * 0.4)
    by_seed = [0.9 * 0.45 + 0.6 * 0.4, 0.9 * 0.55 + 0.6 * 0.4]
    half = 12.7062 * (by_seed[1] - by_seed[0]) / 2
    assert found.interval == (pytest.approx(found.hypervolume - half, rel=1e-4), pytest.approx(1.0))
    assert found.worst == (1.0, 0.0)


def test_forgetting_more_than_the_oracle_is_no_tradeoff(tmp_path):
    for method, forget, keep in (("less", 0.0, 0.9), ("near", 0.28, 0.9)):
        scores = {"eval/forget_rate": forget, "eval/retain_accuracy": keep, "oracle/forget_rate": 0.3}
        make_run(tmp_path, method, 0, scores)
    (found,) = tradeoffs_of(only(tmp_path).rows)
    assert found.front == ["near"]
    assert found.hypervolume == pytest.approx(0.98 * 0.9)


AWFUL = {
    "eval/forget_rate": 1.0, "eval/restored_rate": 0.0, "eval/retain_accuracy": 0.0, "eval/fid_retain": 1e6,
    "eval/precision_retain": 0.0, "eval/recall_retain": 0.0, "eval/ssim_retain": -1.0,
}  # fmt: skip


@pytest.mark.parametrize("oracle", [True, False])
def test_an_awful_row_changes_no_other_ones_numbers(tmp_path, oracle):
    for method, good in (("a", 0.9), ("b", 0.8)):
        for seed in (0, 1, 2):
            kept = good + 0.02 * seed
            scores = {key: kept if key != "eval/fid_retain" else 0.1 / kept for key in AWFUL}
            scores["eval/forget_rate"] = 0.1 * kept
            scores["base/fid_retain"] = 0.1
            if oracle:
                scores |= {"oracle/forget_rate": 0.02, "oracle/restored_rate": 0.99}
            make_run(tmp_path, method, seed, scores)
    before = only(tmp_path)
    for seed in (0, 1, 2):
        make_run(tmp_path, "awful", seed, AWFUL)
    after = only(tmp_path)
    tradeoffs = tradeoffs_of(before.rows)
    assert {(found.forgetting, found.retention) for found in tradeoffs} >= {("forget_rate", "fid_retain")}
    assert all(0 < found.hypervolume < 1 for found in tradeoffs)
    assert tradeoffs_of(after.rows) == tradeoffs

    def cells(table):
        return {row.label: found for row, found in zip(table.rows, table.cells, strict=True)}

    assert {label: found for label, found in cells(after).items() if label != "awful"} == cells(before)


def test_an_axis_without_a_bound_ends_at_ten_times_the_bases(tmp_path):
    scores = {"eval/forget_rate": 0.0, "eval/fid_retain": 0.5}
    make_run(tmp_path / "told", "a", 0, scores | {"base/fid_retain": 0.1})
    (found,) = tradeoffs_of(only(tmp_path / "told").rows)
    assert (found.worst, found.hypervolume) == ((1.0, pytest.approx(1.0)), pytest.approx(0.5))
    make_run(tmp_path / "not told", "a", 0, scores)
    (found,) = tradeoffs_of(only(tmp_path / "not told").rows)
    assert (found.front, found.worst, found.hypervolume, found.interval) == (["a"], None, None, None)


def test_who_was_not_looked_at_for_rubble_is_named(tmp_path):
    """As in runs that were made before the judge could abstain."""
    for method, more in (("old", {}), ("new", {"eval/nothing_rate": 0.0})):
        make_run(tmp_path / method, method, 0, {"eval/forget_rate": 0.1} | more)

    def said(folder):
        return [remark for remark in only(folder).remarks if "nothing_rate" in remark]

    (sentence,) = said(tmp_path)
    assert "like a real image, of old:" in sentence
    (sentence,) = said(tmp_path / "old")
    assert "of any method:" in sentence
    assert said(tmp_path / "new") == []
    make_run(tmp_path / "new", "new", 1, {"eval/forget_rate": 0.1})
    (sentence,) = said(tmp_path / "new")
    assert "like a real image, of new (1 of 2 seeds):" in sentence


def test_who_draws_rubble_is_not_on_the_front(tmp_path):
    for method, rate, nothing in (("noise", 0.0, 1.0), ("good", 0.1, 0.0)):
        scores = {"eval/forget_rate": rate, "eval/retain_accuracy": 0.9, "eval/nothing_rate": nothing}
        make_run(tmp_path, method, 0, scores)
    (found,) = tradeoffs_of(only(tmp_path).rows)
    assert (found.front, found.hypervolume) == (["good"], pytest.approx(0.9 * 0.9))


def test_a_share_of_one_run_has_wilsons_interval_and_nothing_else_has_one(tmp_path):
    """Its samples are counted under the forget condition, or under the others, or in one pool."""
    scores = {"eval/forget_rate": 0.0, "eval/retain_accuracy": 1.0, "eval/fid_retain": 0.1, "eval/mia_auc": 0.5}
    scores |= {"eval/density_forget": 1.5, "eval/coverage_forget": 0.5}
    make_run(tmp_path / "two", "a", 0, scores, provenance=changed(num_samples={"forget": 100, "retain": 50}))
    (cells,) = only(tmp_path / "two").cells
    assert cells["forget_rate"].interval == wilson(0.0, 100)
    assert cells["retain_accuracy"].interval == wilson(1.0, 50)
    for column in ("fid_retain", "mia_auc", "density_forget", "coverage_forget"):
        assert cells[column].interval is None, column
    assert text(cells["forget_rate"]) == "0.000 [0.000, 0.037]"
    make_run(tmp_path / "pool", "a", 0, scores, provenance=changed(num_samples={"all": 200}))
    (cells,) = only(tmp_path / "pool").cells
    assert cells["forget_rate"].interval == wilson(0.0, 200)
    make_run(tmp_path / "odd", "a", 0, scores, provenance=changed(num_samples={"forget": "many"}))
    (cells,) = only(tmp_path / "odd").cells
    assert cells["forget_rate"].interval is None


def test_numbers_have_as_many_digits_as_they_need():
    assert [number(value) for value in (0.12345, -12.345, 1234.5)] == ["0.123", "-12.3", "1234"]
    assert text(Cell(12.34, None, 2, 2, False)) == "12.3"
    assert text(Cell(0.5, (0.25, 0.75), 2, 3, True)) == "0.500 ± 0.250 (2 of 3)"
    assert text(Cell(0.5, (0.25, 1.0), 3, 3, True)) == "0.500 [0.250, 1.000]"
