"""One command: compose a configuration, make a model forget, measure it. `python -m unlearn_runner` from any folder,
or `python train.py` in a checkout. See README.md.
"""

from contextlib import suppress
from pathlib import Path

import hydra
from hydra.core.hydra_config import HydraConfig
from omegaconf import DictConfig

from unlearn_runner.cli import configuration, failure_on_record, one_sentence
from unlearn_runner.trust import CONF


@hydra.main(version_base="1.3", config_path=str(CONF), config_name="train")
def main(cfg: DictConfig) -> float | tuple[float, ...] | None:
    """Returns the scores that `objective` names, for a sweeper that looks for the best."""
    fresh_folder = Path(HydraConfig.get().runtime.output_dir)
    try:
        with failure_on_record():
            return run(configuration(cfg), fresh_folder)
    finally:
        with suppress(OSError):  # Hydra made it and the two around it; a mistake or a resumed run leaves them empty
            for folder in (fresh_folder, *fresh_folder.parents[:2]):
                folder.rmdir()


def run(cfg: dict, fresh_folder: Path) -> float | tuple[float, ...] | None:
    """`unlearn`, unless that is to be skipped, in this process, in those that torchrun has started together, or in as
    many new ones as asked for.
    """
    from unlearn_runner import assembly  # only now, as all that is heavy: what is wrong with the command was said
    from unlearn_runner.distributed import joined, launch, started_outside
    from unlearn_runner.training.run_folder import finished, objectives

    processes = assembly.make(cfg["hardware"]).processes
    places = (Path(cfg["paths"]["outputs"]), fresh_folder.parent)
    folder = finished(places, cfg) if cfg.get("skip_finished") else None
    if folder is not None:
        print(f"skipped, for it is finished: {folder}")
    elif processes > 1 and started_outside() is None:
        folder = launch(assembly.__file__, "unlearn", (cfg, fresh_folder), processes)
    else:
        with joined():
            folder = assembly.unlearn(cfg, fresh_folder)
    return objectives(folder, cfg.get("objective"))


def command() -> None:
    """The command line."""
    with one_sentence():
        main()


if __name__ == "__main__":
    command()
