"""NVIDIA GPUs: `route` chooses among kernels in `mosaic`, `few_rows` and `triton`."""
