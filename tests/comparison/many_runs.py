"""Run folders by the hundred, for measuring: python tests/comparison/many_runs.py FOLDER."""

import json
import sys
from pathlib import Path

import numpy as np
import yaml
from PIL import Image

from unlearn_runner.comparison.packs import runs_in

ROOT = Path(__file__).parents[2]
METRICS = ("loss/retain", "loss/forget", "grad_norm/retain", "grad_norm/forget", "lambda/value", "weights/ess_retain")


def make_runs(folder: Path, labels: int, seeds: int, steps: int) -> None:
    """`labels` times `seeds` runs with a published run's config and summary, changed at random, and grids of noise."""
    published = dict(runs_in(ROOT / "docs" / "runs" / "digits_trousers.parquet"))["siss_0"]
    config, summary = yaml.safe_load(published["config.yaml"]), json.loads(published["summary.json"])
    for label in range(labels):
        for seed in range(seeds):
            random = np.random.default_rng([label, seed])
            run = folder / f"method_{label}_{seed}"
            (run / "samples").mkdir(parents=True)
            (run / "config.yaml").write_text(
                yaml.safe_dump({**config, "label": f"method_{label}", "seed": seed}, sort_keys=False)
            )
            metrics = {key: value * float(random.uniform(0.8, 1.0)) for key, value in summary["metrics"].items()}
            (run / "summary.json").write_text(json.dumps({**summary, "metrics": metrics}))
            values = random.random((steps, len(METRICS)))
            with open(run / "metrics.jsonl", "w") as file:
                for step in range(1, steps + 1):
                    line = {"step": step, "seconds": 0.2 * step, "images": 128 * step}
                    file.write(json.dumps(line | dict(zip(METRICS, values[step - 1].tolist(), strict=True))) + "\n")
                    if step % 50 == 0:
                        file.write(json.dumps({"step": step, "eval/forget_rate": float(random.random())}) + "\n")
            grid = np.full((10 * 50 + 2, 20 * 50 + 2, 3), 128, dtype=np.uint8)
            for row in range(10):
                for column in range(20):
                    picture = random.integers(0, 256, (16, 16), dtype=np.uint8).repeat(3, 0).repeat(3, 1)
                    grid[row * 50 + 2 : row * 50 + 50, column * 50 + 2 : column * 50 + 50] = picture[..., None]
            for name in ("before", "after"):
                Image.fromarray(grid).save(run / "samples" / f"{name}.png")


if __name__ == "__main__":
    make_runs(Path(sys.argv[1]), labels=100, seeds=5, steps=2000)
