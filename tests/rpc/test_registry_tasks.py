"""TaskService over a real server: what creators may post, and what time does to it."""

import asyncio
from collections.abc import Callable
from pathlib import Path

import grpc
import pytest
from google.protobuf.field_mask_pb2 import FieldMask

from tests.support.registry_server import (
    RegistryServer,
    config_of,
    dataset_bytes,
    refused,
)
from tiltyard.client import Client, pages
from tiltyard.identity import Key
from tiltyard.registry.v1 import leaderboard_pb2
from tiltyard.registry.v1.task_pb2 import (
    CancelTaskRequest,
    CloseTaskRequest,
    CreateTaskRequest,
    GetTaskRequest,
    ListTasksRequest,
    Task,
    UpdateTaskRequest,
    WatchTaskRequest,
)
from tiltyard.type.v1 import model_pb2
from tiltyard.type.v1 import task_pb2 as type_task_pb2
from tiltyard.type.v1.task_pb2 import (
    TASK_STATE_CANCELLED,
    TASK_STATE_CLOSED,
    TASK_STATE_FINAL,
    TASK_STATE_OPEN,
    TASK_STATE_PREPARING,
    TaskConfig,
)

INVALID = grpc.StatusCode.INVALID_ARGUMENT
PRECONDITION = grpc.StatusCode.FAILED_PRECONDITION
DENIED = grpc.StatusCode.PERMISSION_DENIED
HOUR_S, DAY_S = 3600, 86400


async def get(client: Client, task: str = "t") -> Task:
    return (await client.tasks.GetTask(GetTaskRequest(name=f"tasks/{task}"))).task


async def verdict_refusals(arena: RegistryServer) -> list[bool]:
    return [entry.verdict.eligible for entry in await arena.entries() if entry.WhichOneof("entry") == "verdict"]


async def test_a_task_is_created_with_the_defaults_filled_in(arena: RegistryServer, tmp_path: Path) -> None:
    creator = await arena.participant()
    answer = await creator.tasks.CreateTask(
        CreateTaskRequest(task_id="t", config=config_of(dataset_bytes(tmp_path)), request_id="r")
    )
    task, config = answer.task, answer.task.config
    assert answer.verdict.eligible
    assert task.state == TASK_STATE_PREPARING
    assert task.creator == f"participants/{creator.key.id}"
    assert (config.field, config.validators_per_submission) == ("general", 3)
    assert (config.loss, config.metric) == (type_task_pb2.LOSS_CROSS_ENTROPY, type_task_pb2.METRIC_ACCURACY)
    assert config.schedule.reveal_time.seconds == HOUR_S
    assert config.schedule.accept_time.seconds == 60
    assert config.schedule.lease_time.seconds == 120
    assert config.schedule.close_time.seconds - task.create_time.seconds == 7 * DAY_S
    assert config.limits.max_parameters == 100_000_000
    assert config.limits.max_model_bytes == 1 << 30
    assert config.limits.max_cpu_time.seconds == 600
    assert config.limits.daily_submissions == 20
    assert config.selection.validator_min_stake_micros == 100_000_000
    assert config.selection.rate.limit == 100
    assert task.deadline.seconds - task.create_time.seconds == HOUR_S
    assert await get(creator) == task
    again = CreateTaskRequest(task_id="t", config=config_of(dataset_bytes(tmp_path)), request_id="r")
    assert await creator.tasks.CreateTask(again) == answer
    assert await arena.kinds() == ["genesis", "participant_registered", "verdict", "task_created"]


async def test_the_registry_makes_an_id_up(arena: RegistryServer, tmp_path: Path) -> None:
    creator = await arena.participant()
    first = await arena.create_task(creator, dataset_bytes(tmp_path), task="")
    second = await arena.create_task(creator, dataset_bytes(tmp_path), task="")
    assert first.name != second.name


async def test_a_taken_id_a_stranger_and_a_bad_id_are_refused(arena: RegistryServer, tmp_path: Path) -> None:
    creator, dataset = await arena.participant(), dataset_bytes(tmp_path)
    await arena.create_task(creator, dataset)
    with refused(grpc.StatusCode.ALREADY_EXISTS, "TASK_EXISTS"):
        await arena.create_task(creator, dataset)
    with refused(PRECONDITION, "NOT_REGISTERED"):
        await arena.create_task(await arena.client(Key.generate()), dataset, task="other")
    with refused(INVALID, field="task_id"):
        await arena.create_task(creator, dataset, task="Not An Id")


