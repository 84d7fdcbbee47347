"""As much of SLURM as submitit speaks with: sbatch, srun, sacct and scancel, which are links to this file.

sbatch starts an array's tasks at once, each in a process of its own; SLURM_FAKE is the folder with their states.
"""

import os
import re
import subprocess
import sys
from pathlib import Path


def sbatch(script: Path, states: Path) -> None:
    (first, last) = re.search(r"#SBATCH --array=(\d+)-(\d+)", script.read_text()).groups()
    job = str(1000 * (1 + len(list(states.glob("*_0")))))
    (states / "script").write_text(script.read_text())
    for task in range(int(first), int(last) + 1):
        (states / f"{job}_{task}").write_text("PENDING")
        environment = {
            **os.environ, "SLURM_JOB_ID": f"{int(job) + task}", "SLURM_ARRAY_JOB_ID": job,
            "SLURM_ARRAY_TASK_ID": str(task), "SLURM_PROCID": "0", "SLURM_LOCALID": "0", "SLURM_NODEID": "0",
            "SLURM_NTASKS": "1", "SLURM_JOB_NUM_NODES": "1", "SLURM_JOB_NODELIST": "here", "SLURMD_NODENAME": "here",
        }  # fmt: skip
        run = [sys.executable, __file__, "task", str(script), str(states / f"{job}_{task}")]
        subprocess.Popen(run, env=environment, start_new_session=True, stdout=-3, stderr=-3)
    print(f"Submitted batch job {job}")


def task(script: str, state: str) -> None:
    Path(state).write_text("RUNNING")
    done = subprocess.run(["bash", script])
    Path(state).write_text("FAILED" if done.returncode else "COMPLETED")


def srun(arguments: list[str]) -> int:
    outputs = {}
    while arguments[0].startswith("-"):
        option = arguments.pop(0)
        if option in ("--output", "--error"):
            outputs[option] = arguments.pop(0)
    ids = {
        "%A": os.environ["SLURM_ARRAY_JOB_ID"],
        "%a": os.environ["SLURM_ARRAY_TASK_ID"],
        "%t": "0",
        "%j": os.environ["SLURM_JOB_ID"],
    }
    path = outputs["--output"]
    for name, value in ids.items():
        path = path.replace(name, value)
    with open(path, "w") as file:
        return subprocess.run(arguments, stdout=file, stderr=subprocess.STDOUT).returncode


def sacct(states: Path) -> None:
    print("JobID|State|NodeList")
    for file in states.glob("[0-9]*"):
        print(f"{file.name}|{file.read_text()}|here")


if __name__ == "__main__":
    name, arguments, states = Path(sys.argv[0]).name, sys.argv[1:], Path(os.environ["SLURM_FAKE"])
    if arguments[:1] == ["task"]:
        task(*arguments[1:])
    elif name == "sbatch":
        sbatch(Path(arguments[-1]), states)
    elif name == "srun":
        sys.exit(srun(arguments))
    elif name == "sacct":
        sacct(states)
