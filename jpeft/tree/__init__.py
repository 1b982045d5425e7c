"""Parameter trees: paths, selection, layout of weights, trainable and frozen."""
