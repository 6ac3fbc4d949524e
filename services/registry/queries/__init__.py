"""The questions of `transaction.Reading`, asked in SQL on one connection."""

from collections.abc import Sequence
from typing import Any

from services.registry.queries.judging import JudgingQuestions
from services.registry.queries.log import LogQuestions
from services.registry.queries.submissions import SubmissionQuestions
from services.registry.queries.tasks import TaskQuestions
from services.runtime.engines import Written


class SqlReading(TaskQuestions, SubmissionQuestions, JudgingQuestions, LogQuestions):
    """`transaction.Reading` over a connection."""


class FirstReading(SqlReading):
    """`transaction.Reading` that reads only the first entry of what is asked over and over."""

    def _rows(self, question: Written, **values: Any) -> Sequence[Any]:
        return question.ask_first(self._connection, **values)
