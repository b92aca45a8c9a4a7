"""The button "Finish now": it ends the run of its own node, and keeps the picture so far."""

from collections import Counter
from collections.abc import Collection
from typing import Any

from aiohttp import web
from server import PromptServer

PATH = "/splice/finish"
"""Where the button posts whose it is."""


class FinishButton:
    """Counts the presses of the button on the node that is executed.

    The first ends the run under way, or the one that is being prepared; the second ends the batch.
    """

    def __init__(self) -> None:
        self._node: str | None = None
        self._presses = self._answered = 0
        self._short_runs: Counter[str] = Counter()

    def enter(self, node: str | None) -> None:
        """A node begins; what was pressed before is forgotten."""
        self._node, self._presses, self._answered = node, 0, 0

    def leave(self) -> None:
        """The node has ended."""
        self._node = None

    def press(self, nodes: Collection[str], client: str) -> bool:
        """Counts a press.

        Args:
            nodes: Ids in execution of the button's node: a subgraph that is used twice has each of its nodes twice.
            client: The window of the browser that the button is in; another may show another graph, of the same ids.

        Returns:
            Whether that node is the one that is executed; a press on another has no effect.
        """
        if self._node not in nodes or PromptServer.instance.client_id not in (None, client):
            return False
        self._presses += 1
        return True

    @property
    def ends_run(self) -> bool:
        """Whether the run under way is to end after its step."""
        return self._presses > self._answered

    @property
    def ends_batch(self) -> bool:
        """Whether no further run of the node is to begin."""
        return self._presses > 1

    def answer(self) -> None:
        """The run has ended early: what the node gives is not what its inputs give."""
        self.settle()
        if self._node is not None:
            self._short_runs[self._node] += 1

    def settle(self) -> None:
        """A run has ended: what was pressed while its picture was rendered does not end the next one."""
        self._answered = self._presses

    def short_runs(self, node: str) -> int:
        """How often a node was ended early: while this number stays, its last result may be taken from the cache."""
        return self._short_runs[node]


def _shared() -> Any:
    """The button's state, one for the server: where two copies of the pack are installed, both get the presses."""
    server = PromptServer.instance
    if not hasattr(server, "splice_finish"):
        server.splice_finish = FinishButton()
    return server.splice_finish


button: FinishButton = _shared()
"""Of this server."""


def register_routes() -> None:
    """What the button calls. A second route of one path would keep the server from starting."""
    routes = PromptServer.instance.routes
    if any(getattr(route, "path", None) == PATH for route in routes):
        return

    @routes.post(PATH)
    async def finish(request: web.Request) -> web.Response:
        try:
            body = await request.json()
            nodes, client = [str(node) for node in body["nodes"]], str(body["client"])
        except (ValueError, KeyError, TypeError):
            return web.json_response({"error": "nodes and client are missing"}, status=400)
        return web.json_response({"running": button.press(nodes, client)})
