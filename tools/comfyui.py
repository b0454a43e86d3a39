"""Runs a real ComfyUI as a child process and calls its API, for the demo, `make comfyui` and the server tests."""

from __future__ import annotations

import fnmatch
import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time
import urllib.error
import urllib.request
import uuid
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

REPO = Path(__file__).resolve().parents[1]
PACK_NAME = "qwen-edit-trainer"
FOLDERS = ("custom_nodes", "input", "output", "temp", "user", "models/loras")


class ComfyUIError(RuntimeError):
    """The server did not start, died or refused a request, or a prompt failed. The message is shown to the user."""


def comfyui_dir() -> Path:
    """ComfyUI's folder: COMFYUI_DIR, or the one that `make setup` unpacked.

    Raises:
        ComfyUIError: the folder has no main.py.
    """
    folder = Path(os.environ.get("COMFYUI_DIR") or REPO / ".comfyui" / "ComfyUI").expanduser().absolute()
    if not (folder / "main.py").is_file():
        raise ComfyUIError(f"No main.py in {folder}. Run `make setup`, or set COMFYUI_DIR to a ComfyUI folder.")
    return folder


def not_shipped() -> list[str]:
    """The patterns of .comfyignore: files that the published pack does not contain."""
    lines = (REPO / ".comfyignore").read_text(encoding="utf-8").splitlines()
    return [line.strip().strip("/") for line in lines if line.strip() and not line.startswith("#")]


def install_pack(base: Path, name: str = PACK_NAME) -> Path:
    """Copy the files that are published to `base/custom_nodes/name`. Returns that folder."""
    patterns, target = not_shipped(), base / "custom_nodes" / name

    def left_out(folder: str, names: list[str]) -> set[str]:
        inside = Path(folder).relative_to(REPO)
        paths = {entry: (inside / entry).as_posix() for entry in names}
        hidden = {entry for entry in names if entry == "__pycache__" or (entry.startswith(".") and inside == Path())}
        return hidden | {e for e, path in paths.items() if any(fnmatch.fnmatch(path, p) for p in patterns)}

    shutil.rmtree(target, ignore_errors=True)
    shutil.copytree(REPO, target, ignore=left_out)
    return target


def make_base(base: Path) -> Path:
    """Create the folders that ComfyUI expects in a --base-directory. Returns `base`."""
    for folder in FOLDERS:
        (base / folder).mkdir(parents=True, exist_ok=True)
    return base


def hold_port() -> tuple[int, socket.socket]:
    """A free port, and a socket that keeps it. A server that is told the port can listen on it all the same.

    Only Linux lets it. On other systems the socket is closed, and another program may take the port first.
    """
    held = socket.socket()
    if sys.platform == "linux":
        held.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    held.bind(("127.0.0.1", 0))
    port = int(held.getsockname()[1])
    if sys.platform != "linux":
        held.close()
    return port, held


def device_arguments() -> list[str]:
    """`--cpu` if torch finds no accelerator, because ComfyUI would not start without it."""
    import torch

    return [] if torch.cuda.is_available() or torch.backends.mps.is_available() else ["--cpu"]


