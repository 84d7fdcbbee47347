"""Whatever happens to what is cached: it heals, with a line, or one sentence names it. Of every kind of entry, in every
way that files go wrong.
"""

import json
import random
import shutil
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import marked, names
from filelock import FileLock
from PIL import Image
from pipelines import tiny
from rich.console import Console

from unlearn_runner import cache as caching
from unlearn_runner.cache import cached
from unlearn_runner.data.forget_retain import Dataset, ForgetRetain, LabelledImages
from unlearn_runner.data.image_folder import ImageFolder
from unlearn_runner.data.sd_concepts import SDConcepts
from unlearn_runner.errors import ConfigurationError
from unlearn_runner.evaluation.classifier import ClassifierRecipe, trained_judge
from unlearn_runner.evaluation.evaluator import Evaluator, Sampling
from unlearn_runner.evaluation.metrics import FID, Rates
from unlearn_runner.methods.method import Update
from unlearn_runner.models.clip import small_clip
from unlearn_runner.models.vae import build_vae
from unlearn_runner.spec import DataSpec
from unlearn_runner.training.clip import ClipTraining, trained_clip
from unlearn_runner.training.pretraining import Pretraining, _Learning, _pretrained_autoencoder, pretrained
from unlearn_runner.training.signals import Interrupts

CPU = torch.device("cpu")
QUIET = Console(quiet=True)
RECIPE = Pretraining(partial(Update, optimizer=partial(torch.optim.SGD, lr=1e-3)), max_steps=2, batch_size=2)


def dataset(channels: int = 1, side: int = 8, each: int = 6) -> ForgetRetain:
    """Two labels, one of which is to be forgotten, with pictures of noise."""
    generator = torch.Generator().manual_seed(0)

    def images(label: int, n: int) -> LabelledImages:
        pixels = torch.randint(256, (n, channels, side, side), generator=generator, dtype=torch.uint8)
        return LabelledImages(pixels, torch.full((n,), label), torch.full((n,), label))

    spec = DataSpec("noise", (channels, side, side), ("a", "b"), ("a", "b"), (1,), None, False)
    return ForgetRetain(spec, images(1, each), images(0, each), images(1, 2), images(0, 2))


class Corpus(Dataset):
    """A dataset as a recipe has it."""

    def __init__(self):
        self.spec = self.load().spec

    def load(self) -> ForgetRetain:
        return dataset(channels=3, side=16)


def bases(root: Path, folder: Path, population: str = "all") -> Any:
    def build(seed, spec):
        return build_vae(spec.image_shape, names(2), seed, "auto", 2, 8, [4, 4], norm_num_groups=2)

    key = {"network": {}, "pretraining": {}}
    network = build(1, dataset().spec)
    network.load(pretrained(population, RECIPE, key, build, dataset(), root, Interrupts(), QUIET))
    return network.state_dict()


def autoencoders(root: Path, folder: Path) -> Any:
    learn = _Learning(dataset(channels=3, side=16), Interrupts(), QUIET)
    network = tiny(vae={"block_out_channels": [4, 4], "norm_num_groups": 2})
    vae = _pretrained_autoencoder(RECIPE, {}, network, learn, root)
    return vae.state_dict() | {"scale": vae.config.scaling_factor}


def classifiers(root: Path, folder: Path) -> Any:
    return trained_judge(dataset(), ClassifierRecipe(8, 8, 2, 4), root, CPU).recognizer.state_dict()


def clips(root: Path, folder: Path) -> Any:
    clip = small_clip(0, width=16, layers=1, heads=2, text_width=16, text_layers=1, embed_dim=8)
    clip.load(trained_clip(clip, ClipTraining(Corpus(), max_steps=1, groups=1), {}, root, lambda step, values: None))
    return clip.state_dict()


def evaluations(root: Path, folder: Path) -> Any:
    judge = trained_judge(dataset(), ClassifierRecipe(8, 8, 2, 4), root, CPU)
    sampling = Sampling(num_samples=9, num_inference_steps=1)
    evaluator = Evaluator(dataset(), judge, {"rates": Rates(), "fid": FID(min_samples=3)}, sampling, root)
    network = build_vae((1, 8, 8), names(2), 0, "auto", 2, 8, [4, 4], norm_num_groups=2)
    found = evaluator.once(network)
    return {"grid": found.grid, "features": evaluator.references["forget"].features, **found.scores}


def drawn(root: Path, folder: Path) -> Any:
    concepts = SDConcepts("seven", ["one", "two"], ["a {}"], ["the {}"], str(root), source="base", num_images=5)

    def draw(labels):
        return labels.float()[:, None, None, None].expand(-1, 3, 16, 16) / 3

    return {"pixels": concepts.load_from(draw, {"model": "x"}).forget.pixels}


