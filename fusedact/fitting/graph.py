"""`graph`: many steps of any model captured once as a CUDA graph, then replayed without Python between them."""

from collections.abc import Callable
from copy import deepcopy
from typing import Any, NamedTuple

import torch
from torch import Tensor

from fusedact import backend
from fusedact.fitting.engine import Engine, Job, fused
from fusedact.fitting.loop import Loop
from fusedact.fitting.recipe import Unsupported, check_optimizer

DEVICES = ("cuda",)
MOST_STEPS = 500  # of a graph: some ten thousand launches
MOST_BYTES = 2**28  # of the rows that a graph's steps visit
WARM_UP = 3  # steps before a capture, as torch.cuda.graph asks for; they are undone


class Captured(NamedTuple):
    """A graph of some steps on the rows that stand in x and y; a replay leaves each step's loss in losses."""

    graph: Any
    x: Tensor
    y: Tensor
    losses: Tensor


class Graph(Engine):
    name = "graph"

    def __init__(self, job: Job) -> None:
        if job.x.device.type not in DEVICES:
            raise Unsupported(f"engine 'graph' runs on a GPU, the model is on {job.x.device}")
        if job.precision is not None:
            raise Unsupported(f"engine 'graph' computes as the model does, not with precision={job.precision!r}")
        self.job = job
        self.model, self.loss = fused(job.model), fused(job.loss)
        self.optimizer = _twin(job.optimizer)
        self._graphs: dict[tuple[int, int], Captured] = {}
        try:
            self._captured(1, job.batch_size)
        except RuntimeError as error:  # what a capture does not allow, and torch's own errors
            reason = str(error).partition("\n")[0]
            raise Unsupported(f"engine 'graph' cannot capture a step: {reason}") from error

    def train(self, order: Tensor) -> Tensor:
        order = order.to(self.job.x.device)
        before = self._snapshot()
        losses = torch.stack([self._pass(visited) for visited in order])
        if losses.isfinite().all() and all(t.isfinite().all() for t in self._marked()):
            return losses
        self._restore(before)
        return self._searched(order)

    def write(self) -> None:
        """The twin's state into the user's optimizer, whose options stay."""
        state = deepcopy(self.optimizer.state_dict()["state"])
        groups = self.job.optimizer.state_dict()["param_groups"]
        if not any(group.get("capturable") or group.get("fused") for group in groups):
            for known in state.values():
                known.update({name: value.cpu() for name, value in known.items() if name == "step"})
        self.job.optimizer.load_state_dict({"state": state, "param_groups": groups})

    def _searched(self, order: Tensor) -> Tensor:
        """The same steps by the loop, which looks at each."""
        self.write()
        try:
            return Loop(self.job).train(order)
        finally:
            self._graphs.clear()  # they change the tensors of the twin's former state
            self.optimizer = _twin(self.job.optimizer)

    def _pass(self, visited: Tensor) -> Tensor:
        size = self.job.batch_size
        full = len(visited) // size * size
        row_bytes = self.job.x[0].nbytes + self.job.y[0].nbytes
        steps = max(1, min(MOST_STEPS, MOST_BYTES // (size * row_bytes)))
        parts = [*visited[:full].split(steps * size), visited[full:]]
        return torch.cat([self._replayed(part, min(size, len(part))) for part in parts if len(part)])

    def _replayed(self, rows: Tensor, size: int) -> Tensor:
        captured = self._captured(len(rows) // size, size)
        torch.index_select(self.job.x, 0, rows, out=captured.x)
        torch.index_select(self.job.y, 0, rows, out=captured.y)
        with backend.on_device(rows):
            captured.graph.replay()
        return captured.losses.clone()

    def _captured(self, steps: int, size: int) -> Captured:
        if (steps, size) not in self._graphs:
            before = self._snapshot()
            gradients = [(p, p.grad) for p in self.job.model.parameters()]
            try:
                self._graphs[steps, size] = self._capture(steps, size)
            finally:  # also of a capture that failed: its first steps were taken
                self._restore(before)
                for p, gradient in gradients:
                    p.grad = gradient
        return self._graphs[steps, size]

    def _capture(self, steps: int, size: int) -> Captured:
        x, y = (t[:1].expand(steps * size, *t.shape[1:]).contiguous() for t in (self.job.x, self.job.y))
        losses = torch.empty(steps, dtype=torch.float64, device=x.device)

        def body() -> None:
            for step, (rows, targets) in enumerate(zip(x.split(size), y.split(size), strict=True)):
                losses[step] = self._step(rows, targets)

        return Captured(record(lambda: self._step(x[:size], y[:size]), body, x.device), x, y, losses)

    def _step(self, x: Tensor, y: Tensor) -> Tensor:
        self.optimizer.zero_grad()
        cost = self.loss(self.model(x), y)
        cost.backward()
        self.optimizer.step()
        return cost.detach()

    def _changing(self) -> list[Tensor]:
        """What a step may change: parameters, buffers, the optimizer's state."""
        known = [t for state in self.optimizer.state.values() for t in state.values() if isinstance(t, Tensor)]
        return [*self.job.model.parameters(), *self.job.model.buffers(), *known]

    def _marked(self) -> list[Tensor]:
        """Where a gradient that is not finite leaves its mark for good."""
        moments = [
            state.get(name) for state in self.optimizer.state.values() for name in ("momentum_buffer", "exp_avg")
        ]
        return [*self.job.model.parameters(), *(moment for moment in moments if moment is not None)]

    def _snapshot(self) -> dict[int, Tensor]:
        return {id(t): t.detach().clone() for t in self._changing()}

    @torch.no_grad()
    def _restore(self, snapshot: dict[int, Tensor]) -> None:
        """State that the optimizer has made since is 0, as it began."""
        for t in self._changing():
            t.copy_(snapshot[id(t)]) if id(t) in snapshot else t.zero_()


def record(warm_up: Callable[[], Any], body: Callable[[], None], device: torch.device) -> Any:
    """A graph that does what the body does; the generator's state is left as it was."""
    random = torch.cuda.get_rng_state(device)
    side, current = torch.cuda.Stream(device), torch.cuda.current_stream(device)
    side.wait_stream(current)
    try:
        with torch.cuda.stream(side):
            for _ in range(WARM_UP):
                warm_up()
        current.wait_stream(side)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.device(device), torch.cuda.graph(graph, stream=side):
            body()
    finally:
        torch.cuda.set_rng_state(random, device)
    return graph


def _twin(optimizer: torch.optim.Optimizer) -> torch.optim.Optimizer:
    """The same optimizer in its fused form, whose step a graph can hold."""
    kind: Any = type(optimizer)
    check_optimizer(optimizer)
    if any(group.get("dampening") for group in optimizer.param_groups):
        raise Unsupported(f"{kind.__name__} with dampening is not supported")
    told = {"foreach": None, "fused": True} | ({} if kind is torch.optim.SGD else {"capturable": True})
    twin = kind([{**group, **told} for group in optimizer.param_groups])
    state = optimizer.state_dict()["state"]
    twin.load_state_dict({"state": deepcopy(state), "param_groups": twin.state_dict()["param_groups"]})
    return twin
