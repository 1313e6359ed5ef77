"""The tuner: devices, search space, offline compilation, prediction, measurement and search."""
