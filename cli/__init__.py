"""The command line: one module per command, wiring only."""

if not __name__.startswith("moeless."):
    raise ImportError(f"import this package as moeless.cli, not as {__name__!r}")
