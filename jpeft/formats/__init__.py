"""Number formats in plain JAX: code books, blocks, packing, double quantisation."""
