"""Studies on storage that several processes share, continued where they stopped."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import optuna

from moeless.credentials import mask
from moeless.errors import RunFailed, UserError
from moeless.files import refusal
from moeless.tuning.journal import open_journal

#: Attribute of a study that says what it tunes.
SETTINGS = "settings"


def open_storage(where: str) -> optuna.storages.BaseStorage:
    """A journal file (made where it is missing), or any database that SQLAlchemy reaches by its URL.

    Raises:
        UserError: the file cannot be written or is no journal, or the database cannot be reached.
    """
    with _sentences(where):
        if "://" in where:
            # SQLAlchemy is loaded only where a database is used
            from moeless.tuning.database import open_database

            return open_database(where)
        return optuna.storages.JournalStorage(open_journal(where))


@contextmanager
def _sentences(where: str) -> Iterator[None]:
    """Drivers, SQLAlchemy and journals fail with errors of their own.

    Raises:
        UserError: any of them.
    """
    try:
        yield
    except UserError:
        raise
    except Exception as error:
        raise UserError(
            f"cannot open the study's storage {mask(where)} ({_reason(error, where)}); "
            "name a journal file or a database URL"
        ) from error


@contextmanager
def kept(where: str) -> Iterator[None]:
    """A database may go away while trials run.

    Raises:
        RunFailed: it did; the study can be continued.
    """
    try:
        yield
    except optuna.exceptions.StorageInternalError as error:
        cause = error.__cause__ or error
    except Exception as error:
        # all of SQLAlchemy's, which is not loaded where a journal is used
        if not any(kind.__module__ == "sqlalchemy.exc" for kind in type(error).__mro__):
            raise
        cause = error
    else:
        return
    raise RunFailed(
        f"the study's storage {mask(where)} failed ({_reason(cause, where)}); the same command goes on with the study"
    ) from cause


def _reason(error: BaseException, where: str) -> str:
    said = (refusal(error) if isinstance(error, OSError) else None) or str(error)
    return mask((said.splitlines() or [type(error).__name__])[0], [where])[:160]


def open_study(
    where: str,
    name: str,
    directions: Sequence[str],
    settings: Mapping[str, Any],
    sampler: optuna.samplers.BaseSampler,
    pruner: optuna.pruners.BasePruner,
) -> optuna.Study:
    """Create the study, or go on with the one of that name.

    Raises:
        UserError: the storage cannot be opened, or the existing study tunes something else.
    """
    storage = open_storage(where)
    with _sentences(where):
        known = {study.study_name: study for study in optuna.get_all_study_summaries(storage)}
        if name in known and SETTINGS in known[name].user_attrs:
            _same(name, known[name].user_attrs[SETTINGS], settings)
        study = optuna.create_study(
            storage=storage,
            study_name=name,
            directions=list(directions),
            sampler=sampler,
            pruner=pruner,
            load_if_exists=True,
        )
        study.set_user_attr(SETTINGS, dict(settings))
    return study


def _same(name: str, theirs: Mapping[str, Any], ours: Mapping[str, Any]) -> None:
    for key in sorted({*theirs, *ours}):
        if theirs.get(key) != ours.get(key):
            raise UserError(
                f"study {name!r} was begun with {key} {theirs.get(key)!r}, now it is {ours.get(key)!r}; "
                "choose another --study, or give the same options"
            )
