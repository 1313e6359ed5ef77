"""Profiles: what was found for one GPU, as files that say what was measured and what was predicted."""