def change(path: str, value: object) -> Callable[[TaskConfig], None]:
    def apply(config: TaskConfig) -> None:
        *parents, name = path.split(".")
        message = config
        for parent in parents:
            message = getattr(message, parent)
        setattr(message, name, value)

    return apply


def spec(**fields: object) -> Callable[[TaskConfig], None]:
    def apply(config: TaskConfig) -> None:
        del config.models[:]
        config.models.append(model_pb2.ModelSpec(**{"input_shape": [4], "outputs": 3, **fields}))  # type: ignore[arg-type]

    return apply


BAD_CONFIGS: list[tuple[Callable[[TaskConfig], object], str]] = [
    (change("display_name", ""), "config.display_name"),
    (change("display_name", "x" * 101), "config.display_name"),
    (change("display_name", "a\x00b"), "config.display_name"),
    (change("description", "x" * 10_001), "config.description"),
    (change("field", "Vision!"), "config.field"),
    (lambda c: c.ClearField("models"), "config.models"),
    (spec(), "config.models[0].architecture"),
    (spec(mlp=model_pb2.Mlp(hidden=[8, 8, 0])), "config.models[0].mlp.hidden[2]"),
    (spec(mlp=model_pb2.Mlp(hidden=[8], dropout=1.5)), "config.models[0].mlp.dropout"),
    (spec(mlp=model_pb2.Mlp(hidden=[8], activation=99)), "config.models[0].mlp.activation"),  # type: ignore[arg-type]
    (spec(resnet=model_pb2.Resnet(width=8)), "config.models[0].resnet.blocks"),
    (spec(transformer=model_pb2.Transformer(vocabulary=5)), "config.models[0].transformer.width"),
    (spec(onnx=model_pb2.Onnx(max_opset=-1)), "config.models[0].onnx.max_opset"),
    (spec(linear=model_pb2.Linear(), outputs=0), "config.models[0].outputs"),
    (spec(linear=model_pb2.Linear(), outputs=1), "config.models[0].outputs"),
    (spec(linear=model_pb2.Linear(), input_shape=[]), "config.models[0].input_shape"),
    (change("limits.max_parameters", 10), "config.models[0].mlp"),
    (change("limits.max_parameters", -1), "config.limits.max_parameters"),
    (change("limits.max_model_bytes", 1 << 43), "config.limits.max_model_bytes"),
    (lambda c: c.limits.max_cpu_time.FromSeconds(-1), "config.limits.max_cpu_time"),
    (change("limits.daily_submissions", -1), "config.limits.daily_submissions"),
    (lambda c: c.ClearField("evaluation_dataset"), "config.evaluation_dataset.sha256"),
    (change("evaluation_dataset.sha256", b"short"), "config.evaluation_dataset.sha256"),
    (change("evaluation_dataset.size_bytes", 0), "config.evaluation_dataset.size_bytes"),
    (change("evaluation_dataset.size_bytes", 1 << 41), "config.evaluation_dataset.size_bytes"),
    (change("holdout.size_bytes", 5), "config.holdout.sha256"),
    (lambda c: c.holdout.CopyFrom(c.evaluation_dataset), "config.holdout.sha256"),
    (lambda c: c.schedule.close_time.FromSeconds(1), "config.schedule.close_time"),
    (lambda c: c.schedule.close_time.FromSeconds(4_000_000_000), "config.schedule.close_time"),
    (lambda c: c.schedule.prepare_deadline.FromSeconds(1), "config.schedule.prepare_deadline"),
    (lambda c: c.schedule.prepare_deadline.FromSeconds(1_800_000_000), "config.schedule.prepare_deadline"),
    (lambda c: c.schedule.reveal_time.FromSeconds(0), "config.schedule.reveal_time"),
    (lambda c: c.schedule.lease_time.FromSeconds(DAY_S + 1), "config.schedule.lease_time"),
    (change("validators_per_submission", 100), "config.validators_per_submission"),
    (change("validators_per_submission", -1), "config.validators_per_submission"),
    (change("tolerance", -1), "config.tolerance"),
    (change("selection.curve", 77), "config.selection.curve"),
    (change("selection.alpha_millis", 1000), "config.selection.alpha_millis"),
    (change("selection.validator_min_stake_micros", -5), "config.selection.validator_min_stake_micros"),
    (change("selection.rate.limit", -1), "config.selection.rate.limit"),
    (change("selection.rate.limit", 1 << 31), "config.selection.rate.limit"),
    (
        lambda c: c.selection.MergeFrom(type_task_pb2.SelectionPolicy(curve=type_task_pb2.CURVE_LOG, alpha_millis=1)),
        "config.selection.alpha_millis",
    ),
    (change("loss", 99), "config.loss"),
    (lambda c: c.class_names.extend(["x" * 1000] * 1049), "config"),
    (change("metric", type_task_pb2.METRIC_WITHIN_BOUND), "config.bound"),
    (change("metric", type_task_pb2.METRIC_TOP_K_ACCURACY), "config.top_k"),
    (change("score_visibility", 77), "config.score_visibility"),
    (lambda c: c.class_names.extend(["a", "b"]), "config.class_names"),
    (lambda c: c.class_names.extend(["a", "b", ""]), "config.class_names[2]"),
]


