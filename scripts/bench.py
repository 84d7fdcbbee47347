"""How long a step takes, of what, and against what: a benchmark whose comparisons are made in turns.

    python scripts/bench.py                                   # every method on the 1.1M network, minutes
    python scripts/bench.py --network paper --methods siss siss_no_is --steps 3
    python scripts/bench.py --json bench.json --markdown bench.md
    python scripts/bench.py --hardware single_gpu --network paper --only steps --methods reference siss_float32 siss
    python scripts/bench.py --hardware single_gpu --only utilisation     # a UNet of Stable Diffusion 1.5's size

All that is compared runs in turns, a few steps each, round after round, each in a process of its own, so that a machine
that grows slower does not favour whoever came first. A ratio is the median over rounds of one round's ratio. Nothing
else may run meanwhile. The reference is the plain loop of scripts/reference_loop.py, in a process as torch comes;
`..._tuned` is the same with what `hardware` sets. Pictures: scikit-learn's digits with trousers.
"""

import argparse
import json
import platform
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from functools import partial
from multiprocessing import get_context
from multiprocessing.connection import Connection
from pathlib import Path
from statistics import median, quantiles
from typing import Any, NamedTuple

ROOT = Path(__file__).parents[1]

NETWORKS = {
    "paper": ["model=ddpm_mnist"],
    "small": ["model=ddpm_mnist", "model.network.block_out_channels=[24,48,80]", "model.network.norm_num_groups=8",
              "model.network.layers_per_block=1"],
}  # fmt: skip


class Reference(NamedTuple):
    """A plain loop."""

    importance_sampling: bool
    tuned: bool  # with what `hardware` sets: memory that is kept, kernels that are kept; on a GPU TF32, channels last


REFERENCES = {
    "reference": Reference(True, False),
    "reference_tuned": Reference(True, True),
    "reference_no_is": Reference(False, False),
    "reference_no_is_tuned": Reference(False, True),
}
PLAIN = ["method.update.ema_decay=null", "method.gradient_variance=false"]  # the reference has neither
SUBJECTS = {
    "siss": ["method=siss", *PLAIN],
    "siss_stale": ["method=siss", "method.norm_every=10", *PLAIN],
    "siss_no_is": ["method=siss_no_is", PLAIN[0]],
    "siss_channels_last": ["method=siss", "hardware.channels_last=true", *PLAIN],
    "no_is_channels_last": ["method=siss_no_is", "hardware.channels_last=true", PLAIN[0]],
    "adaptive_siss": ["method=adaptive_siss", *PLAIN],
    "adaptive_unsplit": ["method=adaptive_siss", "method.split=false", *PLAIN],
    "siss_unsplit": ["method=siss", "method.split=false", *PLAIN],
    "siss_default": ["method=siss"],
    "siss_float32": ["method=siss", "hardware.mixed_precision=no", *PLAIN],
    "siss_unreplayed": ["method=siss", "hardware.mixed_precision=no", "hardware.cuda_graphs=false", *PLAIN],
    "siss_split": ["method=siss", "hardware.mixed_precision=no", "method.split=true", *PLAIN],
    "siss_compiled": ["method=siss", "hardware.compile=true", *PLAIN],
    "stale_float32": ["method=siss", "hardware.mixed_precision=no", "method.norm_every=10", *PLAIN],
    "no_is_float32": ["method=siss_no_is", "hardware.mixed_precision=no", PLAIN[0]],
    "naive_deletion": ["method=naive_deletion", PLAIN[0]],
    "neg_grad": ["method=neg_grad", PLAIN[0]],
    "erase_diff": ["method=erase_diff", PLAIN[0]],
    "sfd": ["method=sfd", PLAIN[0]],
    "multi_class": ["method=hybrid", "method.variant=multi_class", PLAIN[0]],
    "rl_ppo": ["method=rl_lambda", "method.fresh_state=false", "method.split=false", *PLAIN],  # what the agent costs
    "rl_sac": ["method=rl_lambda", "method/agent=sac", "method.fresh_state=false", "method.split=false", *PLAIN],
}
COMPARED = {  # whose ratio to whom is worth a line; to a plain loop, also to its tuned one
    "siss": "reference", "siss_stale": "reference", "siss_default": "reference", "siss_no_is": "reference_no_is",
    "siss_channels_last": "reference", "no_is_channels_last": "reference_no_is",
    "siss_float32": "reference", "siss_unreplayed": "reference", "siss_split": "reference",
    "siss_compiled": "reference", "stale_float32": "reference", "no_is_float32": "reference_no_is",
    "adaptive_unsplit": "siss_unsplit", "rl_ppo": "siss_unsplit", "rl_sac": "siss_unsplit",
}  # fmt: skip
ON_A_GPU = ("siss_float32", "siss_unreplayed", "siss_split", "siss_compiled", "stale_float32", "no_is_float32")
BY_DEFAULT = [name for name in [*REFERENCES, *SUBJECTS] if name not in ON_A_GPU]
PARTS = ("steps", "evaluation", "start-up", "utilisation")
ROLLOUT = 25  # steps of an agent between two updates of its policy: it runs so many at a time


