"""Eligibility: may this participant take this role in this task, and on which evidence."""

from collections.abc import Callable
from dataclasses import dataclass
from datetime import datetime

from services.selector.records import Evidence, EvidenceKind, Policy, Role, Verdict
from services.selector.transaction import Store, Transaction


@dataclass(frozen=True)
class Facts:
    """What the registry knows of somebody: names of recorded past work, and trusted endorsers."""

    track_record: tuple[str, ...] = ()
    endorsers: tuple[str, ...] = ()


@dataclass(frozen=True)
class Applicant:
    """Who asks for which role in which task, with the facts the registry knows."""

    task: str
    participant: str
    role: Role
    facts: Facts


class Eligibility:
    """The arena's policy: task creators qualify by stake, track record or reputation, the others by stake."""

    def __init__(self, store: Store, *, clock: Callable[[], datetime], task_creator_min_stake_micros: int) -> None:
        self._store = store
        self._clock = clock
        self._task_creator_min_stake_micros = task_creator_min_stake_micros

    async def check(self, applicant: Applicant, policy: Policy) -> Verdict:
        """The verdict on the stake that is available now; nothing is changed by it."""
        return await self._store.read(lambda transaction: self.decide(transaction, applicant, policy))

    def decide(self, transaction: Transaction, applicant: Applicant, policy: Policy) -> Verdict:
        """The verdict within a transaction."""
        available = transaction.accounts(applicant.participant).available_micros
        threshold = self._threshold(applicant.role, policy)
        evidence = [Evidence(EvidenceKind.STAKE, available >= threshold, available, threshold)]
        missing = [f"available stake of {available} micro-units is below {threshold}"]
        if applicant.role is Role.TASK_CREATOR:
            facts = applicant.facts
            past_work = _past_work_for_others(transaction, applicant)
            evidence += [
                Evidence(EvidenceKind.TRACK_RECORD, bool(past_work), references=past_work),
                Evidence(EvidenceKind.REPUTATION, bool(facts.endorsers), references=facts.endorsers),
            ]
            missing += ["there is no recorded past work in another owner group's task", "nobody trusted has endorsed"]
        eligible = any(fact.sufficient for fact in evidence)
        return Verdict(
            task=applicant.task,
            participant=applicant.participant,
            role=applicant.role,
            evidence=tuple(evidence),
            explanation="" if eligible else ", and ".join(missing),
            decide_time=self._clock(),
        )

    def _threshold(self, role: Role, policy: Policy) -> int:
        match role:
            case Role.TASK_CREATOR:
                return self._task_creator_min_stake_micros
            case Role.TRAINING_NODE:
                return policy.training_node_min_stake_micros
            case Role.VALIDATOR:
                return policy.validator_min_stake_micros


def _past_work_for_others(transaction: Transaction, applicant: Applicant) -> tuple[str, ...]:
    """The recorded work that was not done in a task of the applicant's own owner group.

    The registry knows who is bound to whom by a signature. Who is funded from one account is known here alone.
    """
    own_group = transaction.owner_group(applicant.participant)

    def is_for_others(reference: str) -> bool:
        # Work is named by tasks/{task}/...
        pool = transaction.pool(reference.split("/")[1]) if reference.startswith("tasks/") else None
        return pool is None or transaction.owner_group(pool.creator) != own_group

    return tuple(filter(is_for_others, applicant.facts.track_record))
