"""A W&B server in miniature: answers what the client asks to begin, log and end a run, keeps what
it was sent, can be shut.
"""

import gzip
import json
import threading
from collections.abc import Callable
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

OWNER = {"id": "e", "name": "me"}
ANSWER = {
    "viewer": {"id": "u", "entity": "me", "username": "me", "flags": "{}", "teams": {"edges": []}},
    "serverInfo": {"cliVersionInfo": {}, "latestLocalVersionInfo": None, "features": []},
    "model": {"bucket": None, "id": "p", "name": "cu_runner"},
    "project": {"artifact": None},
    "upsertBucket": {
        "bucket": {
            "id": "x",
            "name": "n",
            "displayName": "n",
            "config": "{}",
            "historyLineCount": 0,
            "project": {"id": "p", "name": "cu_runner", "entity": OWNER},
        },
        "inserted": True,
    },
    "createRunFiles": {"runID": "x", "uploadHeaders": [], "files": []},
    "createArtifact": {
        "artifact": {
            "id": "a",
            "state": "COMMITTED",
            "artifactSequence": {"id": "s", "latestArtifact": None},
        },
    },
}


def known_run(rows: int) -> dict:
    """What the server answers of a run of which it has some rows of history; nothing of none."""
    if not rows:
        return {}
    tail = json.dumps([json.dumps({"_step": rows - 1, "_runtime": 1})])
    counts = {"historyLineCount": rows, "eventsLineCount": 0, "logLineCount": 0}
    texts = {"historyTail": tail, "eventsTail": "[]", "summaryMetrics": "{}", "config": "{}"}
    run = {"id": "x", "name": "n", "tags": [], "wandbConfig": '{"t": 1}'}
    return {"model": {"id": "p", "name": "cu_runner", "bucket": run | counts | texts}}


class WandbServer:
    """Listens on a port of its own until it is shut. after: called with the path of every request
    once it is answered. rows: of history that it has of the run already, the last one `rows` - 1.
    """

    def __init__(
        self,
        after: Callable[["WandbServer", str], None] = lambda server, path: None,
        rows: int = 0,
    ) -> None:
        self.requests: list[tuple[str, dict]] = []
        outer = self

        class Handler(BaseHTTPRequestHandler):
            def do_POST(self):
                body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
                if self.headers.get("Content-Encoding") == "gzip":
                    body = gzip.decompress(body)
                if not self.path.startswith("/sdk/otel"):  # its telemetry
                    outer.requests.append((self.path, json.loads(body)))
                answer = json.dumps({"data": ANSWER | known_run(rows)}).encode()
                self.send_response(200)
                self.send_header("Content-Type", "application/json")
                self.send_header("Content-Length", str(len(answer)))
                self.end_headers()
                self.wfile.write(answer)
                after(outer, self.path)

            def log_message(self, *_):
                pass

        self._server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.environment = {
            "WANDB_BASE_URL": f"http://127.0.0.1:{self._server.server_port}",
            "WANDB_API_KEY": "a" * 40,
            "WANDB_MODE": "online",
        }
        threading.Thread(target=self._server.serve_forever, daemon=True).start()

    def shut(self) -> None:
        """From here on connections are refused."""
        self._server.shutdown()
        self._server.server_close()

    def history(self) -> list[dict]:
        """The rows that were logged."""
        files = [
            body["files"]
            for path, body in self.requests
            if path.endswith("/file_stream") and "files" in body
        ]
        lines = [
            line
            for part in files
            for line in part.get("wandb-history.jsonl", {}).get("content", [])
        ]
        return [json.loads(line) for line in lines]

    def offsets(self) -> list[int]:
        """The number of the first row of history in each part that was sent."""
        bodies = [body for path, body in self.requests if path.endswith("/file_stream")]
        name = "wandb-history.jsonl"
        return [body["files"][name]["offset"] for body in bodies if name in body.get("files", {})]

    def exit_codes(self) -> list[int]:
        """The exit codes of runs that said that they ended."""
        bodies = [body for path, body in self.requests if path.endswith("/file_stream")]
        return [body["exitcode"] for body in bodies if body.get("complete")]

    def opened(self) -> dict:
        """The variables with which the run was begun: names, group, configuration."""
        return next(
            body["variables"]
            for _, body in self.requests
            if "mutation UpsertBucket" in body.get("query", "")
        )
