"""Memory of the C library: blocks that are freed are there for the next tensor."""

import platform
import subprocess
import sys

import pytest

FAULTS = """
import resource
import torch
from pplvi.programs.memory import keep_freed_memory
if {kept}:
    keep_freed_memory()
def faults():
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt
torch.set_num_threads(1)
x, y = torch.ones(3 * 2**20), torch.ones(2**20)
for number in range(20):
    before = faults()
    (x * 2.0) + 1.0, y * 2.0
print(faults() - before)
"""


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="other libraries keep memory in their own ways")
def test_operations_on_large_tensors_ask_for_no_new_pages():
    counts = [
        int(subprocess.run([sys.executable, "-c", FAULTS.format(kept=kept)], capture_output=True, check=True).stdout)
        for kept in (True, False)
    ]
    assert counts[0] < 100 < 1000 < counts[1]
