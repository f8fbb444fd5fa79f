"""The TVM emitter. Only functions that need TVM import it."""
