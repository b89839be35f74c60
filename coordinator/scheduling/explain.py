"""The reasons, in words. Each completes "waits for ...", and stays the same while nothing material changes."""

from __future__ import annotations

from collections.abc import Sequence
from datetime import UTC, datetime

from coordinator.scheduling.labels import Selector, words
from coordinator.scheduling.model import Demand, Shape

CLUSTER = "the Ray cluster to answer"
NODE = "a node to join the cluster"
TURN = "its turn: jobs ahead of it in the queue"
MAKING_ROOM = "jobs that are saving their work to make room for it"


def amounts(demand: Demand, needed: Demand) -> str:
    """How much there is of what is needed: GPUs are named to whoever wants some."""
    cpus = f"{max(demand.cpus, 0):g} CPUs"
    return f"{cpus} and {max(demand.gpus, 0):g} GPUs" if needed.gpus else cpus


def pause(until: float) -> str:
    """A job that waits after a fault. `until` is in seconds of the epoch."""
    return f"its pause after a fault, until {datetime.fromtimestamp(until, UTC):%H:%M:%S} UTC"


def larger_node(unit: Demand, nodes: Sequence[Demand], selector: Selector = ()) -> str:
    """A driver or worker that no node of the cluster can hold, or none of those with the labels that it asks for."""
    cpus, gpus = max(node.cpus for node in nodes), max(node.gpus for node in nodes)
    among = among_nodes(selector)
    if unit.gpus > gpus:
        return f"a node with {unit.gpus:g} GPUs; the largest{among} has {gpus:g}"
    if unit.cpus > cpus:
        return f"a node with {unit.cpus:g} CPUs; the largest{among} has {cpus:g}"
    return f"a node with {unit}; no node{among} has both"


def among_nodes(selector: Selector) -> str:
    """Of which nodes is spoken, where not of all."""
    return f" with {words(selector)}" if selector else ""


def larger_cluster(shape: Shape, cluster: Demand, room: int) -> str:
    """A gang that does not fit into the whole cluster."""
    total, among = shape.total(shape.least), among_nodes(shape.selector)
    has = f"its nodes{among} have" if among else "the cluster has"
    if not total.fits(cluster):
        return f"a larger cluster: needs {total}, {has} {cluster}"
    return f"more nodes{among}: {shape.least} workers of {shape.worker} each, the cluster can hold {room}"


def beside_endpoints(total: Demand, left: Demand) -> str:
    """A job that only the endpoints keep from ever starting."""
    return f"endpoints to give room: needs {total}, they leave {amounts(left, total)}"


def limit_too_low(total: Demand, limit: Demand) -> str:
    """A job larger than all its project may hold."""
    name, needed, most = _worse(total, limit)
    return f"a higher limit for its project: needs {needed:g} {name}, the limit is {most:g}"


def limit(total: Demand, most: Demand, held: Demand, promised: Demand) -> str:
    """A job that its project's limit keeps back. `promised` is what goes to jobs of the project ahead of it that wait."""
    name, _, bound = _worse(total + held + promised, most)
    taken, ahead = (held.cpus, promised.cpus) if name == "CPUs" else (held.gpus, promised.gpus)
    text = f"its project's limit of {bound:g} {name}; {taken:g} are held"
    return text + (f" and {ahead:g} are promised to jobs ahead of it" if ahead > 0 else "")


def turn_in_project(cpus: bool) -> str:
    """A job behind one of its own project that waits for the project's limit."""
    return f"its turn in its project: a job ahead of it waits for the project's limit of {'CPUs' if cpus else 'GPUs'}"


def budget(cpus: bool) -> str:
    """A job of a project that has spent its budget."""
    return f"a new budget for its project: its {'CPU' if cpus else 'GPU'}-seconds are spent"


def room(shape: Shape, free: Demand, largest: Demand, workers: int) -> str:
    """The first job that waits for others to end. `largest` is the most of each resource that is free on one node, `workers` is
    how many of the gang would find room now; all three are of the nodes that it may lie on.
    """
    total, among = shape.total(shape.least), among_nodes(shape.selector)
    where = f" on nodes{among}" if among else ""
    if not total.fits(free):
        return f"{total}; {amounts(free, total)} are free{where}"
    for unit in (shape.worker, shape.driver) if shape.most else (shape.driver,):
        if not unit.fits(largest):
            return f"a node{among} with {unit} free; the most on one node is {amounts(largest, unit)}"
    if shape.least > 1:
        return f"room on single nodes{among} for {shape.least} workers of {shape.worker} each; there is room for {workers}"
    unit = shape.worker if shape.most else shape.driver
    return f"a node{among} with {unit} free at once; what is free lies on several nodes"


def started(total: Demand, workers: int, shape: Shape, early: bool) -> str:
    """A job that starts. `early` says that it overtakes a larger one that waits."""
    text = f"{total} are free"
    if shape.least != shape.most:
        text += f" for {workers} of at most {shape.most} workers"
    return text + (", and no job ahead of it is delayed" if early else "")


def _worse(total: Demand, bound: Demand) -> tuple[str, float, float]:
    """The resource that breaks the bound, what is needed of it, and the bound."""
    if total.gpus > bound.gpus + 1e-6:
        return "GPUs", total.gpus, bound.gpus
    return "CPUs", total.cpus, bound.cpus
