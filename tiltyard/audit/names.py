"""Resource names that only the log's keeper wrote: that each has the form of what it names."""

import re
from enum import Enum

from tiltyard.audit.wrong import Claim, demand


class Form(Enum):
    """How the name of one kind of resource is written."""

    PARTICIPANT = re.compile("participants/[0-9a-f]{40}")
    TASK = re.compile("tasks/[a-z0-9-]{1,63}")
    ARTIFACT = re.compile("artifacts/[0-9a-f]{64}")
    DRAW = re.compile("draws/[a-z0-9-]{1,100}")


def demand_name(name: str, form: Form, claim: Claim) -> None:
    """Raises Wrong for a text that can name nothing of the kind."""
    demand(form.value.fullmatch(name) is not None, claim, f"{name!r} is no name of a {form.name.lower()}")
