"""The model of a step's cost: two cases settle it, the others follow; its table says how far off they are."""

import pytest
import scaling
from scaling import Case, Cost, Model


def test_two_cases_settle_the_model():
    true = Model(fixed=0.05, speed=2e10, exchange=1e-9, cores=2)
    small, large = Cost(1e9, 4e6), Cost(8e9, 4e6)
    found = scaling.settled((0.05 + 0.05, small), (0.05 + 0.4, large), 1e-9, 2)
    assert found == pytest.approx(true)
    assert found.seconds(Case(processes=2), large) == pytest.approx(0.05 + 0.2 + 0.004), "shared, and exchanged"
    assert found.seconds(Case(jobs=2), large) == pytest.approx(0.45), "a core for each"
    assert found.seconds(Case(jobs=4), large) == pytest.approx(0.9), "two on each"


def test_same_steps_are_counted_once():
    assert Case(16, 40, processes=2, jobs=4).alone == Case(16, 40)


def test_operations_are_counted():
    """Those of naive deletion, whose passes are of the whole batch: three times forward, but for the first layer."""
    two, four = (scaling.cost_of("naive_deletion", "small", Case(batch, 8)) for batch in (2, 4))
    assert four.operations == pytest.approx(2 * two.operations, rel=0.01)
    assert four.exchanged == two.exchanged == pytest.approx(4 * 1.1e6, rel=0.05)
    assert scaling.cost_of("siss", "small", Case(2, 8)).exchanged == 2 * two.exchanged


def test_table_says_how_far_off_predictions_are():
    rows = [
        {"case": Case(batch_size=8), "seconds": 0.1, "operations": 1e9, "predicted": 0.1},
        {"case": Case(jobs=2), "seconds": 0.5, "operations": 8e9, "predicted": 0.45},
    ]
    found = {"method": "siss", "network": "small", "rounds": 3, "steps": 5, "cases": rows,
             "model": {"fixed": 0.05, "speed": 2e10, "exchange": 1e-9, "cores": 2}}  # fmt: skip
    text = scaling.markdown(found)
    assert "50 ms a step, 20.0 GFLOP/s, 1000 MB/s" in text
    assert "| 8 | 28x28 | 1 | 1 | 1.0 | 100 | settles the model | |" in text
    assert "| 64 | 28x28 | 1 | 2 | 8.0 | 500 | 450 | -10 % |" in text
