"""The interpreter: any function of a parameter tree, for adapted leaves."""
