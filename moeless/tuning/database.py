"""Databases that hold studies: which driver an address means, which package is missing."""

from __future__ import annotations

import importlib.util
import time

import optuna
from sqlalchemy import exc
from sqlalchemy.engine import URL, make_url

from moeless.credentials import mask
from moeless.errors import UserError

#: Packages whose name is not that of the module they bring.
_PACKAGES = {
    "MySQLdb": "mysqlclient",
    "mysql": "mysql-connector-python",
    "psycopg": "'moeless[postgres]'",
    "psycopg2": "psycopg2-binary",
}
#: Of several processes that make the tables of an empty database at once, the database refuses all but one: how often
#: they try, and seconds in between.
_TRIES, _PAUSE = 4, 0.5


def open_database(where: str) -> optuna.storages.RDBStorage:
    """Studies in the database at a URL; the tables are made where they are missing.

    Raises:
        UserError: it is no URL, or a Python package that it needs is not installed.
    """
    refused = f"cannot open the study's storage {mask(where)}"
    try:
        url = _with_driver(where)
        url.get_dialect().import_dbapi()
    except exc.NoSuchModuleError:
        raise UserError(
            f"{refused}: no driver of that name is installed; PostgreSQL is postgresql:// "
            f"(pip install {_PACKAGES['psycopg']}), another database needs the package with its SQLAlchemy dialect"
        ) from None
    except ImportError as error:
        module = (error.name or url.get_driver_name()).partition(".")[0]
        raise UserError(
            f"{refused}: {url.drivername}:// needs a Python package that is not installed: "
            f"pip install {_PACKAGES.get(module, module)}"
        ) from error
    except (exc.ArgumentError, ValueError):
        # SQLAlchemy's own message may quote the password
        raise UserError(
            f"{refused}: a database's address has the form dialect[+driver]://user:password@host/database"
        ) from None
    # connections that broke while a trial ran are made anew
    address, options = url.render_as_string(hide_password=False), {"pool_pre_ping": True}
    for _ in range(_TRIES - 1):
        try:
            return optuna.storages.RDBStorage(address, engine_kwargs=options)
        except exc.DBAPIError as error:
            if not isinstance(error, (exc.IntegrityError, exc.ProgrammingError)) and "already exists" not in str(error):
                raise
            time.sleep(_PAUSE)
    return optuna.storages.RDBStorage(address, engine_kwargs=options)


def _with_driver(where: str) -> URL:
    """The address, where a plain one of PostgreSQL gets the driver that is installed.

    Which driver SQLAlchemy takes for it depends on its version.
    """
    url = make_url(where)
    if url.drivername not in ("postgresql", "postgres"):
        return url
    drivers = ("psycopg", "psycopg2")
    return url.set(drivername=f"postgresql+{next(filter(importlib.util.find_spec, drivers), drivers[0])}")
