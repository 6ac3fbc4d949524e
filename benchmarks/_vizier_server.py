"""OSS Vizier as it ships, on a SQLite file, in its own environment: `python _vizier_server.py DATABASE`.

Prints one line of JSON: its address, and the bytes of a `CreateTrial` request for the study that it made.
"""

import json
import sys

from vizier._src.service import study_pb2, vizier_service_pb2
from vizier.service import pyvizier, servers


def main(database: str) -> None:
    """Serves until it is killed."""
    server = servers.DefaultVizierServer(host="127.0.0.1", database_url=f"sqlite:///{database}")
    config = pyvizier.StudyConfig(algorithm="RANDOM_SEARCH")
    config.search_space.root.add_float_param("rate", 0.0, 1.0)
    config.metric_information.append(
        pyvizier.MetricInformation(name="accuracy", goal=pyvizier.ObjectiveMetricGoal.MAXIMIZE)
    )
    study = server.stub.CreateStudy(
        vizier_service_pb2.CreateStudyRequest(
            parent="owners/benchmark",
            study=study_pb2.Study(display_name="benchmark", study_spec=config.to_proto()),
        )
    )
    trial = pyvizier.TrialConverter.to_proto(pyvizier.Trial(parameters={"rate": 0.5}))
    request = vizier_service_pb2.CreateTrialRequest(parent=study.name, trial=trial)
    print(json.dumps({"address": server.endpoint, "request": request.SerializeToString().hex()}), flush=True)
    server._server.wait_for_termination()


if __name__ == "__main__":
    main(sys.argv[1])
