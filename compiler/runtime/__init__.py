"""Artifacts: written, opened, run, evaluated, timed. Nothing here prints."""