class Subject(NamedTuple):
    """What is timed."""

    run: Callable[[int], None]  # takes so many steps
    networks: tuple[Any, ...]  # whose passes are counted; the first is trained
    least: int  # steps at a time


class Timing(NamedTuple):
    """What was found of one subject."""

    milliseconds: float  # of a step: median over rounds
    quartiles: tuple[float, float]
    images_per_second: float
    evaluations: float  # of networks, in a step, for each image pair
    outside: float  # share of the step outside passes forward and back
    peak: float  # MiB that all steps needed, besides Python, torch, data and weights


def composed(overrides: list[str]) -> dict[str, Any]:
    from hydra import compose, initialize_config_dir
    from omegaconf import OmegaConf

    import unlearn_runner.cli  # noqa: F401 - what configurations interpolate

    with initialize_config_dir(str(ROOT / "conf"), version_base="1.3"):
        cfg = compose("train", ["logger=jsonl", *overrides], return_hydra_config=True)
    return {
        key: OmegaConf.to_container(cfg[key], resolve=True)
        for key in cfg
        if OmegaConf.is_config(cfg[key]) and key != "hydra"
    }


def make_subject(name: str, arguments: argparse.Namespace, folder: Path, *overrides: str) -> Subject:
    """One of SUBJECTS or REFERENCES on a network of its own, all of them from the same seed."""
    import torch
    from rich.console import Console

    from unlearn_runner.assembly import build_method, build_network, make
    from unlearn_runner.data.streams import BatchStream
    from unlearn_runner.training.checkpoint import Checkpoints
    from unlearn_runner.training.clock import Listener
    from unlearn_runner.training.progress import ProgressBar
    from unlearn_runner.training.signals import Interrupts
    from unlearn_runner.training.trainer import Trainer, identity_of
    from unlearn_runner.types import Streams, make_generator

    cfg = composed(
        [
            "dataset=digits_trousers", f"dataset.image_size={arguments.image_size}",
            f"dataset.conditional={arguments.conditional}", f"hardware={arguments.hardware}",
            f"budget.batch_size={arguments.batch_size}", "trainer.max_steps=1000000", "trainer.log_every=10",
            *NETWORKS[arguments.network], *SUBJECTS.get(name, ["method=siss"]), *overrides,
        ]
    )  # fmt: skip
    hardware = make(cfg["hardware"])
    reference = REFERENCES.get(name)
    tuned = reference is None or reference.tuned
    if tuned:
        hardware.apply()
    data = make(cfg["dataset"]).load()
    network = build_network(cfg, data.spec, 0)
    network = hardware.prepare(network) if tuned else network.to(hardware.device)
    if reference:
        from diffusers.models.attention_processor import AttnProcessor2_0
        from reference_loop import ReferenceLoop

        from unlearn_runner.models.attention import attend

        attend(network.backbone.unet, AttnProcessor2_0())  # diffusers' own
        loop = ReferenceLoop(
            network.backbone.unet, network.path.schedule.alphas_cumprod, reference.importance_sampling, 0.5, 5.0, 1e-4
        )
        stream = BatchStream(data, Streams("retain", True), arguments.batch_size, 0, hardware.device)
        torch.manual_seed(0)

        def run(steps: int) -> None:
            for _ in range(steps):
                loop.step(*stream.next()[:4])

        return Subject(run, (network,), 1)
    method = build_method(cfg, network, data.spec, make_generator(0, "method", hardware.device))
    plan, driver = make(cfg["trainer"]), make(cfg["driver"])
    driver.total_steps(method, plan)
    trainer = Trainer(
        method,
        BatchStream(data, method.reads, plan.batch_size, 0, hardware.device),
        plan,
        {"progress": Listener(logged=ProgressBar(name, plan.max_steps, Console(quiet=True)).logged)},
        Checkpoints(folder / name, 1),
        Interrupts(),
        identity_of(method, data.spec),
    )
    if not name.startswith("rl_"):

        def take(steps: int) -> None:
            for _ in range(steps):
                trainer.step()

        return Subject(take, method.networks, 1)

    from unlearn_runner.drivers.sb3 import RolloutStart

    agent = driver.prepare(trainer)

    def learn(steps: int) -> None:
        with agent.randomness.inside():
            agent.model.learn(steps, RolloutStart(agent.rollout_started), None, reset_num_timesteps=False)

    return Subject(learn, method.networks, ROLLOUT)


