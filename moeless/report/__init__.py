"""Figures and pages: what a run found, for people."""
