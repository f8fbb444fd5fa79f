"""Targets: numbers in TOML files, what things cost on them, and the emitters."""