@contextmanager
def passes_timed(device: Any) -> Iterator[list[float]]:
    """Within, seconds spent in networks' passes forward and back are added to the list's only entry."""
    import torch
    from diffusers import UNet2DModel

    from unlearn_runner.graphs import Recording

    spent = [0.0]

    def timed(function: Callable[..., Any]) -> Callable[..., Any]:
        def call(*arguments: Any, **settings: Any) -> Any:
            synchronise(device)
            started = time.perf_counter()
            found = function(*arguments, **settings)
            synchronise(device)
            spent[0] += time.perf_counter() - started
            return found

        return call

    passes = [(UNet2DModel, "forward"), (Recording, "forward"), (torch.autograd, "grad"), (torch.autograd, "backward")]
    originals = [getattr(owner, name) for owner, name in passes]
    for (owner, name), original in zip(passes, originals, strict=True):
        setattr(owner, name, timed(original))
    try:
        yield spent
    finally:
        for (owner, name), original in zip(passes, originals, strict=True):
            setattr(owner, name, original)


def synchronise(device: Any) -> None:
    import torch

    if device.type == "cuda":
        torch.cuda.synchronize()


class Runner:
    """A subject in a process of its own."""

    def __init__(self, name: str, arguments: argparse.Namespace):
        self.name = name
        context = get_context("spawn")
        self.connection, other = context.Pipe()
        context.Process(target=serve, args=(other, name, arguments), daemon=True).start()
        other.close()
        self.least, self.weights = self._answer()

    def seconds(self, steps: int) -> float:
        """Of one step."""
        steps = max(steps, self.least)
        self.connection.send(("run", steps))
        return self._answer() / steps

    def look(self, steps: int) -> dict[str, float]:
        """What a few more steps tell besides the seconds: some of Timing's entries."""
        self.connection.send(("look", max(steps, self.least)))
        return self._answer()

    def _answer(self) -> Any:
        try:
            return self.connection.recv()
        except EOFError:
            sys.exit(f"{self.name} has ended; what it said stands above.")


def serve(connection: Connection, name: str, arguments: argparse.Namespace) -> None:
    """A Runner's other side."""
    from unlearn_runner.training.provenance import peak_memory_gb

    def timed(steps: int) -> float:
        synchronise(device)
        started = time.perf_counter()
        subject.run(steps)
        synchronise(device)
        return time.perf_counter() - started

    def looked(steps: int) -> dict[str, float]:
        before = sum(network.network_evaluations for network in subject.networks)
        with passes_timed(device) as spent:
            whole = timed(steps)
        evaluations = sum(network.network_evaluations for network in subject.networks) - before
        return {
            "evaluations": evaluations / steps / arguments.batch_size,
            "outside": 1 - spent[0] / whole,
            "peak": 1024 * (peak_memory_gb() - at_first),
        }

    with tempfile.TemporaryDirectory() as folder:
        subject = make_subject(name, arguments, Path(folder), *arguments.set)
        begin_peak()
        at_first = peak_memory_gb()
        weights = list(subject.networks[0].parameters())
        device = weights[0].device
        connection.send((subject.least, sum(weight.numel() for weight in weights)))
        while True:
            try:
                order, steps = connection.recv()
            except EOFError:  # nobody asks any more
                return
            connection.send({"run": timed, "look": looked}[order](steps))


