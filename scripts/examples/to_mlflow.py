"""Ship the report of an artifact to MLflow: python to_mlflow.py artifacts/NAME/v0003"""

import json
import re
import sys
from pathlib import Path

import mlflow


def ship(artifact: Path) -> None:
    lines = (artifact / "reports" / "records.jsonl").read_text(encoding="utf-8").splitlines()
    records = [json.loads(line) for line in lines]
    run = next(record for record in records if record["type"] == "run")
    mlflow.set_experiment(run["name"])
    with mlflow.start_run(run_name=run["version"]):
        for record in records:
            name = re.sub(r"[^\w\-./ ]", "_", record.get("name", ""))
            if record["type"] == "param":
                mlflow.log_param(name, record["value"][:500])
            elif record["type"] == "metric":
                mlflow.log_metric(name, float(record["value"]))
            elif record["type"] == "stage":
                mlflow.log_metric(f"stage.{record['index']}.{record['kind']}.seconds", float(record["seconds"]))
            elif record["type"] == "verdict":
                mlflow.set_tags({"verdict": record["verdict"], "model_digest": run["digest"]})
        mlflow.log_artifact(str(artifact / "reports" / "report.html"))


if __name__ == "__main__":
    ship(Path(sys.argv[1]))
