"""What this process may compute on: devices, their memory, cores, and whether bfloat16 is fast here.

Notable: nothing here initialises CUDA, since a process that has may not fork ranks (`torch.cuda.device_count()` asks
the driver's management library; so does `nvidia-smi`). Cores are those this process may really use: its affinity,
without hyper-threads, under the container's quota. What it does not know: layouts, ranks, other machines.
"""

from __future__ import annotations

import os
import subprocess
import sys
import timeit
from contextlib import suppress
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path

import torch


@dataclass(frozen=True)
class Devices:
    """The devices of one machine that ranks can be placed on."""

    kind: str  # "cuda" or "cpu"
    count: int  # GPUs, or cores
    name: str  # of the first: a machine's devices are alike
    memory_bytes: int  # of one device; a core's is its share of the host's memory
    fast_bf16: bool  # bfloat16 products beat float32 ones: else never choose bfloat16 by default
    cores: int  # physical cores that this process may use
    mkl_held_back: bool = False  # MKL takes 256-bit vectors although the processor has 512-bit ones: oneDNN does not
    bf16_tiles: bool = False  # AMX: 16-bit products are quick even in small blocks

    def threads_for(self, ranks: int) -> int:
        """Threads of one of `ranks` local ranks: an oversubscribed rank runs ten times slower (spinning barriers)."""
        return max(1, self.cores // ranks)


@lru_cache(maxsize=1)
def find() -> Devices:
    """Look once per process (tens of milliseconds: a small product is timed on CPUs)."""
    cores = _cores()
    if count := torch.cuda.device_count():
        return Devices("cuda", count, *_gpu(), cores)
    memory, tiles = _host_memory() // cores, "amx_bf16" in read("/proc/cpuinfo").split()
    return Devices("cpu", cores, _processor(), memory, _bf16_beats_float32(), cores, _mkl_held_back(), tiles)


def _cores() -> int:
    logical = os.sched_getaffinity(0) if hasattr(os, "sched_getaffinity") else set(range(os.cpu_count() or 1))
    siblings = {read(f"/sys/devices/system/cpu/cpu{i}/topology/thread_siblings_list") or str(i) for i in logical}
    quota = read("/sys/fs/cgroup/cpu.max").split()  # "200000 100000": two cores' worth of time; "max": no limit
    allowed = int(quota[0]) / int(quota[1]) if len(quota) == 2 and quota[0] != "max" else float("inf")
    return max(1, int(min(len(siblings), allowed)))


def _gpu() -> tuple[str, int, bool]:
    """Name, bytes, and whether bfloat16 is native (compute capability 8 and later), of the first GPU."""
    query = ["nvidia-smi", "--query-gpu=name,memory.total,compute_cap", "--format=csv,noheader,nounits"]
    try:
        answer = subprocess.run(query, capture_output=True, text=True, timeout=20, check=True).stdout
        name, mebibytes, capability = (field.strip() for field in answer.splitlines()[0].rsplit(",", 2))
        return name, int(mebibytes) * 2**20, float(capability) >= 8
    except (OSError, subprocess.SubprocessError, ValueError, IndexError):
        # No such tool (ROCm), or one that hides figures (MIG): ask the runtime. Ranks are spawned, not forked, then.
        found = torch.cuda.get_device_properties(0)
        return found.name, found.total_memory, found.major >= 8


def _processor() -> str:
    names = [line for line in read("/proc/cpuinfo").splitlines() if line.startswith("model name")]
    return names[0].partition(":")[2].strip() if names else os.uname().machine


def _host_memory() -> int:
    physical = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    limit = read("/sys/fs/cgroup/memory.max")
    return min(physical, int(limit)) if limit.isdigit() else physical


def _bf16_beats_float32() -> bool:
    """A processor without bfloat16 instructions ran it 16 times slower than float32: look, then time one product."""
    if sys.platform == "linux" and not {"avx512_bf16", "amx_bf16", "bf16"} & set(read("/proc/cpuinfo").split()):
        return False
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # so that no pool of threads exists when ranks are forked
    try:
        return _seconds(torch.bfloat16) < _seconds(torch.float32)
    finally:
        torch.set_num_threads(threads)


def _mkl_held_back() -> bool:
    """MKL keeps its AVX-512 kernels to Intel's processors (228 against 510 GFLOP/s on two cores of an EPYC)."""
    words = set(read("/proc/cpuinfo").split())
    return "avx512f" in words and "GenuineIntel" not in words and torch.backends.mkldnn.is_available()


def _seconds(dtype: torch.dtype) -> float:
    square = torch.ones(512, 512, dtype=dtype)
    return min(timeit.repeat(lambda: square @ square, number=1, repeat=4))  # the first also picks the kernel


def read(path: str) -> str:
    """What the system says in a file; empty where it has none such."""
    with suppress(OSError):
        return Path(path).read_text().strip()
    return ""
