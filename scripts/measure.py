"""What other tools have unlearned, measured alike: by samples, probes and attacks, beside the base, in one table.

    python scripts/measure.py esd.safetensors uce.safetensors lora/ text_encoder/ \\
        --base <folder or hub id of the pipeline that was unlearned> --concept "Van Gogh" --retain Monet Picasso

Each is what `method=given` reads: a whole pipeline, one network's folder, a file with some weights, LoRA
(docs/models.md). What has to be kept is named by --retain. The base draws the pictures of all these concepts, which are
learnt from and compared with, and CLIP says what is on a picture. Overrides of train.py may follow, and win:

    evaluation.num_samples=500 hardware=single_gpu judge=file dataset.source=<folder of pictures>
    "evaluation.oracle=[<folder>]"        # models that never saw the concept, for comparison

This only composes commands: --dry-run prints them."""

import argparse
import shlex
import subprocess
import sys
from collections.abc import Sequence
from itertools import count, pairwise
from pathlib import Path
from typing import NamedTuple

from unlearn_runner.api import kind_of, of_concepts, option
from unlearn_runner.errors import ConfigurationError, known_cause
from unlearn_runner.models.pipelines import MODELS
from unlearn_runner.trust import CONF
from unlearn_runner.validation import Configuration

ROOT = Path(__file__).resolve().parents[1]
SUFFIXES = (".safetensors", ".pt", ".pth", ".bin", ".ckpt")


class Command(NamedTuple):
    """One measurement."""

    label: str
    folder: Path
    line: str  # as one types it


def commands(
    weights: Sequence[str], base: str, concepts: Sequence[str], retain: Sequence[str], out: Path, more: Sequence[str]
) -> list[Command]:
    """A command for each of the `weights`. Raises ConfigurationError if the base is a pipeline that is not known."""
    model, size = kind_of(base, dict(part.split("=", 1) for part in more))
    if model not in MODELS.values():
        raise ConfigurationError(f"--base {base}: expected a text-to-image pipeline, got one that draws no texts.")
    shared = [f"model={model}", option("model.weights", base), f"dataset.image_size={size}"]
    shared += [*of_concepts(concepts, retain), "evaluation=probes", "judge=clip"]
    found = []
    for label, source in zip(labels_of(weights), weights, strict=True):
        folder = out / label
        own = {"method.weights": source, "label": label, "hydra.run.dir": str(folder)}
        words = ["method=given", *(option(key, value) for key, value in own.items()), *shared, *more]
        line = shlex.join([sys.executable, str(ROOT / "train.py"), *words])
        found.append(Command(label, folder, line))
    return found


def labels_of(weights: Sequence[str]) -> list[str]:
    """A row's name for each, from its file's or folder's, each another."""
    names = [Path(source).resolve().name for source in weights]
    names = [name.removesuffix(Path(name).suffix) if Path(name).suffix in SUFFIXES else name for name in names]
    found: list[str] = []
    for name in names:
        numbered = (f"{name}_{number}" for number in count(2))
        found.append(name if name not in found else next(other for other in numbered if other not in [*names, *found]))
    return found


def is_override(word: str, before: str) -> bool:
    """Whether a word is an option of train.py, and no file, and not what an option of this script is given."""
    key = word.partition("=")[0].lstrip("+~")
    group = key.replace("@", ".").replace("/", ".").partition(".")[0]
    named = "=" in word and group in {
        *Configuration.__annotations__,
        *(path.name for path in CONF.iterdir() if path.is_dir()),
    }
    return named and before not in ("--base", "--out") and not Path(word).exists()


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("weights", nargs="+", help="what was unlearned; overrides of train.py may stand anywhere")
    parser.add_argument("--base", required=True, help="folder or hub id of the pipeline that was unlearned")
    parser.add_argument("--concept", required=True, nargs="+", help="what was to be forgotten, as in a prompt")
    parser.add_argument("--retain", required=True, nargs="+", help="concepts that were to be kept")
    parser.add_argument("--out", type=Path, default=Path("outputs/measured"), help="folder of the runs")
    parser.add_argument("--dry-run", action="store_true", help="print the commands only")
    typed = sys.argv[1:] if arguments is None else arguments
    more = [word for before, word in pairwise(["", *typed]) if is_override(word, before)]
    asked = parser.parse_args([word for word in typed if word not in more])
    try:
        found = commands(asked.weights, asked.base, asked.concept, asked.retain, asked.out, more)
    except Exception as error:
        if (known := known_cause(error)) is None:
            raise
        print(known, file=sys.stderr)
        return 2
    for command in found:
        print(command.line, flush=True)
        if not asked.dry_run and (code := subprocess.run(command.line, shell=True).returncode):
            return code
    compare = f"{shlex.quote(sys.executable)} {ROOT / 'scripts' / 'compare.py'} {shlex.quote(str(asked.out))} --all"
    print(compare, flush=True)
    return 0 if asked.dry_run else subprocess.run(compare, shell=True).returncode


if __name__ == "__main__":
    sys.exit(main())
