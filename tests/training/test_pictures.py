"""Pictures of a run's numbers."""

import numpy as np
from PIL import Image

from unlearn_runner.training.pictures import draw_lambda


def line(step, value, **more):
    return {"step": step, "lambda/value": value, **more}


def test_lambda_over_steps(tmp_path):
    assert draw_lambda([{"step": 1, "loss/retain": 1.0}, *(line(n, n / 10) for n in range(1, 10))], tmp_path / "a.png")
    assert np.asarray(Image.open(tmp_path / "a.png").convert("L")).std() > 5


def test_lambda_over_timesteps_stands_beside_it(tmp_path):
    over_t = {f"lambda/at/{level:.2f}": level for level in (0.25, 0.5, 0.75)}
    posterior = {"lambda/posterior_mean": 0.3, "lambda/posterior_std": 1.0}
    assert draw_lambda([line(n, n / 10, **over_t, **posterior) for n in range(1, 10)], tmp_path / "b.png")
    wide, narrow = Image.open(tmp_path / "b.png").size[0], tmp_path / "c.png"
    assert draw_lambda([line(n, n / 10) for n in range(1, 10)], narrow)
    assert wide > 1.5 * Image.open(narrow).size[0]


def test_static_lambda_has_no_picture(tmp_path):
    assert not draw_lambda([line(n, 0.5) for n in range(5)], tmp_path / "a.png")
    assert not draw_lambda([], tmp_path / "a.png")
    assert not any(tmp_path.iterdir())
