"""Whether this working tree gives the results that an earlier commit gives, to the bit.

    python scripts/same_results.py HEAD~3                 # all jobs, an hour on two cores
    python scripts/same_results.py main --only vae siss   # those whose name has one of these words

Every job is a debug run of the command in both trees, with caches of their own, so that bases and classifiers are
compared, too. What is compared: the weights of model/, every line of metrics.jsonl and every score of summary.json, but
for seconds and memory. Results of a tree are kept in --work and made once for a commit.
"""

import argparse
import json
import os
import subprocess
import sys
from hashlib import sha256
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[1]
COMMON = (
    "debug=default", "logger=jsonl", "hardware=cpu", "hardware.threads=1", "evaluation.bootstrap=20"
)  # fmt: skip
DISTILLATION = ("sfd", "sfd_two_stage", "hybrid", "hybrid method.variant=siss_sfd_labels",
                "hybrid method.variant=siss_sfd_student")  # fmt: skip
LOSSES = (
    "naive_deletion",
    "neg_grad",
    "erase_diff",
    "salun",
    "posterior",
    "retrack",
    "siss",
    "siss_no_is",
    "adaptive_siss",
)
SISS = (
    "method/lambd=closed_form", "method/lambd=pathwise", "method/lambd=blend", "method.population=all",
    "method/timesteps=second_moment", "method.split=false", "method.split=true", "method.norm_every=2 "
    "method.gradient_variance=false", "method.tau=1.0 method.rho=null", "method.rho=null method.superfactor=0.1",
)  # fmt: skip
ROLLOUTS = "method.update_every=2 method.agent.batch_size=2"
FEW_ROLLOUTS = "method.num_inference_steps=3 method.num_rollouts=4 method.critic_steps=1 method.minibatches=2"
TEXT = "model=sd_tiny dataset=sd_concepts dataset.image_size=16 clip=tiny evaluation=prompts"
FULL = "evaluation=full evaluation.oracle=true"
JOBS = [
    *(f"method={method}" for method in (*LOSSES, "retrain", *DISTILLATION)),
    *(f"method=adaptive_siss {variant}" for variant in SISS),
    f"method=siss {FULL}",
    "method=siss model.network.prediction_type=v_prediction",
    "method=siss trainer.init=scratch",
    "method=siss model=vae",
    "method=adaptive_siss dataset.conditional=false",
    "dataset=digits method=siss",
    f"method=rl_lambda {ROLLOUTS}",
    f"method=rl_lambda method/agent=sac {ROLLOUTS} method.agent.learning_starts=1 method.agent.train_freq=2",
    f"method=rl_lambda {ROLLOUTS} method.training=episodic method.episodes=2 method.episodes_per_update=2",
    *(f"model=vae method={method}" for method in ("naive_deletion", "neg_grad", "siss_no_is", "adaptive_siss")),
    f"model=vae method=retrain {FULL}",
    f"model=vae method=rl_lambda {ROLLOUTS}",
    *(f"{TEXT} method={method}" for method in (*LOSSES, *DISTILLATION[:1], *DISTILLATION[2:])),
    f"{TEXT} method=rl_lambda {ROLLOUTS}",
    *(f"{TEXT} method={method} method.num_inference_steps=3" for method in ("esd", "concept_ablation", "erase_flow")),
    *(f"{TEXT} method={method} {FEW_ROLLOUTS}" for method in ("critic_guided", "ddpo")),
    *(f"{TEXT} method=siss model.network.trainable={part}" for part in ("lora", "cross_attention")),
    f"{TEXT} method=naive_deletion dataset.source=base dataset.num_images=12 dataset.num_inference_steps=2",
]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("commit", help="what this tree is compared with")
    parser.add_argument("--only", nargs="+", metavar="WORD", default=[], help="jobs whose name has one of these words")
    parser.add_argument("--work", type=Path, default=ROOT / "outputs" / "same_results", help="where runs are kept")
    arguments = parser.parse_args()
    commit = git("rev-parse", "--verify", f"{arguments.commit}^{{commit}}")
    jobs = [job for job in JOBS if not arguments.only or any(word in job for word in arguments.only)]
    there, here = arguments.work / commit[:12], arguments.work / "here"
    tree = there / "tree"
    if not tree.is_dir():
        git("worktree", "add", "--detach", str(tree), commit)
    subprocess.run(["rm", "-rf", str(here)], check=True)
    differ = 0
    for number, job in enumerate(jobs, start=1):
        name = sha256(job.encode()).hexdigest()[:10]
        wanted, found = (result_of(job, root, place, name) for root, place in ((tree, there), (ROOT, here)))
        remarks = differences(wanted, found)
        differ += bool(remarks)
        print(f"{number}/{len(jobs)} {'same' if not remarks else 'DIFFERS'}: {job}", flush=True)
        for remark in remarks[:10]:
            print(f"    {remark}", flush=True)
    sys.exit(f"{differ} of {len(jobs)} jobs differ" if differ else 0)


