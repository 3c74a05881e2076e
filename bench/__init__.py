"""What this repository makes of the benchmark (`llmloss_bench`): README's figures, and results."""
