"""Ship the report of an artifact to Weights & Biases: python to_wandb.py artifacts/NAME/v0003"""

import json
import sys
from pathlib import Path

import wandb


def ship(artifact: Path) -> None:
    lines = (artifact / "reports" / "records.jsonl").read_text(encoding="utf-8").splitlines()
    records = [json.loads(line) for line in lines]
    run = next(record for record in records if record["type"] == "run")
    config = {record["name"]: record["value"] for record in records if record["type"] == "param"}
    with wandb.init(project=run["name"], name=run["version"], config=config) as started:
        for record in records:
            if record["type"] == "metric":
                started.summary[record["name"]] = float(record["value"])
            elif record["type"] == "stage":
                started.summary[f"stage.{record['index']}.{record['kind']}.seconds"] = float(record["seconds"])
            elif record["type"] == "verdict":
                started.summary["verdict"] = record["verdict"]
        page = (artifact / "reports" / "report.html").read_text(encoding="utf-8")
        started.log({"report": wandb.Html(page, inject=False)})


if __name__ == "__main__":
    ship(Path(sys.argv[1]))
