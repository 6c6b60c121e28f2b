"""Elastic expert serving of Mixture-of-Experts models: trace, predict, plan, serve, bill, report."""

__version__ = "0.1.0"
