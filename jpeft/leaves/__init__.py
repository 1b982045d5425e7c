"""Leaves that several methods share: how each acts wherever a model uses a weight."""
