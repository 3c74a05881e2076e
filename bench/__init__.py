"""Benchmarks of llmloss_ext beside torch, on this machine, as ratios within one run."""
