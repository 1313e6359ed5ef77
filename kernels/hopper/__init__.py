"""Kernels for Hopper (sm_90), written in Gluon: one warp feeds tiles by TMA to two groups of four that compute.

They give what the portable kernels of the same name give and take over from them where `usable` says so. Gluon is an
experimental part of Triton, so only the releases that this was tested with are used; there is no interpreter for it.
"""

from .limits import TESTED, usable

__all__ = ["usable"]

try:
    from . import backward_dcore, backward_dkv, backward_dq, forward
except ImportError:  # another release of Triton may have moved what these are made of; `usable` is false there anyway
    if TESTED:
        raise
else:
    __all__ += ["backward_dcore", "backward_dkv", "backward_dq", "forward"]
