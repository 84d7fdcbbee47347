"""Where a run shows itself besides its folder: Weights & Biases or TensorBoard."""

import os
import re
import secrets
import shlex
import sys
from abc import ABC, abstractmethod
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any, TypeAlias, final

from unlearn_runner.errors import ConfigurationError, first_line

Name: TypeAlias = str | int | float  # a name that looks like a number is a name
MODES = {"dryrun": "offline", "run": "online"}  # wandb's old names
INIT_TIMEOUT = 30.0  # seconds that a server may take to answer, unless WANDB_INIT_TIMEOUT says another number


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
class SafeLogger(Logger):
    """A logger that may fail without ending the run: that is said once, and the run goes on without it.

    Only what is the user's to mend, a ConfigurationError of `start`, ends the run.
    """

    def __init__(self, logger: Logger, say: Callable[[str], Any]):
        self.logger = logger
        self.say = say
        self.failed = False

    def _try(self, action: Callable[..., None], *arguments: Any) -> None:
        if self.failed:
            return
        try:
            action(*arguments)
        except ConfigurationError:
            raise
        except Exception as error:  # whatever a dashboard's library, its server or a full disk raises
            self.failed = True
            self.say(
                f"{type(self.logger).__name__} failed ({first_line(error)}); the run goes on without it, "
                "its folder has everything."
            )

    def start(self, folder: Path, config: dict[str, Any]) -> None:
        self._try(self.logger.start, folder, config)

    def log(self, step: int, values: dict[str, float]) -> None:
        self._try(self.logger.log, step, values)

    def image(self, step: int, key: str, path: Path) -> None:
        self._try(self.logger.image, step, key, path)

    def table(self, key: str, columns: list[str], rows: list[list[Any]]) -> None:
        self._try(self.logger.table, key, columns, rows)

    def finish(self, summary: dict[str, float], failed: bool) -> None:
        if self.failed:
            with suppress(Exception):  # what it got before is worth closing
                self.logger.finish(summary, failed)
        self._try(self.logger.finish, summary, failed)


@final
class WandbLogger(Logger):
    """Weights & Biases. Offline runs are uploaded later by `wandb sync`.

    A run folder has one W&B run: its id is kept in the folder, so a resumed run goes on in the same one. An agent of a
    W&B sweep gives its own.

    Args:
        project, entity, group, job_type: empty is none; a project has at most 128 letters, none of `/\\#?%:`.
        tags: a list, or a text with commas; W&B takes 64 letters of each, the rest is cut off.
        name: of the run; None: the last two folders of the run folder.
        mode: online, offline, disabled or shared, or dryrun, wandb's old name of offline. Where the server cannot be
            reached, an online run is logged offline instead.
    """

    def __init__(
        self,
        project: Name | None = None,
        mode: str = "offline",
        entity: Name | None = None,
        group: Name | None = None,
        job_type: Name | None = None,
        tags: list[Name | None] | Name | None = None,
        name: Name | None = None,
    ):
        self.mode = MODES.get(mode, mode or "offline")
        if self.mode not in ("online", "offline", "disabled", "shared"):
            raise ConfigurationError(
                f"logger.mode (or WANDB_MODE) must be online, offline, disabled or shared, got '{mode}'."
            )
        self.settings: dict[str, Any] = {
            key: None if value in (None, "") else str(value)
            for key, value in {"entity": entity, "group": group, "job_type": job_type, "name": name}.items()
        }
        self.settings["project"] = str(project or "unlearn_runner")
        if len(self.settings["project"]) > 128 or set(self.settings["project"]) & set("/\\#?%:"):
            raise ConfigurationError(
                "logger.project (or WANDB_PROJECT) must have at most 128 letters and none of /\\#?%:, got "
                f"'{project}'; the team before a / is logger.entity."
            )
        listed = tags if isinstance(tags, list) else str(tags or "").split(",")
        named = (str(tag).strip()[:64].strip() for tag in listed if tag is not None)
        self.settings["tags"] = list(dict.fromkeys(filter(None, named)))
        self.run: Any = None

    def start(self, folder: Path, config: dict[str, Any]) -> None:
        import wandb

        id_file = folder / "wandb" / "run_id"
        id_file.parent.mkdir(exist_ok=True)
        kept = id_file.read_text(errors="replace") if id_file.is_file() else ""
        resumed = re.fullmatch(r"[\w-]{1,64}", kept) is not None
        of_agent = os.environ.get("WANDB_RUN_ID") if "WANDB_SWEEP_ID" in os.environ else None
        run_id = kept if resumed else of_agent or secrets.token_hex(4)
        id_file.write_text(run_id)
        settings = {"name": f"{folder.parent.name}/{folder.name}"} | {
            key: value for key, value in self.settings.items() if value is not None
        }
        patience = float(os.environ.get("WANDB_INIT_TIMEOUT") or INIT_TIMEOUT)

        def begin(mode: str) -> Any:
            return wandb.init(
                **settings,
                id=run_id,
                dir=str(folder),
                config=config,
                mode=mode,
                resume="allow" if resumed and mode == "online" else None,
                settings=wandb.Settings(silent=True, console="off", x_disable_stats=True, init_timeout=patience),
            )

        try:
            self.run = begin(self.mode)
        except (wandb.errors.UsageError, wandb.errors.AuthenticationError) as error:
            raise ConfigurationError(
                f"Weights & Biases: {first_line(error)} Log in with `wandb login`, or take WANDB_MODE=offline."
            ) from error
        except wandb.errors.CommError as error:
            wandb.teardown()  # its service holds the run's id
            self.run = begin("offline")
            print(
                f"Weights & Biases cannot be reached ({first_line(error)}); the run is logged offline, upload it later "
                f"with `wandb sync {shlex.quote(str(folder / 'wandb'))}/offline-run-*`.",
                file=sys.stderr,
            )
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
