"""The one error type that a user sees as a sentence."""

from __future__ import annotations


class UserError(Exception):
    """The request was wrong: the message is one sentence saying what is wrong and what would be right.

    Commands print it without a traceback and exit with status 2.
    """


class RunFailed(Exception):
    """A correct request that could not be carried out: one sentence, exit status 1."""
