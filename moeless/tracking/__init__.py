"""A run's folder: what was asked, with what, what came out; and its mirror in W&B."""

from moeless.tracking.run import Run, find_runs, read_manifest, start_run

__all__ = ["Run", "find_runs", "read_manifest", "start_run"]
