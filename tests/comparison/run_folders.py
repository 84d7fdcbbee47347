"""Run folders made by hand."""

import json
from pathlib import Path

import numpy as np
import yaml
from PIL import Image

PROVENANCE = {
    "evaluation": {
        "data": {"name": "digits", "fingerprint": "aa"},
        "features": {"extractor": "classifiers/1"},
        "num_samples": {"forget": 100},
        "sampler": "ddim",
        "num_inference_steps": 25,
        "seconds": {"sampling": 1.0},
    }
}


def make_run(root: Path, method: str, seed: int, metrics: dict, status="finished", lines=(), **more) -> Path:
    """A run's folder; `more` are `provenance`, `version`, `oracles`, and `config`, merged into the configuration."""
    folder = root / f"{method}_{seed}_{status}"
    folder.mkdir(parents=True)
    config = {
        "choices": {"method": method, "dataset": "digits", "model": "tiny"},
        "seed": seed,
        "trainer": {"max_steps": 10, "batch_size": 4},
    }
    (folder / "config.yaml").write_text(yaml.safe_dump(config | more.get("config", {})))
    content = {"status": status, "metrics": metrics, "provenance": more.get("provenance", PROVENANCE)}
    content |= {"version": more.get("version", 2)} | ({"oracles": more["oracles"]} if "oracles" in more else {})
    (folder / "summary.json").write_text(json.dumps(content))
    if lines:
        (folder / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    return folder


def changed(**evaluation) -> dict:
    """PROVENANCE with another evaluation."""
    return {"evaluation": PROVENANCE["evaluation"] | evaluation}


def save_grid(folder: Path, name: str, shade: int | list[int], columns: int = 10) -> None:
    """A grid of three rows, of one shade or each of its own, as RunFolder.save_grid draws them."""
    shades = [shade] * 3 if isinstance(shade, int) else shade
    grid = np.full((len(shades) * 50 + 2, columns * 50 + 2, 3), 128, dtype=np.uint8)
    for row, of_row in enumerate(shades):
        for column in range(columns):
            grid[row * 50 + 2 : row * 50 + 50, column * 50 + 2 : column * 50 + 50] = of_row
    (folder / "samples").mkdir(exist_ok=True)
    Image.fromarray(grid).save(folder / "samples" / f"{name}.png")
