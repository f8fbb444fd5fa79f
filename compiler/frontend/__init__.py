"""The front end: a transformers model in, a module with `@forward` out."""