class ComfyUI:
    """A ComfyUI server and its API. Call `start` and `stop`, or use it as a context manager."""

    def __init__(self, base: Path, *arguments: str, log: Path, environment: dict[str, str] | None = None) -> None:
        self.base, self.log, self.arguments = make_base(base), log, arguments
        self.environment = {**os.environ, "PYTHONUNBUFFERED": "1", **(environment or {})}
        self.client_id = uuid.uuid4().hex
        self.port = 0
        self.events: list[dict[str, Any]] = []
        self._process: subprocess.Popen[bytes] | None = None
        self._held: socket.socket | None = None
        self._socket: Any = None
        self._news = threading.Condition()
        self.on_event: Callable[[dict[str, Any]], None] | None = None

    # The process

    def __enter__(self) -> ComfyUI:
        return self.start()

    def __exit__(self, *_: object) -> None:
        self.stop()

    @property
    def url(self) -> str:
        """The server's address."""
        return f"http://127.0.0.1:{self.port}"

    @property
    def pid(self) -> int:
        """Process id of the server."""
        assert self._process is not None
        return self._process.pid

    def start(self, seconds: float = 600) -> ComfyUI:
        """Start the server, wait until it responds, and receive its messages.

        Raises:
            ComfyUIError: it ended or did not respond in time. The message has the end of the log.
        """
        tree, (self.port, self._held) = comfyui_dir(), hold_port()
        command = [sys.executable, str(tree / "main.py"), "--port", str(self.port), "--base-directory", str(self.base)]
        command += [
            "--database-url",
            f"sqlite:///{self.base}/user/comfyui.db",
            "--disable-auto-launch",
            *self.arguments,
        ]
        with self.log.open("ab") as log:
            self._process = subprocess.Popen(
                command, cwd=self.base, stdout=log, stderr=subprocess.STDOUT, env=self.environment
            )
        deadline = time.monotonic() + seconds
        while not self._answers():
            if self._process.poll() is not None or time.monotonic() > deadline:
                self.stop()
                raise ComfyUIError(f"ComfyUI did not start. The end of {self.log}:\n{self.log_end()}")
            time.sleep(0.2)
        self._listen()
        return self

    def stop(self) -> None:
        """Stop the server's process; kill it after 15 seconds."""
        if self._socket is not None:
            self._socket.close()
            self._socket = None
        if self._process is not None and self._process.poll() is None:
            self._process.send_signal(signal.SIGINT if os.name != "nt" else signal.SIGTERM)
            try:
                self._process.wait(15)
            except subprocess.TimeoutExpired:
                self.kill()
        self._process = None
        if self._held is not None:
            self._held.close()

    def kill(self) -> None:
        """Kill the process, which simulates a crash."""
        if self._process is not None:
            self._process.kill()
            self._process.wait()

    def restart(self) -> ComfyUI:
        """Stop the server and start it again with the same folders."""
        self.stop()
        return self.start()

    def log_end(self, lines: int = 60) -> str:
        """The last lines of the server's output."""
        if not self.log.is_file():
            return "(no log)"
        return "\n".join(self.log.read_text(encoding="utf-8", errors="replace").splitlines()[-lines:])

    def _answers(self) -> bool:
        try:
            self.get("/system_stats")
        except (ComfyUIError, OSError):
            return False
        return True

    # Messages

    def _listen(self) -> None:
        import websocket

        address = f"ws://127.0.0.1:{self.port}/ws?clientId={self.client_id}"
        self._socket = websocket.create_connection(address, timeout=300)
        self._socket.settimeout(None)
        threading.Thread(target=self._receive, args=(self._socket,), daemon=True).start()

    def _receive(self, connection: Any) -> None:
        import websocket

        while True:
            try:
                message = connection.recv()
            except (OSError, websocket.WebSocketException):
                return
            if message and isinstance(message, str):  # ComfyUI's pictures are bytes
                self._note(json.loads(message))

    def _note(self, event: dict[str, Any]) -> None:
        with self._news:
            self.events.append(event)
            self._news.notify_all()
        if self.on_event is not None:
            self.on_event(event)

    def events_of(self, prompt_id: str, *types: str) -> list[dict[str, Any]]:
        """Messages about a prompt, oldest first: those of the given types, or all if none is given."""
        about = [event for event in list(self.events) if event.get("data", {}).get("prompt_id") == prompt_id]
        return [event for event in about if not types or event["type"] in types]

    def wait_for_event(self, matches: Callable[[dict[str, Any]], bool], timeout: float = 300) -> dict[str, Any]:
        """Wait for a message for which `matches` is true. Earlier messages count too.

        Raises:
            ComfyUIError: none came in time, or the server has ended.
        """
        seen, deadline = 0, time.monotonic() + timeout
        with self._news:
            while True:
                for event in self.events[seen:]:
                    if matches(event):
                        return event
                seen = len(self.events)
                self._raise_if_dead()
                if time.monotonic() > deadline:
                    raise ComfyUIError(f"The expected message did not come within {timeout} s.\n{self.log_end()}")
                self._news.wait(0.5)

    # Requests

    def request(self, method: str, path: str, body: bytes | None = None, content: str = "application/json") -> Any:
        """Send an HTTP request. Returns the parsed response if it is JSON, or else bytes.

        Raises:
            ComfyUIError: no response, or an error status, which is in the attributes `status` and `answer`.
        """
        request = urllib.request.Request(
            self.url + path, data=body, method=method, headers={"Content-Type": content} if body is not None else {}
        )
        try:
            with urllib.request.urlopen(request, timeout=300) as response:
                return _parsed(response.read(), response.headers.get_content_type())
        except urllib.error.HTTPError as refused:
            answer = _parsed(refused.read(), refused.headers.get_content_type())
            error = ComfyUIError(f"{method} {path} was refused with {refused.code}: {_readable(answer)}")
            error.status, error.answer = refused.code, answer  # type: ignore[attr-defined]
            raise error from None
        except urllib.error.URLError as gone:
            raise ComfyUIError(
                f"ComfyUI does not respond ({gone.reason}). The end of its log:\n{self.log_end()}"
            ) from None

    def get(self, path: str) -> Any:
        """`request` with GET."""
        return self.request("GET", path)

    def post(self, path: str, values: Any = None) -> Any:
        """`request` with POST and a JSON body."""
        return self.request("POST", path, json.dumps({} if values is None else values).encode())

    def queue(self, prompt: dict[str, Any], targets: Sequence[str] | None = None) -> str:
        """Queue an API prompt. Returns its id.

        Raises:
            ComfyUIError: the prompt is invalid. The message has the reasons by node, `answer` the whole response.
        """
        body: dict[str, Any] = {"prompt": prompt, "client_id": self.client_id, "prompt_id": str(uuid.uuid4())}
        if targets is not None:
            body["partial_execution_targets"] = list(targets)
        return str(self.post("/prompt", body)["prompt_id"])

    def wait(self, prompt_id: str, timeout: float = 1200) -> dict[str, Any]:
        """Wait until the prompt ends, in success or not. Returns its history entry, see `status_of`.

        Raises:
            ComfyUIError: it did not end in time, or the server has ended.
        """
        deadline = time.monotonic() + timeout
        while True:
            entry = self.get(f"/history/{prompt_id}").get(prompt_id)
            if entry is not None and entry.get("status"):
                return entry
            self._raise_if_dead()
            if time.monotonic() > deadline:
                raise ComfyUIError(f"Prompt {prompt_id} did not end within {timeout} s.\n{self.log_end()}")
            time.sleep(0.1)

    def run(self, prompt: dict[str, Any], timeout: float = 1200) -> dict[str, Any]:
        """Queue a prompt and wait. Returns the outputs by node id.

        Raises:
            ComfyUIError: the prompt is invalid, failed, was interrupted, or did not end in time.
        """
        entry = self.wait(self.queue(prompt), timeout)
        if status_of(entry) != "execution_success":
            raise ComfyUIError(f"{failure(entry)}\n{self.log_end(20)}")
        return entry["outputs"]

    def interrupt(self) -> None:
        """Interrupt the running prompt, as the page's stop button does."""
        self.post("/interrupt")

    def _raise_if_dead(self) -> None:
        if self._process is None or self._process.poll() is not None:
            raise ComfyUIError(f"ComfyUI has ended. The end of {self.log}:\n{self.log_end()}")


