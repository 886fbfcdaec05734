"""Memory of the C library: blocks that are freed are there for the next tensor."""

import ctypes
import platform
import subprocess
import sys

import pytest

MAPPED = """
import ctypes
import torch
from pplvi.programs.memory import keep_freed_memory
keep_freed_memory()
NAMES = "arena ordblks smblks hblks hblkhd usmblks fsmblks uordblks fordblks keepcost".split()
class Info(ctypes.Structure):
    _fields_ = [(name, ctypes.c_size_t) for name in NAMES]
info = ctypes.CDLL(None).mallinfo2
info.restype = Info
def mapped():
    return info().hblks
before = mapped()
large = torch.ones(3 * 2**20)
print(mapped() - before)
before = mapped()
largest = torch.ones(2**24)
print(mapped() - before)
"""


@pytest.mark.skipif(
    platform.libc_ver()[0] != "glibc" or not hasattr(ctypes.CDLL(None), "mallinfo2"),
    reason="other libraries keep memory in their own ways",
)
def test_large_tensors_are_not_mapped_anew():
    """A block that is mapped for one tensor goes back to the system, page by page, when that is freed: 12 MiB are not,
    and 64 MiB are."""
    found = subprocess.run([sys.executable, "-c", MAPPED], capture_output=True, check=True)
    assert found.stdout.split() == [b"0", b"1"]
