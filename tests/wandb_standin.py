"""A stand-in for wandb's server: what runs are, what their history is, resuming, and rewinding where it is allowed.

It knows what the client asks for (seen on 0.31), no more. It shows what the client sends; how the real server takes it
is not tested here.
"""

from __future__ import annotations

import json
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

HISTORY = "wandb-history.jsonl"


@dataclass
class Server:
    """The runs that were sent, by id: each with the lines of its history."""

    rewinds: bool
    runs: dict[str, list[dict[str, Any]]] = field(default_factory=dict)
    asked: list[str] = field(default_factory=list)
    url: str = ""

    def curves(self, run_id: str) -> dict[str, list[tuple[int, float]]]:
        curves: dict[str, list[tuple[int, float]]] = {}
        for number, row in enumerate(self.runs[run_id]):
            assert row["_step"] == number
            for tag, value in row.items():
                if "/" in tag:
                    curves.setdefault(tag, []).append((row["step"], value))
        return curves

    def answer(self, query: str, variables: dict[str, Any]) -> dict[str, Any]:
        """The answer to one GraphQL request."""
        if "viewer" in query and "upsertBucket" not in query:
            return {"viewer": {"id": "1", "entity": "me", "username": "me", "flags": "{}", "teams": {"edges": []}}}
        if "rewindRun" in query:
            return self._rewound(variables)
        if "upsertBucket" in query:
            self.runs.setdefault(variables["name"], [])
            return {"upsertBucket": {"bucket": self._bucket(variables["name"]), "inserted": True}}
        if "bucket(name:" in query:
            known = variables["name"] in self.runs
            bucket = self._bucket(variables["name"]) if known else None
            return {"model": {"id": "1", "name": "p", "entity": {"id": "1", "name": "me"}, "bucket": bucket}}
        if "createRunFiles" in query:
            files = [{"name": name, "uploadUrl": f"{self.url}/file"} for name in variables["files"]]
            return {"createRunFiles": {"runID": "1", "uploadHeaders": [], "files": files}}
        return {}

    def _rewound(self, variables: dict[str, Any]) -> dict[str, Any]:
        if not self.rewinds:
            raise ValueError("rewinding is not for this server")
        del self.runs[variables["runName"]][int(variables["metricValue"]) + 1 :]
        return {"rewindRun": {"rewoundRun": self._bucket(variables["runName"])}}

    def _bucket(self, run_id: str) -> dict[str, Any]:
        history = self.runs[run_id]
        tail = [json.dumps(history[-1])] if history else []
        return {
            "id": run_id,
            "name": run_id,
            "displayName": run_id,
            "description": "",
            "sweepName": None,
            "project": {"id": "1", "name": "p", "entity": {"id": "1", "name": "me"}},
            "config": "{}",
            "wandbConfig": json.dumps({"t": 1}),
            "summaryMetrics": "{}",
            "historyTail": json.dumps(tail),
            "eventsTail": "[]",
            "historyLineCount": len(history),
            "eventsLineCount": 0,
            "logLineCount": 0,
            "tags": [],
            "notes": "",
        }

    def take(self, run_id: str, files: dict[str, Any]) -> None:
        """Lines of a file, from an offset on: what is there is written over, as the server does."""
        if sent := files.get(HISTORY):
            history, offset = self.runs[run_id], sent["offset"]
            assert offset <= len(history), "a hole"
            rows = [json.loads(line) for line in sent["content"]]
            history[offset : offset + len(rows)] = rows


@contextmanager
def serving(*, rewinds: bool) -> Iterator[Server]:
    """A server on this machine, for the time of the block."""
    server = Server(rewinds)

    class Handler(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            content = self.rfile.read(int(self.headers.get("Content-Length", 0)))
            try:
                if self.path == "/file":
                    return self._say({})
                request = json.loads(content or b"{}")
                if self.path.endswith("/file_stream"):
                    server.take(self.path.split("/")[-2], request.get("files") or {})
                    return self._say({"limits": {}})
                server.asked.append(request.get("query", "").strip().split("(")[0].split("{")[0].strip())
                return self._say({"data": server.answer(request.get("query", ""), request.get("variables") or {})})
            except ValueError as error:
                return self._say({"errors": [{"message": str(error)}], "data": None})

        do_GET = do_PUT = do_POST

        def _say(self, answer: dict[str, Any]) -> None:
            content = json.dumps(answer).encode()
            self.send_response(200)
            self.send_header("Content-Type", "application/json")
            self.send_header("Content-Length", str(len(content)))
            self.end_headers()
            self.wfile.write(content)

        def log_message(self, *_: Any) -> None:
            return None

    with ThreadingHTTPServer(("127.0.0.1", 0), Handler) as http:
        server.url = f"http://127.0.0.1:{http.server_address[1]}"
        thread = threading.Thread(target=http.serve_forever, daemon=True)
        thread.start()
        yield server
        http.shutdown()
