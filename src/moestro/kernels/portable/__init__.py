"""The operator in PyTorch alone: any device, every format; the truth that other backends are held to."""

from moestro.kernels.portable.runner import PortableRunner

__all__ = ["PortableRunner"]
