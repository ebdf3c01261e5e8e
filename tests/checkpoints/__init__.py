"""Checkpoints of every kind, each equal to the reference libraries on the same folder, or refused by name."""