def images(root: Path, folder: Path) -> Any:
    for name, count in (("forget", 3), ("retain", 4)):
        if not (folder / name).exists():
            (folder / name).mkdir(parents=True)
            for number in range(count):
                Image.new("L", (8, 8), 20 * number + count).save(folder / name / f"{number}.png")
    places = (str(folder / "forget"), str(folder / "retain"), str(root))
    data = ImageFolder(*places, image_size=8, max_resident_gb=0.0).load()
    return {"forget": data.forget.pixels, "retain": data.retain.pixels}


KINDS = {
    "bases": bases,
    "oracles": partial(bases, population="retain"),
    "autoencoders": autoencoders,
    "classifiers": classifiers,
    "clips": clips,
    "evaluations": evaluations,
    "references": evaluations,
    "drawn": drawn,
    "images": images,
}


# What can happen to an entry, or to one of its files, chosen at random


def truncate(entry: Path, file: Path, chance: random.Random) -> None:
    file.write_bytes(file.read_bytes()[: chance.randrange(file.stat().st_size)])


def flip_a_bit(entry: Path, file: Path, chance: random.Random) -> None:
    content = bytearray(file.read_bytes())
    content[chance.randrange(len(content))] ^= 1 << chance.randrange(8)
    file.write_bytes(content)


def delete(entry: Path, file: Path, chance: random.Random) -> None:
    file.unlink()


def empty(entry: Path, file: Path, chance: random.Random) -> None:
    file.write_bytes(b"")


def garbage(entry: Path, file: Path, chance: random.Random) -> None:
    file.write_text(chance.choice(["{", "[]", "null", '{"files": {}}', '{"files": 3}', "\x00\xff"]))


def folder_for_file(entry: Path, file: Path, chance: random.Random) -> None:
    file.unlink()
    file.mkdir()


def link_to_nothing(entry: Path, file: Path, chance: random.Random) -> None:
    file.unlink()
    file.symlink_to("nowhere")


def without_key(entry: Path, file: Path, chance: random.Random) -> None:
    (entry / "key.json").unlink()


def key_of_another(entry: Path, file: Path, chance: random.Random) -> None:
    (entry / "key.json").write_text("{}")


def garbled_manifest(entry: Path, file: Path, chance: random.Random) -> None:
    garbage(entry, entry / "manifest.json", chance)


def old_and_truncated(entry: Path, file: Path, chance: random.Random) -> None:
    (entry / "manifest.json").unlink(missing_ok=True)
    weights = max(entry.rglob("*"), key=lambda path: path.stat().st_size if path.is_file() else 0)
    weights.write_bytes(weights.read_bytes()[:-9])


def file_for_entry(entry: Path, file: Path, chance: random.Random) -> None:
    shutil.rmtree(entry)
    entry.write_text("x")


def empty_entry(entry: Path, file: Path, chance: random.Random) -> None:
    shutil.rmtree(entry)
    entry.mkdir()


FILE_BY_FILE = (truncate, flip_a_bit, delete, empty, garbage, folder_for_file, link_to_nothing)
AS_A_WHOLE = (
    without_key, key_of_another, garbled_manifest, old_and_truncated, file_for_entry, empty_entry,
)  # fmt: skip


def leftovers(entry: Path, chance: random.Random) -> None:
    """Instead of the entry, what a process that died while it made it can leave: half a folder, its lock."""
    shutil.rmtree(entry)
    unfinished = entry.with_suffix(".partial")
    lock = Path(f"{entry}.lock")
    lock.unlink(missing_ok=True)
    if chance.random() < 0.3:
        unfinished.write_text("no folder")
        lock.mkdir()
        return
    lock.write_text("999999999 of a host that is no more")
    step = unfinished / "checkpoints" / "step_000001"
    step.mkdir(parents=True)
    (step / "manifest.json").write_text(chance.choice(["{", "[]", '{"files": {"state.pt": 3}}', '{"step": 1}']))
    (step / "state.pt").write_bytes(b"\x00" * 3)
    for name in ("model", "pixels.uint8", "images.safetensors", "classifier.safetensors", "judged.safetensors"):
        (unfinished / name).mkdir() if chance.random() < 0.5 else (unfinished / name).write_text("x")


def same(a: dict, b: dict) -> bool:
    return a.keys() == b.keys() and all(
        torch.equal(value, b[key]) if isinstance(value, torch.Tensor) else value == b[key] for key, value in a.items()
    )


def only_entry(root: Path, kind: str, chance: random.Random) -> Path:
    return chance.choice([path for path in sorted((root / kind).iterdir()) if path.is_dir() and "." not in path.name])


