"""A W&B server on this machine: the few calls that W&B's real client makes to upload runs and to save a report."""

from __future__ import annotations

import gzip
import json
import threading
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

ENTITY = "me"


@dataclass
class UploadedRun:
    """What the server was told of one run."""

    group: str | None = None
    name: str | None = None
    job_type: str | None = None
    tags: list[str] = field(default_factory=list)
    config: dict[str, Any] = field(default_factory=dict)
    history: list[dict[str, Any]] = field(default_factory=list)
    summary: dict[str, Any] = field(default_factory=dict)
    files: dict[str, bytes] = field(default_factory=dict)
    exit_code: int | None = None


class WandbServer:
    """Serves on a free port of the loopback address until the `with` block ends."""

    def __init__(self) -> None:
        self.runs: dict[str, UploadedRun] = {}
        self.views: list[dict[str, Any]] = []
        self.is_down = False
        """Connections are closed without an answer, as behind a dead network."""
        self.down_after: str | None = None
        """The name of the operation after whose answer the server goes down."""
        self.operations: list[str] = []
        self.http = _Quiet(("127.0.0.1", 0), lambda *args: _Handler(self, *args))
        self.address = f"http://127.0.0.1:{self.http.server_port}"
        self.environment = {"WANDB_BASE_URL": self.address, "WANDB_API_KEY": "a" * 40}

    def __enter__(self) -> WandbServer:
        threading.Thread(target=self.http.serve_forever, daemon=True).start()
        return self

    def __exit__(self, *_: object) -> None:
        self.http.shutdown()
        self.http.server_close()

    def answer(self, operation: str, given: dict[str, Any]) -> dict[str, Any]:
        """The data of a GraphQL answer."""
        project = {"id": "p", "name": given.get("project"), "entity": {"id": "e", "name": ENTITY}}
        user = {"id": "u", "entity": ENTITY, "username": ENTITY, "flags": "{}", "teams": {"edges": []}}
        if operation == "UpsertBucket":
            self._upsert(given)
            bucket = {"id": "b", "name": given["name"], "displayName": given["displayName"], "project": project}
            return {"upsertBucket": {"bucket": bucket | {"config": "{}", "historyLineCount": 0}, "inserted": True}}
        if operation == "CreateRunFiles":
            links = [{"name": f, "uploadUrl": f"{self.address}/put/{given['run']}/{f}"} for f in given["files"]]
            return {"createRunFiles": {"runID": "b", "uploadHeaders": [], "files": links}}
        if operation == "CreateArtifact":  # committed: its files are here already
            artifact = {"id": "a", "state": "COMMITTED", "artifactSequence": {"id": "s", "latestArtifact": None}}
            return {"createArtifact": {"artifact": artifact}}
        if operation == "upsertView":
            self.views.append(given)
            view = {"id": "VmlldzoxMjM=", "type": "runs", "project": {"id": "p", "name": given["projectName"]}}
            view["project"]["entityName"] = given["entityName"]
            keys = ("name", "displayName", "description", "spec")
            return {"upsertView": {"view": view | {key: given[key] for key in keys}, "inserted": True}}
        return {
            "model": None,
            "viewer": user,
            "serverInfo": {"features": []},
            "project": {"internalId": "UHJvamVjdEludGVybmFsSWQ6MQ==", "artifact": None},
            "models": {"edges": [], "pageInfo": {"endCursor": None, "hasNextPage": False}},
            "upsertModel": {"model": {"id": "p"}, "project": {"id": "p"}, "inserted": True},
        }

    def stream(self, run: UploadedRun, told: dict[str, Any]) -> None:
        """Lines of a run's files; offsets are ignored, since no run here is sent twice."""
        for name, chunk in told.get("files", {}).items():
            lines = [json.loads(line) for line in chunk["content"] if line]
            if name == "wandb-history.jsonl":
                run.history += lines
            elif name == "wandb-summary.json":
                run.summary = lines[-1]
        if told.get("complete"):
            run.exit_code = told.get("exitcode")

    def _upsert(self, given: dict[str, Any]) -> None:
        run = self.runs.setdefault(given["name"], UploadedRun())
        run.group, run.name = given["groupName"] or run.group, given["displayName"] or run.name
        run.job_type, run.tags = given["jobType"] or run.job_type, given["tags"] or run.tags
        run.config |= {key: item["value"] for key, item in json.loads(given["config"] or "{}").items()}


class _Quiet(ThreadingHTTPServer):
    def handle_error(self, *_: object) -> None:
        """A client that was killed, or gave up."""


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"

    def __init__(self, server: WandbServer, *args: Any) -> None:
        self.wandb = server
        super().__init__(*args)

    def do_POST(self) -> None:
        body = self._body()
        if self.path == "/graphql":
            told = json.loads(body)
            operation = told.get("operationName") or told["query"].split("(")[0].split("{")[0].split()[-1]
            self.wandb.operations.append(operation)
            self._send({"data": self.wandb.answer(operation, told.get("variables") or {})})
            self.wandb.is_down |= operation == self.wandb.down_after
            return
        if self.path.endswith("/file_stream") and not self.wandb.is_down:
            self.wandb.stream(self.wandb.runs[self.path.split("/")[-2]], json.loads(body))
        self._send({})

    def do_PUT(self) -> None:
        _, _, run, name = self.path.split("/", 3)
        body = self._body()
        if not self.wandb.is_down:
            self.wandb.runs[run].files[name] = body
        self._send({})

    def log_message(self, *_: object) -> None:
        pass

    def _body(self) -> bytes:
        if self.headers.get("Transfer-Encoding") == "chunked":
            body = b""
            while size := int(self.rfile.readline(), 16):
                body += self.rfile.read(size)
                self.rfile.readline()
            self.rfile.readline()
        else:
            body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
        return gzip.decompress(body) if self.headers.get("Content-Encoding") == "gzip" else body

    def _send(self, answer: dict[str, Any]) -> None:
        if self.wandb.is_down:
            self.close_connection = True
            return
        body = json.dumps(answer).encode()
        self.send_response(200)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)
