"""Studies: one module per figure or table of the paper, and the training of the bundled model."""

if not __name__.startswith("moeless."):
    raise ImportError(f"import this package as moeless.experiments, not as {__name__!r}")
