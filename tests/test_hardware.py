"""What `hardware` sets for the whole process."""

import platform
import subprocess
import sys

import pytest

FAULTS = """
import resource, torch
from unlearn_runner.hardware import Hardware
if {apply}:
    Hardware("cpu").apply()
def faults():
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt
for _ in range(10):  # the heap grows and settles
    torch.zeros(16_000_000)
before = faults()
for _ in range(10):
    torch.zeros(16_000_000)
print(faults() - before)
"""


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="another allocator")
def test_freed_memory_is_kept_for_the_next_step():
    plain, kept = (
        int(subprocess.run([sys.executable, "-c", FAULTS.format(apply=apply)], capture_output=True, check=True).stdout)
        for apply in (False, True)
    )
    assert plain > 1000  # each of the ten times 64 MB, twice what glibc would come to keep by itself
    assert kept < plain / 10