def git(*arguments: str) -> str:
    return subprocess.run(
        ["git", *arguments], cwd=ROOT, capture_output=True, text=True, check=True
    ).stdout.strip()  # fmt: skip


def result_of(job: str, root: Path, place: Path, name: str) -> dict[str, Any]:
    """What a job leaves, run by the code in `root`; from an earlier call if it is kept."""
    kept = place / f"{name}.json"
    if not kept.is_file():
        folder = place / "runs" / name
        surroundings = os.environ | {
            "PYTHONPATH": str(root), "UNLEARN_RUNNER_CACHE": str(place / "cache"), "WANDB_MODE": "offline",
            "UNLEARN_RUNNER_OUTPUTS": str(place / "runs"), "OMP_NUM_THREADS": "1",
        }  # fmt: skip
        subprocess.run(["rm", "-rf", str(folder)], check=True)
        done = subprocess.run(
            [sys.executable, str(root / "train.py"), *COMMON, *job.split(), f"hydra.run.dir={folder}"],
            cwd=root, env=surroundings, capture_output=True, text=True,
        )  # fmt: skip
        error = done.stderr.strip().splitlines()[-1:] if done.returncode else []
        kept.parent.mkdir(parents=True, exist_ok=True)
        kept.write_text(json.dumps({"error": error} if error else read(folder), indent=1))
    return json.loads(kept.read_text())


def read(folder: Path) -> dict[str, Any]:
    """Results of a run folder by name."""
    found: dict[str, Any] = {}
    for file in sorted(folder.glob("model/**/*.safetensors")):
        found[f"digest of {file.relative_to(folder)}"] = sha256(file.read_bytes()).hexdigest()
    for line in map(json.loads, (folder / "metrics.jsonl").read_text().splitlines()):
        found |= {f"step {line['step']} {key}": value for key, value in line.items() if not is_of_the_machine(key)}
    summary = json.loads((folder / "summary.json").read_text())
    found["status"] = summary["status"]
    found |= {key: value for key, value in summary["metrics"].items() if not is_of_the_machine(key)}
    return found | {f"interval of {key}": value for key, value in summary.get("intervals", {}).items()}


def is_of_the_machine(key: str) -> bool:
    return "seconds" in key or "memory" in key


def differences(wanted: dict[str, Any], found: dict[str, Any]) -> list[str]:
    """What two results do not agree in: how far, where both are numbers; the farthest first."""
    remarks = []
    for key in [*wanted, *(key for key in found if key not in wanted)]:
        there, here = wanted.get(key, "nothing"), found.get(key, "nothing")
        if there == here:
            continue
        far = (
            abs(here - there) / max(abs(there), 1e-12) if isinstance(there, float) and isinstance(here, float) else 9e9
        )
        remarks.append((far, f"{key}: {there} before, {here} now" + (f" ({far:.1e})" if far < 9e9 else "")))
    return [remark for _, remark in sorted(remarks, key=lambda pair: -pair[0])]


if __name__ == "__main__":
    main()
