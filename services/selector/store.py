"""The selector's store on SQLite and PostgreSQL: each transaction of the domain is one of the database."""

from collections.abc import Callable
from typing import TypeVar

from sqlmodel import Session

from services.runtime.database import Database
from services.selector.store_draws import SqlDrawRecords
from services.selector.store_pools import SqlGroupRecords, SqlPoolRecords
from services.selector.store_stakes import SqlStakeRecords
from services.selector.transaction import Transaction

T = TypeVar("T")


class SqlTransaction(SqlStakeRecords, SqlGroupRecords, SqlPoolRecords, SqlDrawRecords):
    """Everything the selector remembers, within one transaction of the database."""

    def __init__(self, session: Session) -> None:
        self._session = session


class SqlStore:
    """A store over the process's one database."""

    def __init__(self, database: Database) -> None:
        self._database = database

    async def write(self, work: Callable[[Transaction], T]) -> T:
        """Runs `work` in a transaction that is committed when this returns."""
        return await self._database.write(lambda session: work(SqlTransaction(session)))

    async def read(self, work: Callable[[Transaction], T]) -> T:
        """Runs `work` on a consistent snapshot."""
        return await self._database.read(lambda session: work(SqlTransaction(session)))