def all_nodes() -> dict[str, dict[str, Any]]:
    """The answer of /object_info of a new ComfyUI with this pack: descriptions of nodes, by the node's id.

    Raises:
        ComfyUIError: it did not start.
    """
    with tempfile.TemporaryDirectory() as folder:
        base = Path(folder)
        install_pack(base)
        with ComfyUI(base, *device_arguments(), "--disable-api-nodes", log=base / "comfyui.log") as server:
            return server.get("/object_info")


def status_of(entry: dict[str, Any]) -> str:
    """How a prompt ended: execution_success, execution_error or execution_interrupted."""
    messages = [name for name, _ in entry["status"]["messages"]]
    endings = [name for name in messages if name in ("execution_success", "execution_error", "execution_interrupted")]
    return endings[-1] if endings else str(entry["status"]["status_str"])


def failure(entry: dict[str, Any]) -> str:
    """A readable reason why the prompt failed; empty if it succeeded."""
    for name, data in entry["status"]["messages"]:
        if name == "execution_error":
            node = f"node {data.get('node_id')} ({data.get('node_type')})"
            return f"{node} failed: {str(data.get('exception_message', '')).strip()}"
        if name == "execution_interrupted":
            return f"interrupted at node {data.get('node_id')}"
    return "" if entry["status"]["status_str"] == "success" else str(entry["status"])


def _parsed(body: bytes, content: str) -> Any:
    return json.loads(body) if content == "application/json" and body else body


def _readable(answer: Any) -> str:
    if not isinstance(answer, dict) or "error" not in answer:
        return repr(answer)[:500]
    error = answer["error"]
    lines = [error.get("message", str(error)) if isinstance(error, dict) else str(error)]
    for node_id, problem in (answer.get("node_errors") or {}).items():
        for one in problem.get("errors", []):
            lines.append(f"node {node_id} ({problem.get('class_type')}): {one.get('message')}: {one.get('details')}")
    return "\n  ".join(lines)
