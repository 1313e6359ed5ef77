"""Kernels and the oracle that defines them; each file is one kernel family, and none imports another."""