@pytest.mark.parametrize(
    "kind", marked([(kind,) for kind in KINDS], {(kind,) for kind in KINDS} - {("drawn",), ("images",)})
)
def test_damaged_entries_are_made_again(tmp_path, capsys, kind):
    """To the same content, with a line that says which it was; what was damaged lies beside."""
    use, root, chance = KINDS[kind], tmp_path / "cache", random.Random(kind)
    right = use(root, tmp_path)
    for damage in (*FILE_BY_FILE, *AS_A_WHOLE):
        entry = only_entry(root, kind, chance)
        file = chance.choice(sorted(path for path in entry.rglob("*") if path.is_file()))
        if damage is garbage:
            file = chance.choice(sorted(entry.rglob("*.json")))
        damage(entry, file, chance)
        if damage is delete and file.name == "manifest.json":
            continue  # then it is as old as those that had none
        capsys.readouterr()
        assert same(use(root, tmp_path), right), damage.__name__
        assert f"{entry} is damaged" in capsys.readouterr().out, damage.__name__
        assert list(entry.parent.glob(f"{entry.name}.damaged-*")), damage.__name__
        assert same(use(root, tmp_path), right)
        assert "damaged" not in capsys.readouterr().out, "it is whole again"
    for _ in range(3):
        leftovers(only_entry(root, kind, chance), chance)
        assert same(use(root, tmp_path), right)


def test_an_entry_from_before_digests_is_used_and_gets_some(tmp_path, capsys):
    right = bases(tmp_path, tmp_path)
    [manifest] = tmp_path.glob("bases/*/manifest.json")
    manifest.unlink()
    assert same(bases(tmp_path, tmp_path), right)
    assert json.loads(manifest.read_text())["files"].keys() > {"key.json", "model/vae/config.json"}
    (manifest.parent / "model" / "vae" / "config.json").write_text("{}")
    manifest.unlink()
    assert same(bases(tmp_path, tmp_path), right)
    assert "is damaged" in capsys.readouterr().out


def test_a_base_training_goes_on_or_begins_anew(tmp_path, capsys, monkeypatch):
    """What an interrupted one leaves is used to the bit; if it is damaged, the training begins anew, with a line."""
    from unlearn_runner.methods.denoising import Denoising

    right = bases(tmp_path / "whole", tmp_path)
    steps, step = [], Denoising.step

    def interrupted(self, batch):
        steps.append(1)
        if len(steps) == 2:
            raise KeyboardInterrupt
        return step(self, batch)

    monkeypatch.setattr(Denoising, "step", interrupted)
    for harm in (False, True):
        root = tmp_path / str(harm)
        steps.clear()
        with pytest.raises(KeyboardInterrupt):
            bases(root, tmp_path)
        [unfinished] = root.glob("bases/*.partial")
        if harm:
            (unfinished / "checkpoints" / "step_000001").mkdir(parents=True)
        assert same(bases(root, tmp_path), right)
        assert ("the training begins anew" in capsys.readouterr().out) == harm
        assert [path.name for path in root.glob("bases/*.partial.damaged-1")] == [f"{unfinished.name}.damaged-1"] * harm


def test_a_cache_that_cannot_be_written_serves_what_it_has(tmp_path, monkeypatch):
    def make(folder: Path) -> None:
        (folder / "x").write_text("1")

    there = cached(tmp_path, "kind", {"a": 1}, make)

    def refuses(*_: Any, **__: Any) -> None:
        raise PermissionError(13, "Permission denied", str(tmp_path))

    for name in ("mkdir", "write_text"):
        monkeypatch.setattr(Path, name, refuses)
    for name in ("replace", "rename", "unlink"):
        monkeypatch.setattr(caching.os, name, refuses)
    monkeypatch.setattr(FileLock, "acquire", refuses)
    assert cached(tmp_path, "kind", {"a": 1}, make) == there
    with pytest.raises(ConfigurationError, match=r"cannot be written \(Permission denied\).*paths\.cache=<folder>"):
        cached(tmp_path, "kind", {"a": 2}, make)
    monkeypatch.undo()
    (there / "x").write_text("2")
    monkeypatch.setattr(caching.os, "replace", refuses)
    with pytest.raises(ConfigurationError, match=r"cannot be written .* for x has changed"):
        cached(tmp_path, "kind", {"a": 1}, make)


def test_a_place_that_is_no_folder_gets_one_sentence(tmp_path):
    (tmp_path / "cache").write_text("a file")
    with pytest.raises(ConfigurationError, match=r"paths\.cache=<folder>"):
        cached(tmp_path / "cache", "kind", {}, lambda folder: None)
