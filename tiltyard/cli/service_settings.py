"""Which of the services' TILTYARD_* settings `tiltyard up` and `tiltyard demo` hand on, and to whom."""

from collections.abc import Mapping

_PREFIX = "TILTYARD_"

_OF_ALL = (
    *("LOG_LEVEL", "LOG_FORMAT", "STREAM_IDLE_S", "CONNECTION_AGE_S"),
    *("CALLS_PER_SECOND", "CALLS_BURST", "CALLS_IN_FLIGHT", "CALLS_IN_FLIGHT_PER_ADDRESS", "CALLS_UNLIMITED"),
    *("CONNECTIONS", "CONNECTIONS_PER_ADDRESS", "CONNECTIONS_PER_SECOND", "CONNECTIONS_BURST"),
    *("CONNECTIONS_PER_SECOND_PER_ADDRESS", "CONNECTIONS_BURST_PER_ADDRESS"),
)
_OF_ONE = {
    "registry": (
        *("ARTIFACTS", "TRUSTED_ENDORSERS", "KEEP_UPLOADS_HOURS", "KEEP_REFUSED_DAYS", "KEEP_FREE_BYTES"),
        *("MAX_ARTIFACT_BYTES", "MAX_OPEN_UPLOADS", "MAX_PENDING_BYTES", "MAX_PARTICIPANT_BYTES"),
        "MAX_PENDING_ARTIFACTS",
        *("STRANGERS_PER_DAY_PER_ADDRESS", "STRANGERS_PER_DAY", "CHANGES_PER_DAY"),
    ),
    "selector": (
        *("VALIDATOR_MIN_STAKE_MICROS", "TRAINING_NODE_MIN_STAKE_MICROS", "TASK_CREATOR_MIN_STAKE_MICROS"),
        "UNBONDING_TIME_S",
    ),
    "trainer": (
        *("DATA_DIR", "PACKED_BYTES", "DEVICE", "MAX_RUNS", "MODEL_MEMORY_BYTES", "KEEP_MODELS_DAYS"),
        "TRAINING_THREADS",
    ),
    "validator": (
        *("CONCURRENCY", "STOP_AFTER", "CACHE_BYTES", "DEVICE", "NODE_ENDPOINTS"),
        *("MODEL_SERVERS", "MODEL_SHARE", "MODEL_TEMPLATE"),
    ),
}
HANDED_ON = {service: frozenset((*_OF_ALL, *own)) for service, own in _OF_ONE.items()}
"""Names without the prefix, by service."""

DECIDED = {
    "STATE_DIR": "--state names the folder of all state",
    "LISTEN": "--port-base names the ports, on loopback only",
    "PLAINTEXT_ANYWHERE": "it serves on loopback only",
    "DATABASE_URL": "each service has an SQLite database of its own",
    "KEY_FILE": "each service has a key of its own below --state",
    "OPERATORS": "operator.pem below --state is the operator's key",
    "SERVICES": "the selector obeys the registry that is started with it",
}
"""What `tiltyard up` sees to itself, and how."""
DECIDED_BY_DEMO = {
    **DECIDED,
    "LISTEN": "it takes free ports, on loopback only",
    "OPERATORS": "the operator is one of those whom it plays",
    "DATA_DIR": "each trainer gets a shard of --data",
}
"""What `tiltyard demo` sees to itself, and how."""


def asked_for(service: str, environment: Mapping[str, str]) -> dict[str, str]:
    """The settings of one service in the environment, without the prefix."""
    return {name: environment[_PREFIX + name] for name in HANDED_ON[service] if _PREFIX + name in environment}