def begin_peak() -> None:
    """From now on the peak is that of what follows: what importing and building needed for a moment is left out, where
    the system can be asked to.
    """
    import torch

    if torch.cuda.is_available():
        torch.cuda.reset_peak_memory_stats()
    else:
        with suppress(OSError):  # only Linux has it
            Path("/proc/self/clear_refs").write_text("5")


def in_turns(runners: list[Runner], arguments: argparse.Namespace) -> dict[str, list[float]]:
    """Seconds of a step by round. Each round begins with another subject."""
    for runner in runners:
        runner.seconds(arguments.warm_up)
    seconds: dict[str, list[float]] = {runner.name: [] for runner in runners}
    for round in range(arguments.rounds):
        first = round % len(runners)
        for runner in runners[first:] + runners[:first]:
            seconds[runner.name].append(runner.seconds(arguments.steps))
        text = ", ".join(f"{name} {1000 * taken[-1]:.0f}" for name, taken in seconds.items())
        print(f"round {round + 1} of {arguments.rounds}, ms a step: {text}", file=sys.stderr)
    return seconds


def timing_of(runner: Runner, seconds: list[float], arguments: argparse.Namespace) -> Timing:
    low, _, high = quantiles(seconds, n=4) if len(seconds) > 1 else [seconds[0]] * 3
    middle = median(seconds)
    return Timing(1000 * middle, (1000 * low, 1000 * high), arguments.batch_size / middle,
                  **runner.look(arguments.steps))  # fmt: skip


def ratios_of(seconds: dict[str, list[float]]) -> dict[str, list[dict[str, Any]]]:
    """How many times as fast as others those are that COMPARED names: by round, in the middle and at both ends."""
    found: dict[str, list[dict[str, Any]]] = {}
    for name, other in COMPARED.items():
        for against in (other, f"{other}_tuned"):
            if name in seconds and against in seconds:
                by_round = sorted(b / a for a, b in zip(seconds[name], seconds[against], strict=True))
                found.setdefault(name, []).append(
                    {"of": against, "median": median(by_round), "low": by_round[0], "high": by_round[-1]}
                )
    return found


def drawing(arguments: argparse.Namespace) -> dict[str, float]:
    """Seconds to draw 1,000 samples with 25 steps, and to score them by all metrics of `evaluation=quick`."""
    from unlearn_runner.assembly import build_network, make
    from unlearn_runner.evaluation.evaluator import Evaluator
    from unlearn_runner.evaluation.novelty import abstaining

    cfg = composed(["dataset=digits_trousers", f"dataset.image_size={arguments.image_size}",
                    f"dataset.conditional={arguments.conditional}", f"hardware={arguments.hardware}",
                    "evaluation.num_samples=500", "judge.classifier.max_steps=50",
                    *NETWORKS[arguments.network]])  # fmt: skip
    hardware, evaluation, recipe = make(cfg["hardware"]), make(cfg["evaluation"]), make(cfg["judge"])
    hardware.apply()
    data = make(cfg["dataset"]).load()
    network = hardware.prepare(build_network(cfg, data.spec, 0))
    with tempfile.TemporaryDirectory() as cache:
        judge = recipe.judge(data, Path(cache), hardware.device)
        judge = abstaining(judge, data, evaluation.novelty, Path(cache))
        evaluator = Evaluator(data, judge, evaluation.metrics, evaluation.sampling, Path(cache))
        found = evaluator(network)
    scoring = sum(seconds for part, seconds in found.seconds.items() if part != "sampling")
    return {"drawing": found.seconds["sampling"], "scoring": scoring}


