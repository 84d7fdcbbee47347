"""What the tests share: a composed configuration, a small dataset, a small model."""

import os
from pathlib import Path

import pytest
import torch
from hydra import compose, initialize_config_dir
from hydra.core.hydra_config import HydraConfig
from omegaconf import OmegaConf

from unlearn_runner.cli import configuration

SHARED = Path(__file__).parents[2] / "shared" / "data"  # real images, where there are some
ROOT = Path(__file__).parents[1]

os.environ["WANDB_MODE"] = "offline"
# two processes with two threads each would slow each other down tenfold on two cores
torch.set_num_threads(1 if "PYTEST_XDIST_WORKER" in os.environ else min(2, os.cpu_count() or 1))


def options(group: str) -> list[str]:
    """The names of a configuration group's options."""
    return sorted(path.stem for path in (ROOT / "conf" / group).glob("*.yaml"))


def marked(cases, slow) -> list:
    """Cases of a test, each the tuple of its parameters; those in `slow` are slow ones."""
    return [pytest.param(*case, marks=[pytest.mark.slow] * (case in slow)) for case in cases]


COMPLETE = [method for method in options("method") if method != "given"]  # it wants a folder: methods/test_given.py


@pytest.fixture(scope="session")
def shared_cache(tmp_path_factory) -> Path:
    """One cache of base models and classifiers for the whole session."""
    return tmp_path_factory.mktemp("cache")


@pytest.fixture
def composed(tmp_path, shared_cache):
    """`composed("method=siss", ...)`: the resolved configuration of a debug run below tmp_path."""

    def compose_run(*overrides: str, debug: bool = True) -> dict:
        small = ["debug=default"] if debug else []
        with initialize_config_dir(str(ROOT / "conf"), version_base="1.3"):
            cfg = compose(
                "train",
                [
                    *small,
                    "logger=jsonl",
                    f"paths.outputs={tmp_path / 'outputs'}",
                    f"paths.cache={shared_cache}",
                    *overrides,
                ],
                return_hydra_config=True,
            )
        HydraConfig.instance().set_config(cfg)
        OmegaConf.set_readonly(cfg.hydra, False)
        container = OmegaConf.masked_copy(cfg, [key for key in cfg if key != "hydra"])
        return configuration(container)

    return compose_run


@pytest.fixture
def run(composed, tmp_path):
    """`run("method=siss", folder="a")`: a whole debug run in this process; returns its folder."""
    from unlearn_runner import assembly

    def run_once(*overrides: str, folder: str = "run") -> Path:
        path = tmp_path / "outputs" / folder
        path.mkdir(parents=True, exist_ok=True)
        assembly.unlearn(composed(*overrides), path)
        return path

    return run_once


@pytest.fixture(scope="session")
def digits():
    """The default dataset, loaded."""
    from unlearn_runner.data.digits_trousers import DigitsTrousers

    return DigitsTrousers().load()


def names(num_labels: int | None) -> tuple[str, ...] | None:
    """Of so many labels."""
    return None if num_labels is None else tuple(map(str, range(num_labels)))


@pytest.fixture
def tiny_network():
    """`tiny_network(...)`: a DDPM small enough to be trained in milliseconds."""
    from unlearn_runner.models.ddpm import build_ddpm

    def build(image_shape=(1, 8, 8), num_labels=10, seed=0, **more):
        settings = {"block_out_channels": [8, 8], "attention": [False, False], "norm_num_groups": 4} | more
        return build_ddpm(image_shape, names(num_labels), seed, "auto", **settings)

    return build


@pytest.fixture
def tiny_vae():
    """`tiny_vae(...)`: a VAE small enough to be trained in milliseconds."""
    from unlearn_runner.models.vae import build_vae

    def build(image_shape=(1, 8, 8), num_labels=10, seed=0, **more):
        settings = {"latent_size": 3, "hidden_size": 16, "block_out_channels": [8, 8], "norm_num_groups": 4} | more
        return build_vae(image_shape, names(num_labels), seed, "auto", **settings)

    return build


@pytest.fixture(scope="session")
def clip_weights(tmp_path_factory):
    """A tiny CLIP that open_clip builds from a configuration, and its weights in a file."""
    import json

    import open_clip

    folder = tmp_path_factory.mktemp("clip")
    config = {
        "embed_dim": 12,
        "vision_cfg": {"image_size": 32, "layers": 1, "width": 64, "patch_size": 16},
        "text_cfg": {"context_length": 8, "vocab_size": 64, "width": 64, "heads": 1, "layers": 1},
    }
    (folder / "tiny-for-tests.json").write_text(json.dumps(config))
    open_clip.add_model_config(folder)
    torch.manual_seed(0)
    torch.save(open_clip.create_model("tiny-for-tests").state_dict(), folder / "weights.pt")
    return folder / "weights.pt"


def weights_of(folder: Path) -> dict[str, torch.Tensor]:
    """The weights in a run's model/."""
    from safetensors.torch import load_file

    (file,) = (folder / "model").glob("*/diffusion_pytorch_model.safetensors")
    return load_file(file)


def assert_same_bits(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor]) -> None:
    """Equal keys, and equal tensors to the bit."""
    assert a.keys() == b.keys()
    for key in a:
        assert torch.equal(a[key], b[key]), key