@pytest.mark.parametrize(("spoil", "field"), BAD_CONFIGS, ids=[field for _, field in BAD_CONFIGS])
async def test_bad_configurations_name_the_field_and_change_nothing(
    arena: RegistryServer, tmp_path: Path, spoil: Callable[[TaskConfig], object], field: str
) -> None:
    creator = await arena.participant()
    config = config_of(dataset_bytes(tmp_path))
    spoil(config)
    with refused(INVALID, field=field):
        await creator.tasks.CreateTask(CreateTaskRequest(task_id="t", config=config))
    assert await arena.kinds() == ["genesis", "participant_registered"]


async def test_models_of_one_task_take_the_same_rows(arena: RegistryServer, tmp_path: Path) -> None:
    creator = await arena.participant()
    config = config_of(dataset_bytes(tmp_path))
    config.models.append(model_pb2.ModelSpec(input_shape=[2, 2], outputs=3, linear=model_pb2.Linear()))
    with refused(INVALID, field="config.models[1].input_shape"):
        await creator.tasks.CreateTask(CreateTaskRequest(config=config))


async def test_a_refusal_is_recorded_and_an_endorsement_may_help(arena: RegistryServer, tmp_path: Path) -> None:
    creator, dataset = await arena.participant(), dataset_bytes(tmp_path)
    arena.selection.refused.add(creator.key.id)
    with refused(PRECONDITION, "NOT_ELIGIBLE"):
        await arena.create_task(creator, dataset)
    assert await verdict_refusals(arena) == [False]
    arena.selection.refused.clear()
    await arena.create_task(creator, dataset)
    assert await verdict_refusals(arena) == [False, True]


async def test_an_unreachable_selector_changes_nothing_and_the_retry_succeeds(
    arena: RegistryServer, tmp_path: Path
) -> None:
    creator = await arena.participant()
    arena.selection.unavailable = True
    request = CreateTaskRequest(task_id="t", config=config_of(dataset_bytes(tmp_path)), request_id="r")
    with refused(grpc.StatusCode.UNAVAILABLE):
        await creator.tasks.CreateTask(request)
    arena.selection.unavailable = False
    assert (await creator.tasks.CreateTask(request)).task.name == "tasks/t"