def utilisation(arguments: argparse.Namespace) -> dict[str, float]:
    """What training all weights of a UNet of Stable Diffusion 1.5's size makes of a GPU's arithmetic.

    A step of naive deletion. The operations of a forward pass are counted, the backward pass as two more; the rate they
    are compared with is that of a large matrix product in bf16, timed here. Random weights, random latents of 64x64.
    """
    import torch
    from memory import sized
    from torch.utils.flop_counter import FlopCounterMode

    from unlearn_runner.hardware import Hardware
    from unlearn_runner.methods.denoising import Denoising
    from unlearn_runner.methods.method import Setting, Update
    from unlearn_runner.models.prompted import Tuning
    from unlearn_runner.types import Batch

    hardware = Hardware("cuda", channels_last=None, mixed_precision=None, deterministic=False, cuda_graphs=None)
    hardware.apply()
    model = hardware.prepare(sized("sd15", Tuning("full"), device="cuda"))
    model.freeze_for_unlearning()
    method = Denoising(
        Setting(model, torch.Generator("cuda").manual_seed(0)), partial(Update, optimizer=torch.optim.AdamW)
    )
    size = arguments.batch_size
    latents, cond = torch.randn((size, 4, 64, 64), device="cuda"), torch.zeros(size, dtype=torch.int64, device="cuda")
    batch = Batch(latents, None, cond, None, 0.0)

    def timed(step: Callable[[], Any], times: int) -> float:
        seconds = []
        for _ in range(times):
            synchronise(hardware.device)
            started = time.perf_counter()
            step()
            synchronise(hardware.device)
            seconds.append(time.perf_counter() - started)
        return median(seconds)

    with FlopCounterMode(display=False) as counter, torch.no_grad():
        model.predict(latents[:1], cond[:1], cond[:1])
    operations = 3 * size * counter.get_total_flops()  # the backward pass is two passes' worth
    timed(lambda: method.step(batch), 3)
    torch.cuda.reset_peak_memory_stats()
    seconds = timed(lambda: method.step(batch), arguments.rounds)
    one, other = (torch.randn((8192, 8192), device="cuda", dtype=torch.bfloat16) for _ in range(2))
    timed(lambda: one @ other, 5)
    rate = 2 * 8192**3 / timed(lambda: one @ other, 20)
    return {
        "batch_size": size,
        "seconds_per_step": seconds,
        "teraflop_per_step": operations / 1e12,
        "teraflop_per_second": operations / seconds / 1e12,
        "matrix_product_teraflop_per_second": rate / 1e12,
        "share_of_matrix_product": operations / seconds / rate,
        "peak_memory_gib": torch.cuda.max_memory_allocated() / 2**30,
    }


def start_up() -> dict[str, float]:
    """Seconds until `main` begins, and of a run of nothing but its parts; medians of three."""

    def seconds(*command: str) -> float:
        taken = []
        for _ in range(3):
            started = time.perf_counter()
            subprocess.run([sys.executable, *command], capture_output=True, check=True, cwd=ROOT)
            taken.append(time.perf_counter() - started)
        return median(taken)

    return {
        "what train.py imports at once": seconds("-c", "import hydra, unlearn_runner.cli"),
        "train.py --cfg job": seconds("train.py", "--cfg", "job"),
    }


def processor() -> str:
    lines = Path("/proc/cpuinfo").read_text().splitlines() if Path("/proc/cpuinfo").is_file() else []
    return next(
        (line.partition(":")[2].strip() for line in lines if line.startswith("model name")), platform.processor()
    )


def milliseconds(value: float) -> str:
    return f"{value:.0f}" if value >= 20 else f"{value:.1f}"


def markdown(found: dict[str, Any]) -> str:
    """The table, and what stands above and below it."""
    size = found["image_size"]
    lines = [
        f"{found['network']} network ({found['parameters'] / 1e6:.1f}M weights), {size}x{size}, "
        f"batch {found['batch_size']}, {'conditional' if found['conditional'] else 'unconditional'}, "
        f"{found['threads']} threads, {found['rounds']} rounds of {found['steps']} steps.",
        "",
        "| | ms a step (quartiles) | pairs/s | evaluations a pair | outside the passes | peak MiB | times as fast as |",
        "|---|---|---|---|---|---|---|",
    ]
    for name, row in found["subjects"].items():
        versus = ", ".join(
            f"{ratio['median']:.2f} ({ratio['low']:.2f} to {ratio['high']:.2f}) {ratio['of']}"
            for ratio in found["ratios"].get(name, ())
        )
        evaluations = "" if name in REFERENCES else f"{row['evaluations']:.2f}"
        middle, low, high = (milliseconds(value) for value in (row["milliseconds"], *row["quartiles"]))
        lines.append(
            f"| {name} | {middle} ({low} to {high}) | {row['images_per_second']:.0f} | {evaluations} | "
            f"{100 * row['outside']:.1f} % | {row['peak']:.0f} | {versus} |"
        )
    return "\n".join(lines) + "\n"


