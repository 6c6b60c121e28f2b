"""Load predictors: from what layer l sees to the load of layer l + d."""

if not __name__.startswith("moeless."):
    raise ImportError(f"import this package as moeless.predictors, not as {__name__!r}")