async def test_tasks_are_listed_newest_first_and_filtered(arena: RegistryServer, tmp_path: Path) -> None:
    first, second = await arena.participant(), await arena.participant()
    dataset = dataset_bytes(tmp_path)
    for number, creator in enumerate((first, second, first, first)):
        await arena.create_task(creator, dataset, task=f"t{number}")
    await first.tasks.CancelTask(CancelTaskRequest(name="tasks/t0"))

    async def listed(**request: object) -> list[str]:
        page = await first.tasks.ListTasks(ListTasksRequest(**request))  # type: ignore[arg-type]
        return [task.name.removeprefix("tasks/") for task in page.tasks]

    assert await listed() == ["t3", "t2", "t1", "t0"]
    mine = f"creator = participants/{first.key.id}"
    assert await listed(filter=mine) == ["t3", "t2", "t0"]
    assert await listed(filter=f"{mine} AND state = PREPARING") == ["t3", "t2"]
    page = await first.tasks.ListTasks(ListTasksRequest(page_size=1, filter=mine))
    assert await listed(page_size=1, filter=mine, page_token=page.next_page_token) == ["t2"]
    with refused(INVALID, field="page_token"):
        await listed(page_token=page.next_page_token)
    for bad in ("state = NO_STATE", "color = red", "state"):
        with refused(INVALID, field="filter"):
            await listed(filter=bad)


async def test_a_page_of_large_tasks_ends_before_it_is_too_large_for_an_answer(
    arena: RegistryServer, tmp_path: Path
) -> None:
    creator, dataset = await arena.participant(), dataset_bytes(tmp_path)
    config = config_of(dataset)
    config.models[0].outputs = 10_000
    config.class_names.extend(f"{number:0100}" for number in range(10_000))
    for number in range(3):
        await arena.create_task(creator, dataset, task=f"t{number}", config=config)
    listed = [[task.name for task in page.tasks] async for page in pages(creator.tasks.ListTasks, ListTasksRequest())]
    assert listed == [["tasks/t2", "tasks/t1"], ["tasks/t0"]]


async def test_unknown_tasks_are_not_found(arena: RegistryServer) -> None:
    client = await arena.participant()
    with refused(grpc.StatusCode.NOT_FOUND, "TASK_NOT_FOUND"):
        await get(client, "none")
    with refused(grpc.StatusCode.NOT_FOUND):
        await client.tasks.CloseTask(CloseTaskRequest(name="tasks/none"))
    with refused(grpc.StatusCode.NOT_FOUND):
        await client.tasks.WatchTask(WatchTaskRequest(name="tasks/none")).read()
    with refused(INVALID, field="name"):
        await client.tasks.GetTask(GetTaskRequest(name="t"))


async def test_a_watch_resumes_from_its_cursor_and_ends_with_the_task(arena: RegistryServer, tmp_path: Path) -> None:
    creator = await arena.participant()
    await arena.create_task(creator, dataset_bytes(tmp_path))
    call = creator.tasks.WatchTask(WatchTaskRequest(name="tasks/t"))
    first = await call.read()
    call.cancel()
    resumed = creator.tasks.WatchTask(WatchTaskRequest(name="tasks/t", cursor=first.cursor))
    waiting = asyncio.ensure_future(resumed.read())
    await creator.tasks.CancelTask(CancelTaskRequest(name="tasks/t", reason="a mistake"))
    async with asyncio.timeout(10):
        message = await waiting
        assert message.task.state == TASK_STATE_CANCELLED
        assert message.task.state_reason == "a mistake"
        # The pool's end may show as one change more.
        while (last := await resumed.read()) is not grpc.aio.EOF:
            assert last.task.state == TASK_STATE_CANCELLED
    with refused(INVALID, field="cursor"):
        await creator.tasks.WatchTask(WatchTaskRequest(name="tasks/t", cursor="-1")).read()


async def test_amendments_are_recorded_and_other_fields_are_fixed(arena: RegistryServer, tmp_path: Path) -> None:
    creator, stranger = await arena.participant(), await arena.participant()
    task = await arena.create_task(creator, dataset_bytes(tmp_path))

    def request(*paths: str, later_s: int = DAY_S) -> UpdateTaskRequest:
        new = Task(name="tasks/t", config=TaskConfig(display_name="New", description="Two\nlines", tolerance=9))
        new.config.schedule.close_time.FromSeconds(task.config.schedule.close_time.seconds + later_s)
        return UpdateTaskRequest(task=new, update_mask=FieldMask(paths=paths))

    paths = ("config.display_name", "config.description", "config.schedule.close_time")
    updated = (await creator.tasks.UpdateTask(request(*paths))).task
    assert (updated.config.display_name, updated.config.description) == ("New", "Two\nlines")
    assert updated.config.schedule.close_time.seconds == task.config.schedule.close_time.seconds + DAY_S
    assert updated.config.tolerance == 0
    assert (await arena.entries())[-1].task_changed.config == updated.config
    for bad in ((), ("config.tolerance",), ("state",)):
        with refused(INVALID, field="update_mask"):
            await creator.tasks.UpdateTask(request(*bad))
    with refused(INVALID, field="task.config.schedule.close_time"):
        await creator.tasks.UpdateTask(request(paths[2], later_s=-1))
    with refused(DENIED, "NOT_THE_CREATOR"):
        await stranger.tasks.UpdateTask(request(paths[0]))
    await creator.tasks.CancelTask(CancelTaskRequest(name="tasks/t"))
    with refused(PRECONDITION, "TASK_ENDED"):
        await creator.tasks.UpdateTask(request(paths[0]))


