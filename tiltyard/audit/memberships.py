"""Eligibility verdicts held against their evidence, and memberships against the verdicts."""

from tiltyard.audit.names import Form, demand_name
from tiltyard.audit.reading import Reading
from tiltyard.audit.story import PendingVerdict, Story
from tiltyard.audit.wrong import Claim, demand, moment_ns
from tiltyard.type.v1 import envelope_pb2, evaluation_pb2, log_pb2, participation_pb2

CREATOR = participation_pb2.ROLE_TASK_CREATOR

_STAKE = participation_pb2.EVIDENCE_KIND_STAKE
_REPUTATION = participation_pb2.EVIDENCE_KIND_REPUTATION
_ACTIVE = participation_pb2.MEMBERSHIP_STATE_ACTIVE
_PAUSED = participation_pb2.MEMBERSHIP_STATE_PAUSED
_LEFT = participation_pb2.MEMBERSHIP_STATE_LEFT
_REFUSED = participation_pb2.MEMBERSHIP_STATE_REFUSED
_STEPS: dict[int, tuple[int, ...]] = {_ACTIVE: (_PAUSED, _LEFT), _PAUSED: (_ACTIVE, _LEFT)}


def verdict_given(reading: Reading, index: int, leaf: bytes, verdict: participation_pb2.EligibilityVerdict) -> None:
    """Decides again from the evidence; the stake that it names waits for the ledger."""
    story = reading.story
    what = f"the verdict on {verdict.participant} in {verdict.task}"
    demand_name(verdict.task, Form.TASK, Claim.HISTORY)
    demand(verdict.participant in story.participants, Claim.HISTORY, f"{what} is about nobody who has registered")
    decide_time_ns = moment_ns(verdict.decide_time, Claim.VERDICTS, what)
    for fact in verdict.evidence:
        demand(
            fact.sufficient == _suffices(story, verdict, fact), Claim.VERDICTS, f"{what} weighs its evidence wrongly"
        )
    _check_threshold(story, verdict)
    eligible = any(fact.sufficient for fact in verdict.evidence)
    demand(verdict.eligible == eligible, Claim.VERDICTS, f"{what} does not follow from its evidence")
    story.verdicts.append(PendingVerdict(index, verdict, decide_time_ns))
    if verdict.eligible:
        story.eligible.add((verdict.task, verdict.participant, verdict.role))
    if verdict.role == CREATOR:
        named = {who for fact in verdict.evidence if fact.kind == _REPUTATION for who in fact.references}
        story.endorsed[verdict.task, verdict.participant] = named


def stakes_weighed(verdict: participation_pb2.EligibilityVerdict) -> list[int]:
    """The amounts that a verdict says were available."""
    return [fact.amount_micros for fact in verdict.evidence if fact.kind == _STAKE]


def demand_eligible(story: Story, task: str, participant: str, role: int) -> None:
    """Raises Wrong unless a verdict let this participant have this role."""
    demand(
        (task, participant, role) in story.eligible,
        Claim.VERDICTS,
        f"{participant} takes part in {task} without a verdict that it may",
    )


def check_field(story: Story, task: str, creator: str, field: str) -> None:
    """Whether those whose word let a task be created gave it in the task's field. Raises Wrong."""
    for endorser in story.endorsed.get((task, creator), ()):
        known = (endorser, creator, field) in story.endorsements
        demand(known, Claim.VERDICTS, f"{endorser} has never endorsed {creator} in {task}'s field")


