"""The file that W&B writes of an offline run, read back."""

import json
import struct
import time
from pathlib import Path

BLOCK, HEADER = 32768, 7  # of the LevelDB log format in which W&B writes
FULL, FIRST, MIDDLE, LAST = 1, 2, 3, 4


def read_records(path: Path) -> list:
    """Every whole record of a .wandb file, through W&B's own message type."""
    from wandb.proto.wandb_internal_pb2 import Record

    content, position, records, part = path.read_bytes(), HEADER, [], b""
    assert content[:4] in (b":W&B", b"")
    while position + HEADER <= len(content):
        if BLOCK - position % BLOCK < HEADER:  # the rest of a block that holds no header is padding
            position += BLOCK - position % BLOCK
            continue
        _, length, kind = struct.unpack("<IHB", content[position : position + HEADER])
        assert kind in (FULL, FIRST, MIDDLE, LAST)
        end = position + HEADER + length
        if end > len(content):  # is being written
            break
        part += content[position + HEADER : end]
        position = end
        if kind in (FULL, LAST):
            record = Record()
            record.ParseFromString(part)
            records.append(record)
            part = b""
    return records


def read_run_of_wandb(directory: Path) -> dict:
    """What an offline run directory holds: id, names, configuration, history rows by step, media
    files.
    """
    (path,) = directory.glob("*.wandb")
    deadline = (
        time.monotonic() + 20
    )  # W&B's service, which lives as long as this process, closes the file a moment later
    while not [
        record for record in read_records(path) if record.WhichOneof("record_type") == "exit"
    ]:
        assert time.monotonic() < deadline
        time.sleep(0.1)
    records, history, config = read_records(path), {}, {}
    (run,) = [record.run for record in records if record.WhichOneof("record_type") == "run"]
    for update in [
        run.config,
        *[record.config for record in records if record.WhichOneof("record_type") == "config"],
    ]:
        for item in update.update:
            config[item.key or ".".join(item.nested_key)] = json.loads(item.value_json)
    for record in records:
        if record.WhichOneof("record_type") == "history":
            row = {
                item.key or ".".join(item.nested_key): json.loads(item.value_json)
                for item in record.history.item
            }
            history[
                record.history.step.num if record.history.HasField("step") else row["_step"]
            ] = row
    return {
        "id": run.run_id,
        "name": run.display_name,
        "group": run.run_group,
        "job_type": run.job_type,
        "project": run.project,
        "config": config,
        "history": history,
    }


def read_facts_of_wandb(directory: Path) -> dict:
    """What an offline run directory says of the whole run: its tags, the last value of every entry
    of its summary, the x axis of every metric, the exit status.
    """
    read_run_of_wandb(directory)  # waits for its end
    (path,) = directory.glob("*.wandb")
    facts: dict = {"tags": [], "summary": {}, "axes": {}, "status": None}
    for record in read_records(path):
        kind = record.WhichOneof("record_type")
        if kind == "run":
            facts["tags"] = list(record.run.tags)
        elif kind == "summary":
            for item in record.summary.update:
                name = item.key or ".".join(item.nested_key)
                facts["summary"][name] = json.loads(item.value_json)
        elif kind == "metric":
            name = record.metric.name or record.metric.glob_name
            facts["axes"][name] = record.metric.step_metric
        elif kind == "exit":
            facts["status"] = record.exit.exit_code
    return facts