async def test_a_task_without_submissions_is_final_after_its_close(arena: RegistryServer, tmp_path: Path) -> None:
    creator, stranger = await arena.participant(), await arena.participant()
    await arena.create_task(creator, dataset_bytes(tmp_path))
    close = CloseTaskRequest(name="tasks/t", request_id="r")
    with refused(PRECONDITION, "TASK_NOT_OPEN"):
        await creator.tasks.CloseTask(close)
    await arena.upload(creator, dataset_bytes(tmp_path), task="tasks/t")
    await arena.watch_until(creator, TASK_STATE_OPEN)
    with refused(DENIED, "NOT_THE_CREATOR"):
        await stranger.tasks.CloseTask(close)
    closed = await creator.tasks.CloseTask(close)
    assert closed.task.state == TASK_STATE_CLOSED
    final = await arena.watch_until(creator, TASK_STATE_FINAL)
    assert final.ranking_round == 1
    assert await creator.tasks.CloseTask(close) == closed
    await arena.registry.referee.turn()
    assert not arena.selection.pools["t"].open
    board = (
        await creator.leaderboard.GetLeaderboard(leaderboard_pb2.GetLeaderboardRequest(task="tasks/t"))
    ).leaderboard
    assert board.final
    assert not board.entries
    for late in (
        creator.tasks.CloseTask(CloseTaskRequest(name="tasks/t")),
        creator.tasks.CancelTask(CancelTaskRequest(name="tasks/t")),
    ):
        with refused(PRECONDITION, "TASK_ENDED"):
            await late


async def test_a_task_closes_by_itself_in_time(arena: RegistryServer, tmp_path: Path) -> None:
    creator = await arena.participant()
    await arena.open_task(creator, dataset_bytes(tmp_path))
    await arena.advance(seconds=7 * DAY_S)
    final = await arena.watch_until(creator, TASK_STATE_FINAL)
    assert not final.HasField("deadline")


async def test_creator_and_operator_may_cancel_and_nobody_else(arena: RegistryServer, tmp_path: Path) -> None:
    creator, stranger = await arena.participant(), await arena.participant()
    operator = await arena.participant(key=arena.operator)
    await arena.open_task(creator, dataset_bytes(tmp_path), task="a")
    await arena.open_task(creator, dataset_bytes(tmp_path), task="b")
    with refused(DENIED, "NOT_THE_CREATOR"):
        await stranger.tasks.CancelTask(CancelTaskRequest(name="tasks/a"))
    with refused(INVALID, field="reason"):
        await creator.tasks.CancelTask(CancelTaskRequest(name="tasks/a", reason="x" * 501))
    for canceller, task in ((creator, "a"), (operator, "b")):
        answer = await canceller.tasks.CancelTask(CancelTaskRequest(name=f"tasks/{task}", reason="because"))
        assert (answer.task.state, answer.task.state_reason) == (TASK_STATE_CANCELLED, "because")
        await arena.registry.referee.turn()
        assert not arena.selection.pools[task].open


async def test_a_cursor_of_another_kind_is_refused(arena: RegistryServer, tmp_path: Path) -> None:
    creator = await arena.participant("creator")
    await arena.create_task(creator, dataset_bytes(tmp_path))
    with refused(INVALID, field="cursor"):
        request = leaderboard_pb2.WatchLeaderboardRequest(task="tasks/t", cursor="not one")
        await creator.leaderboard.WatchLeaderboard(request).read()
