"""A CUDA device in main memory, on which the real CuPy runs."""
