"""What is freed stays there for the next step: asked of glibc's heap in a process of its own."""

import json
import subprocess
import sys

import pytest

SCRIPT = """
import ctypes, json
from wavelet_lm.allocator import keep_freed_memory

libc = ctypes.CDLL(None)
for function in (libc.malloc, libc.sbrk):
    function.restype = ctypes.c_void_p
libc.free.argtypes = [ctypes.c_void_p]

def after_a_block():
    block = libc.malloc(ctypes.c_size_t(20 * 2**20))
    end = libc.sbrk(0)
    libc.free(block)
    return {"on the heap": block < end, "given back": end - libc.sbrk(0)}

keep_freed_memory()
kept = after_a_block()
keep_freed_memory(2**20)
print(json.dumps([kept, after_a_block()]))
"""


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="glibc's parameters")
def test_a_large_block_stays_on_the_heap_when_it_is_freed():
    result = subprocess.run([sys.executable, "-c", SCRIPT], capture_output=True, check=True)
    kept, limited = json.loads(result.stdout)
    assert kept == {"on the heap": True, "given back": 0}
    assert limited["on the heap"] and limited["given back"] > 10 * 2**20
