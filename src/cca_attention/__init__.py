"""CCA attention: fused global-local attention kernels, their autotuner and their verification."""

from .problem import Problem
from .spec import CCASpec

__version__ = "0.1.0"

__all__ = ["CCASpec", "Problem"]
