"""A real ComfyUI in a process of its own, driven over HTTP and websocket as its frontend does."""

import asyncio
import io
import json
import os
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
import uuid
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
from PIL import Image

ROOT = Path(__file__).resolve().parents[2]

TEXT_EVENT = 3
"""ComfyUI's number of a message with a text for a node."""

PRESTARTUP = """
import sys

sys.modules["timm"] = None  # as if it were not installed, until TestTimm installs it
"""

NODES = '''
import os
import sys
import torch
from aiohttp import web
from server import PromptServer
from torch.multiprocessing.reductions import StorageWeakRef

class TestTensor:
    """Gives what a test wrote: tensors that no picture file can hold."""
    CATEGORY = FUNCTION = "give"
    def give(self, name):
        return (torch.load(os.path.join(os.path.dirname(__file__), name), weights_only=True),)

class TestImage(TestTensor):
    RETURN_TYPES = ("IMAGE",)
    @classmethod
    def INPUT_TYPES(cls):
        return {"required": {"name": ("STRING", {})}}

class TestMask(TestImage):
    RETURN_TYPES = ("MASK",)

class TestMemory:
    """From here on modules find only so much memory, as on a small device.

    megabytes: For outputs that gradients need, together.
    pixels: For each output that they do not need, as where a picture is rendered.
    """
    CATEGORY = FUNCTION = "limit"
    RETURN_TYPES = ("IMAGE",)
    kept, megabytes, pixels = [], float("inf"), float("inf")
    @classmethod
    def INPUT_TYPES(cls):
        limits = {"megabytes": ("FLOAT", {"max": 1e9}), "pixels": ("INT", {"max": 2**30})}
        return {"required": {"image": ("IMAGE", {}), **limits}}
    def limit(self, image, megabytes, pixels):
        TestMemory.megabytes, TestMemory.pixels = megabytes, pixels
        return (image,)
    @staticmethod
    def keep(module, given, output):
        if isinstance(output, torch.Tensor) and output.ndim == 4 and not output.requires_grad:
            if output.shape[-1] * output.shape[-2] > TestMemory.pixels:
                raise torch.OutOfMemoryError("a test's small device is full")
        if TestMemory.megabytes < 1e9 and isinstance(output, torch.Tensor) and output.requires_grad:
            storage = output.untyped_storage()
            alive = {ref.cdata: (ref, size) for ref, size in TestMemory.kept if not ref.expired()}
            alive.setdefault(storage._cdata, (StorageWeakRef(storage), storage.nbytes()))
            TestMemory.kept = list(alive.values())
            if sum(size for _, size in TestMemory.kept) > TestMemory.megabytes * 2**20:
                raise torch.OutOfMemoryError("a test's small device is full")

class TestTimm:
    """From here on the package timm is installed, or is not."""
    CATEGORY = FUNCTION = "install"
    RETURN_TYPES, OUTPUT_NODE = (), True
    package = None
    @classmethod
    def INPUT_TYPES(cls):
        return {"required": {"installed": ("BOOLEAN", {})}}
    def install(self, installed):
        TestTimm.package = sys.modules.pop("timm", None) or TestTimm.package
        if not installed:
            sys.modules["timm"] = None
        elif TestTimm.package:
            sys.modules["timm"] = TestTimm.package
        return {}

torch.nn.modules.module.register_module_forward_hook(TestMemory.keep)

@PromptServer.instance.routes.post("/test/megabytes")
async def limit_at_once(request):
    """As TestMemory, while a graph runs."""
    TestMemory.megabytes = await request.json()
    return web.Response()

NODE_CLASS_MAPPINGS = {node.__name__: node for node in (TestImage, TestMask, TestMemory, TestTimm)}
'''


def find() -> Path | None:
    """ComfyUI's folder, where `$COMFYUI_DIR` names one."""
    chosen = os.environ.get("COMFYUI_DIR")
    return Path(chosen).expanduser() if chosen else None


