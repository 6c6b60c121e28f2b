"""Readers of routing that other systems recorded."""
