"""NVIDIA GPUs: kernels as blocks of threads, a fat binary of them in the library, and what can be known of
both without a GPU."""
