"""``python -m moeless`` is the ``moeless`` command."""

from moeless.cli.main import run

if __name__ == "__main__":
    run()