def membership_changed(reading: Reading, index: int, leaf: bytes, entry: log_pb2.MembershipChanged) -> None:
    """Somebody enters a task at their own signed wish, pauses, goes on, or leaves."""
    reading.task(entry.task)
    if entry.HasField("statement"):
        said, signer = reading.open(entry.statement, envelope_pb2.JoinStatement)
        demand(
            (said.task, said.participant, said.role) == (entry.task, entry.participant, entry.role),
            Claim.ENVELOPES,
            f"{signer} asked for another task or role, or for somebody else",
        )
        demand(said.participant == signer, Claim.ENVELOPES, f"{said.participant} did not sign, {signer} did")
    story = reading.story
    who, key = entry.participant, (entry.task, entry.participant)
    role, before = story.members.get(key, (entry.role, _LEFT))
    if before in (_LEFT, _REFUSED):
        demand(entry.HasField("statement"), Claim.HISTORY, f"{who} enters {entry.task} without having asked for it")
        demand(
            entry.state in (_ACTIVE, _REFUSED), Claim.HISTORY, f"{who} makes a step in {entry.task} that there is not"
        )
    else:
        demand(entry.state in _STEPS[before], Claim.HISTORY, f"{who} makes a step in {entry.task} that there is not")
    same = before == _REFUSED or role == entry.role
    demand(same and who != story.tasks[entry.task].creator, Claim.HISTORY, f"{who} has another role in {entry.task}")
    if entry.state in (_ACTIVE, _PAUSED):
        demand_eligible(story, entry.task, who, entry.role)
    story.members[key] = (entry.role, entry.state)
    reading.counts[Claim.HISTORY] += 1


def demand_joined(story: Story, task: str, validator: str) -> None:
    """Raises Wrong unless somebody is, or was, a validator of the task. Who has left ends what was begun."""
    role, state = story.members.get((task, validator), (0, _REFUSED))
    joined = role == participation_pb2.ROLE_VALIDATOR and state != _REFUSED
    demand(joined, Claim.HISTORY, f"{validator} accepts a duty in {task}, and has not joined it as validator")


def _suffices(story: Story, verdict: participation_pb2.EligibilityVerdict, fact: participation_pb2.Evidence) -> bool:
    match fact.kind:
        case participation_pb2.EVIDENCE_KIND_STAKE:
            demand(not fact.references, Claim.VERDICTS, f"a stake of {verdict.participant} refers to something else")
            return fact.amount_micros >= fact.threshold_micros
        case participation_pb2.EVIDENCE_KIND_TRACK_RECORD:
            for name in fact.references:
                _check_track_record(story, verdict.participant, name)
            return bool(fact.references)
        case participation_pb2.EVIDENCE_KIND_REPUTATION:
            for endorser in fact.references:
                known = any(entry[:2] == (endorser, verdict.participant) for entry in story.endorsements)
                demand(known, Claim.VERDICTS, f"{endorser} has never endorsed {verdict.participant}")
            return bool(fact.references)
    return False


def _check_threshold(story: Story, verdict: participation_pb2.EligibilityVerdict) -> None:
    """The task's minimum; a task creator's is the arena's, which no leaf holds."""
    task = story.tasks.get(verdict.task)
    if task is None or verdict.role == CREATOR:
        return
    selection = task.config.selection
    validator = verdict.role == participation_pb2.ROLE_VALIDATOR
    minimum = selection.validator_min_stake_micros if validator else selection.training_node_min_stake_micros
    for fact in verdict.evidence:
        if fact.kind == _STAKE:
            demand(
                fact.threshold_micros == minimum,
                Claim.VERDICTS,
                f"{verdict.participant} is held against {fact.threshold_micros}, {verdict.task} asks {minimum}",
            )


def _check_track_record(story: Story, participant: str, name: str) -> None:
    submission = story.submissions.get(name.partition("/evaluations/")[0])
    demand(submission is not None, Claim.VERDICTS, f"the track record {name} is of no submission")
    if submission is None:
        return
    inside = submission.task.creator in story.group(participant)
    demand(not inside, Claim.VERDICTS, f"the track record {name} is of the participant's own task")
    if "/evaluations/" in name:
        mine = name.endswith(f"-{participant.removeprefix('participants/')}")
        demand(mine and name in story.seals, Claim.VERDICTS, f"{name} is no evaluation by {participant}")
        round_ = int(name.rpartition("/")[2].partition("-")[0])
        # Where the task hides its counts, the report is no leaf yet.
        opened = story.reports[submission.name, round_]
        agreed = name not in story.outliers[submission.name, round_] and (not opened or name in opened)
        demand(agreed, Claim.VERDICTS, f"{name} was no evaluation within the tolerance")
        return
    scored = submission.state == evaluation_pb2.SUBMISSION_STATE_SCORED
    mine = submission.commit.participant == participant
    demand(scored and mine, Claim.VERDICTS, f"{name} is no scored submission of {participant}")