def parser() -> argparse.ArgumentParser:
    from unlearn_runner.comparison.choices import Parser

    parser = Parser(__doc__)
    add = parser.add_argument
    add("--network", choices=NETWORKS, default="small", help="the paper's UNet, or one of 1.1M weights")
    add("--methods", nargs="+", choices=[*REFERENCES, *SUBJECTS], metavar="NAME",
        default=BY_DEFAULT,
        help=f"of {', '.join([*REFERENCES, *SUBJECTS])} (default: all but {', '.join(ON_A_GPU)})")  # fmt: skip
    add("--conditional", type=truth, default=True, metavar="true|false")
    add("--batch-size", type=int, default=64)
    add("--image-size", type=int, default=28)
    hardware = sorted(path.stem for path in (ROOT / "conf" / "hardware").glob("*.yaml"))
    add("--hardware", choices=hardware, default="auto", help="an option of conf/hardware")
    add("--rounds", type=int, default=7)
    add("--steps", type=int, default=5, help="of each subject in a round")
    add("--warm-up", type=int, default=2, help="steps before anything is timed")
    add("--only", nargs="+", choices=PARTS, default=PARTS[:-1], metavar="PART", help=f"of {', '.join(PARTS)}")
    add(
        "--set",
        nargs="+",
        default=[],
        metavar="KEY=VALUE",
        help="overrides for all, such as hardware.deterministic=false",
    )
    add_files(parser)
    return parser


def truth(text: str) -> bool:
    if text not in ("true", "false"):
        raise argparse.ArgumentTypeError(f"must be true or false, got '{text}'")
    return text == "true"


def add_files(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--json", type=Path, metavar="FILE", help="write all that was found, with the machine")
    parser.add_argument("--markdown", type=Path, metavar="FILE", help="write the table")


def require_sensible(arguments: argparse.Namespace, *positive: str) -> None:
    """Exits with a sentence if one of these is not positive, or if what is found could not be written."""
    for name in positive:
        if not getattr(arguments, name) > 0:
            sys.exit(f"--{name.replace('_', '-')} must be positive, got {getattr(arguments, name)}.")
    for file in filter(None, (arguments.json, arguments.markdown)):
        if not file.parent.is_dir():
            sys.exit(f"{file} cannot be written: there is no folder {file.parent}.")
        if file.is_dir():
            sys.exit(f"{file} cannot be written: it is a folder.")


def hand_over(found: dict[str, Any], table: str, arguments: argparse.Namespace) -> None:
    """To the terminal, and to the files asked for."""
    print(table)
    if arguments.json:
        arguments.json.write_text(json.dumps(found, indent=1) + "\n")
    if arguments.markdown:
        arguments.markdown.write_text(table)


def main() -> None:
    arguments = parser().parse_args()
    require_sensible(arguments, "rounds", "steps", "warm_up", "batch_size", "image_size")
    if arguments.only == ["utilisation"]:
        text = utilisation(arguments)
        hand_over({"utilisation": text}, json.dumps(text, indent=1) + "\n", arguments)
        return
    if not arguments.conditional:  # distillation draws labels
        arguments.methods = [name for name in arguments.methods if name not in ("sfd", "multi_class")]

    from unlearn_runner.hardware import cores
    from unlearn_runner.training.provenance import environment

    runners = [Runner(name, arguments) for name in arguments.methods]
    seconds = in_turns(runners, arguments)
    settings = ("network", "batch_size", "image_size", "conditional", "hardware", "rounds", "steps", "set")
    found: dict[str, Any] = {
        "processor": processor(),
        "cores": cores(),
        **environment(),
        **{name: getattr(arguments, name) for name in settings},
        "parameters": runners[0].weights,
        "subjects": {
            runner.name: timing_of(runner, taken, arguments)._asdict() | {"seconds": taken}
            for runner, taken in zip(runners, seconds.values(), strict=True)
        },
        "ratios": ratios_of(seconds),
    }
    more = {
        "evaluation": partial(drawing, arguments),
        "start-up": start_up,
        "utilisation": partial(utilisation, arguments),
    }
    found |= {name: more[name]() for name in more if name in arguments.only}
    hand_over(found, markdown(found), arguments)
    for name in more.keys() & found.keys():
        print({key: round(value, 2) for key, value in found[name].items()})


if __name__ == "__main__":
    main()
