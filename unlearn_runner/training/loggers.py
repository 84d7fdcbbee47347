"""Where a run shows itself besides its folder: Weights & Biases, TensorBoard, or nowhere."""

import os
import secrets
from abc import ABC, abstractmethod
from pathlib import Path
from typing import Any, final

from unlearn_runner.errors import ConfigurationError


class Logger(ABC):
    """One run's dashboard. Opened by `start`, always closed by `finish`, also when the run fails."""

    @abstractmethod
    def start(self, folder: Path, config: dict[str, Any]) -> None: ...

    @abstractmethod
    def log(self, step: int, values: dict[str, float]) -> None: ...

    @abstractmethod
    def image(self, step: int, key: str, path: Path) -> None: ...

    @abstractmethod
    def table(self, key: str, columns: list[str], rows: list[list[Any]]) -> None: ...

    @abstractmethod
    def finish(self, summary: dict[str, float], failed: bool) -> None: ...


@final
class NoLogger(Logger):
    """The run folder alone."""

    def start(self, folder: Path, config: dict[str, Any]) -> None:
        pass

    def log(self, step: int, values: dict[str, float]) -> None:
        pass

    def image(self, step: int, key: str, path: Path) -> None:
        pass

    def table(self, key: str, columns: list[str], rows: list[list[Any]]) -> None:
        pass

    def finish(self, summary: dict[str, float], failed: bool) -> None:
        pass


@final
class WandbLogger(Logger):
    """Weights & Biases; `mode` online, offline or disabled. Offline runs are uploaded later by `wandb sync`.

    A run folder has one W&B run: its id is kept in the folder, so a resumed run goes on in the same one. An agent of a
    W&B sweep gives its own.
    """

    def __init__(
        self,
        project: str,
        mode: str = "offline",
        entity: str | None = None,
        group: str | None = None,
        job_type: str | None = None,
        tags: list[str] | None = None,
    ):
        if mode not in ("online", "offline", "disabled"):
            raise ConfigurationError(f"logger.mode (or WANDB_MODE) must be online, offline or disabled, got '{mode}'.")
        self.mode = mode
        self.settings = {
            "project": project, "entity": entity, "group": group, "job_type": job_type, "tags": tags,
        }  # fmt: skip
        self.run: Any = None

    def start(self, folder: Path, config: dict[str, Any]) -> None:
        import wandb

        id_file = folder / "wandb" / "run_id"
        id_file.parent.mkdir(exist_ok=True)
        resumed = id_file.is_file()
        of_agent = os.environ.get("WANDB_RUN_ID") if "WANDB_SWEEP_ID" in os.environ else None
        run_id = id_file.read_text() if resumed else of_agent or secrets.token_hex(4)
        id_file.write_text(run_id)
        try:
            self.run = wandb.init(
                **self.settings,
                id=run_id,
                name=f"{folder.parent.name}/{folder.name}",
                dir=str(folder),
                config=config,
                mode=self.mode,
                resume="allow" if resumed and self.mode == "online" else None,
                settings=wandb.Settings(silent=True, console="off", x_disable_stats=True),
            )
        except wandb.errors.UsageError as error:
            raise ConfigurationError(
                f"Weights & Biases: {str(error).splitlines()[0]} Log in with `wandb login`, or take WANDB_MODE=offline."
            ) from error
        self.run.define_metric("step")
        for pattern in ("*", "eval/*", "base/*", "oracle/*"):
            self.run.define_metric(pattern, step_metric="step")

    def log(self, step: int, values: dict[str, float]) -> None:
        self.run.log({"step": step, **values})

    def image(self, step: int, key: str, path: Path) -> None:
        import wandb

        self.run.log({"step": step, key: wandb.Image(str(path))})

    def table(self, key: str, columns: list[str], rows: list[list[Any]]) -> None:
        import wandb

        self.run.log({key: wandb.Table(columns=columns, data=rows)})

    def finish(self, summary: dict[str, float], failed: bool) -> None:
        if self.run is not None:
            self.run.summary.update(summary)
            self.run.finish(exit_code=int(failed))
            self.run = None


@final
class TensorBoardLogger(Logger):
    """TensorBoard event files in the run folder's `tensorboard/`; needs the extra `tensorboard`."""

    def __init__(self) -> None:
        try:
            from torch.utils.tensorboard import SummaryWriter
        except ImportError as error:
            raise ConfigurationError(
                "logger=tensorboard needs the package tensorboard: pip install 'unlearn_runner[tensorboard]'."
            ) from error
        self._writer_class = SummaryWriter
        self.writer: Any = None

    def start(self, folder: Path, config: dict[str, Any]) -> None:
        self.writer = self._writer_class(str(folder / "tensorboard"))

    def log(self, step: int, values: dict[str, float]) -> None:
        for key, value in values.items():
            self.writer.add_scalar(key, value, step)

    def image(self, step: int, key: str, path: Path) -> None:
        import numpy as np
        from PIL import Image

        self.writer.add_image(key, np.asarray(Image.open(path).convert("RGB")), step, dataformats="HWC")

    def table(self, key: str, columns: list[str], rows: list[list[Any]]) -> None:
        lines = [columns, ["---"] * len(columns), *rows]
        self.writer.add_text(key, "\n".join("|".join(map(str, line)) for line in lines))

    def finish(self, summary: dict[str, float], failed: bool) -> None:
        if self.writer is not None:
            self.writer.close()
            self.writer = None
