"""Adapters on disk, by Orbax."""
