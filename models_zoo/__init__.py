"""Models that gammac knows by name: the embedded `tiny` and those it can fetch."""
