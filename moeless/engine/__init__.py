"""Elastic expert parallelism, live: ranks that hold, move and drop expert copies while tokens flow."""
