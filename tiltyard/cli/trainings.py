"""`tiltyard training`: the trainings of a node, those of long ago among them; follow one, or stop it."""

from typing import TYPE_CHECKING, Annotated

import typer

from tiltyard.cli.connection import TRAINER, JsonOption, KeyOption, NodeOption, TrainerOption, connect_node, run
from tiltyard.cli.output import as_json, enum_word, print_json, print_message, print_table
from tiltyard.cli.training_progress import CurveOption, Record, TensorBoardOption, describe, follow_to_end

if TYPE_CHECKING:
    from tiltyard.trainer.v1 import trainer_pb2

app = typer.Typer(help="See, follow and cancel the trainings of a node.", no_args_is_help=True)

TrainingArgument = Annotated[
    str, typer.Argument(metavar="TRAINING", help="trainings/{training}, or the last part of it.")
]


def training_name(text: str) -> str:
    """trainings/{training} from that or from its last part."""
    return text if text.startswith("trainings/") else f"trainings/{text}"


def _state(training: "trainer_pb2.Training") -> str:
    return enum_word(training, "state")


@app.command("list")
def list_trainings(
    key: KeyOption, trainer: TrainerOption = TRAINER, node: NodeOption = "", json: JsonOption = False
) -> None:
    """List the node's trainings, newest first."""
    from tiltyard.client import pages
    from tiltyard.trainer.v1 import trainer_pb2

    async def work() -> None:
        async with connect_node(key, trainer, node) as connection:
            listed = pages(connection.trainings.ListTrainings, trainer_pb2.ListTrainingsRequest(page_size=1000))
            found = [each async for page in listed for each in page.trainings]
        if json:
            print_json({"trainings": [as_json(each) for each in found]})
        else:
            print_table(
                ("training", "task", "dataset", "state", "steps", ""),
                (
                    (
                        each.name,
                        each.task,
                        each.dataset,
                        _state(each),
                        f"{each.progress.step}/{each.progress.total_steps}",
                        each.error or each.submission or (describe(each) if each.progress.step else ""),
                    )
                    for each in found
                ),
            )

    run(work())


@app.command("show")
def show(
    training: TrainingArgument,
    key: KeyOption,
    trainer: TrainerOption = TRAINER,
    node: NodeOption = "",
    json: JsonOption = False,
) -> None:
    """Show one training as it is now."""
    from tiltyard.trainer.v1 import trainer_pb2

    async def work() -> None:
        async with connect_node(key, trainer, node) as connection:
            request = trainer_pb2.GetTrainingRequest(name=training_name(training))
            found = (await connection.trainings.GetTraining(request)).training
        print_message(found, as_document=json)

    run(work())


@app.command("watch")
def watch(
    training: TrainingArgument,
    key: KeyOption,
    trainer: TrainerOption = TRAINER,
    node: NodeOption = "",
    curve: CurveOption = None,
    tensorboard: TensorBoardOption = None,
    json: JsonOption = False,
) -> None:
    """Follow a training from its first step on until it ends. Leaving it stops nothing."""
    from tiltyard.trainer.v1 import trainer_pb2

    async def work() -> None:
        record = Record(curve=curve, tensorboard=tensorboard)
        async with connect_node(key, trainer, node) as connection:
            request = trainer_pb2.GetTrainingRequest(name=training_name(training))
            found = (await connection.trainings.GetTraining(request)).training
            found = await follow_to_end(connection, found, record)
        print_message(found, as_document=json)

    run(work())


@app.command("cancel")
def cancel(
    training: TrainingArgument,
    key: KeyOption,
    trainer: TrainerOption = TRAINER,
    node: NodeOption = "",
    json: JsonOption = False,
) -> None:
    """Stop a training, and remove what it has so far. One that has ended stays as it is."""
    from tiltyard.client import new_request_id
    from tiltyard.trainer.v1 import trainer_pb2

    async def work() -> None:
        async with connect_node(key, trainer, node) as connection:
            request = trainer_pb2.CancelTrainingRequest(name=training_name(training), request_id=new_request_id())
            found = (await connection.trainings.CancelTraining(request)).training
            found = await follow_to_end(connection, found, Record(curve=None, tensorboard=None))
        print_message(found, as_document=True) if json else print(f"{found.name} {_state(found)}")

    run(work())