@dataclass
class Outcome:
    """What one prompt led to.

    Attributes:
        status: "success", "error" or "interrupted".
        message: The error's sentence.
        ran: Ids of the nodes that were executed, not served from the cache.
        progress: Values that arrived.
        previews: Live previews that arrived, as pictures.
        texts: What was shown on nodes while they ran.
        outputs: By node id, as the history holds them.
        seconds: Until the end.
    """

    status: str = "success"
    message: str = ""
    ran: list[str] = field(default_factory=list)
    progress: list[int] = field(default_factory=list)
    previews: list[Image.Image] = field(default_factory=list)
    texts: list[str] = field(default_factory=list)
    outputs: dict = field(default_factory=dict)
    seconds: float = 0.0


class Comfy:
    """One server, on the CPU unless `$COMFYUI_OPTIONS` says otherwise; it starts as if timm were not installed.

    On a GPU, `COMFYUI_OPTIONS=--normalvram`, all tests hold but the two that ask for equal bits: sums there come in any
    order.

    Args:
        source: ComfyUI's folder.
        base: An empty folder for its models, pictures and custom nodes; `source` itself stays untouched.
        hub: Address of the model hub that it is to use.
    """

    def __init__(self, source: Path, base: Path, hub: str) -> None:
        self.source, self.base, self.log_path, self.client = source, base, base / "log.txt", ""
        for folder in ("custom_nodes/test_nodes", "input", "output", "models/dino"):
            (base / folder).mkdir(parents=True)
        for copy in ("ComfyUI-Splice", "comfyui-splice-again"):  # as where a clone and the Manager's stand side by side
            (base / "custom_nodes" / copy).symlink_to(ROOT)
        for name, code in (("__init__.py", NODES), ("prestartup_script.py", PRESTARTUP)):
            (base / "custom_nodes" / "test_nodes" / name).write_text(code)
        (base / "custom_nodes" / "test_diffusion.py").symlink_to(ROOT / "tests" / "nodes" / "diffusion.py")
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            self.address = f"127.0.0.1:{probe.getsockname()[1]}"
        port = self.address.rpartition(":")[2]
        options = ["--disable-auto-launch", "--disable-api-nodes", "--listen", "127.0.0.1"]
        options += os.environ.get("COMFYUI_OPTIONS", "--cpu").split()
        with self.log_path.open("wb") as log:
            self.process = subprocess.Popen(
                [sys.executable, "main.py", *options, "--port", port, "--base-directory", str(base)],
                cwd=source,
                env={**os.environ, "OMP_NUM_THREADS": "1", "HF_ENDPOINT": hub, "HF_HOME": str(base / "hub")},
                stdout=log,
                stderr=subprocess.STDOUT,
            )
        deadline = time.monotonic() + 120
        while True:
            try:
                self.get("/queue")
                return
            except (urllib.error.URLError, OSError):
                if self.process.poll() is not None or time.monotonic() > deadline:
                    self.stop()
                    last = [line for line in self.log().splitlines() if line.strip()][-1:]
                    raise RuntimeError(f"{source}/main.py does not start: {''.join(last)}") from None
                time.sleep(0.2)

    def stop(self) -> None:
        self.process.terminate()
        self.process.wait()

    def log(self) -> str:
        return self.log_path.read_text(errors="replace")

    def get(self, path: str):
        with urllib.request.urlopen(f"http://{self.address}{path}", timeout=30) as answer:
            return json.load(answer)

    def post(self, path: str, body: object = None) -> bytes:
        data = json.dumps(body if body is not None else {}).encode()
        request = urllib.request.Request(
            f"http://{self.address}{path}", data, {"Content-Type": "application/json"}, method="POST"
        )
        with urllib.request.urlopen(request, timeout=30) as answer:
            return answer.read()

    def finish(self, node: str, client: str | None = None) -> bool:
        """Presses "Finish now" on a node; returns whether that node was running.

        Args:
            node: Its id.
            client: The window of the browser that the button is in; None is that of the last run.
        """
        body = {"nodes": [node], "client": client or self.client}
        return json.loads(self.post("/splice/finish", body))["running"]

    def run(
        self,
        graph: dict,
        on_progress: Callable[[int], None] | None = None,
        on_text: Callable[[str], None] | None = None,
    ) -> Outcome:
        """Runs an API graph to its end.

        Args:
            graph: Nodes by id.
            on_progress: Called with each progress value that arrives.
            on_text: Called with each text that is shown on a node.
        """
        return asyncio.run(self._run(graph, on_progress, on_text))

    def install_timm(self, installed: bool = True) -> None:
        """Makes the package timm importable, which it is not when the server starts, or takes it away again."""
        outcome = self.run({"it": {"class_type": "TestTimm", "inputs": {"installed": installed}}})
        if outcome.status != "success":
            raise RuntimeError(outcome.message)

    def free_memory(self) -> None:
        """Ends the limits that TestMemory has set."""
        limits = {"image": ["any", 0], "megabytes": 1e9, "pixels": 2**30}
        any_picture = {"width": 16, "height": 16, "batch_size": 1, "color": 0}
        graph = {
            "any": {"class_type": "EmptyImage", "inputs": any_picture},
            "device": {"class_type": "TestMemory", "inputs": limits},
            "it": {"class_type": "PreviewImage", "inputs": {"images": ["device", 0]}},
        }
        self.run(graph)

    def pictures(self, outcome: Outcome, node: str) -> list[np.ndarray]:
        """What a SaveImage or SaveVideo node wrote, each picture or frame `[H, W, 3]` of 8 bits."""
        import av

        pictures = []
        for path in (self.base / "output" / one["filename"] for one in outcome.outputs[node]["images"]):
            if path.suffix == ".mp4":
                with av.open(str(path)) as container:
                    pictures += [frame.to_ndarray(format="rgb24") for frame in container.decode(video=0)]
            else:
                pictures.append(np.asarray(Image.open(path)))
        return pictures

    async def _run(
        self, graph: dict, on_progress: Callable[[int], None] | None, on_text: Callable[[str], None] | None
    ) -> Outcome:
        import aiohttp

        outcome, self.client = Outcome(), uuid.uuid4().hex
        async with (
            aiohttp.ClientSession() as session,
            session.ws_connect(f"http://{self.address}/ws?clientId={self.client}", max_msg_size=0) as events,
        ):
            await events.send_json({"type": "feature_flags", "data": {"supports_preview_metadata": True}})
            started = time.monotonic()
            async with session.post(
                f"http://{self.address}/prompt", json={"prompt": graph, "client_id": self.client}
            ) as answer:
                body = await answer.json()
            if answer.status != 200:
                details = [error["details"] for node in body["node_errors"].values() for error in node["errors"]]
                return Outcome("error", "; ".join([body["error"]["message"], *details]))
            async for event in events:
                if event.type == aiohttp.WSMsgType.BINARY:
                    start = event.data.find(b"\xff\xd8\xff")
                    if start >= 0:
                        outcome.previews.append(Image.open(io.BytesIO(event.data[start:])))
                    elif int.from_bytes(event.data[:4], "big") == TEXT_EVENT:
                        first = 8 + int.from_bytes(event.data[4:8], "big")  # after the node's id
                        outcome.texts.append(event.data[first:].decode())
                        if on_text:
                            await asyncio.to_thread(on_text, outcome.texts[-1])
                    continue
                kind, data = (message := json.loads(event.data))["type"], message["data"]
                if data.get("prompt_id") != body["prompt_id"]:
                    continue
                if kind == "executing" and data["node"]:
                    outcome.ran.append(data["node"])
                elif kind == "progress":
                    outcome.progress.append(data["value"])
                    if on_progress:
                        await asyncio.to_thread(on_progress, data["value"])
                elif kind == "execution_error":
                    outcome.status, outcome.message = "error", data["exception_message"].strip()
                elif kind == "execution_interrupted":
                    outcome.status = "interrupted"
                if kind in ("execution_success", "execution_error", "execution_interrupted"):
                    break
            outcome.seconds = time.monotonic() - started
        while body["prompt_id"] not in (history := self.get(f"/history/{body['prompt_id']}")):
            await asyncio.sleep(0.05)
        outcome.outputs = history[body["prompt_id"]]["outputs"]
        return outcome
