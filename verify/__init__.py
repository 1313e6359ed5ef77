"""Verification: tolerances derived from the numbers, inputs that provoke faults, and the checks."""
