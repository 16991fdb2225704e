"""The fast CPU path: NVFP4 and bf16 experts on AMX, AVX-512, AVX2 or plain C++, chosen at run time."""

from moestro.kernels.cpu.runner import CpuRunner, CpuTactic

__all__ = ["CpuRunner", "CpuTactic"]
