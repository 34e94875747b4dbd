"""Which client holds which rows: exact definitions. Each function returns one ascending int64 tensor of positions for each client.

Every row goes to exactly one client. All draws follow from the ``torch.Generator``. Raises ``ArgumentError`` where a client would
be left with fewer than ``least`` rows.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from equipoise.data.corruptions import long_tail
from equipoise.errors import ArgumentError, check_integer, check_range, refuse

DRAWS = 1000  # of a Dirichlet partition, until every client has enough rows


def iid(count: int, clients: int, generator: torch.Generator, *, least: int = 1) -> list[Tensor]:
    """A random permutation of ``count`` rows, cut into ``clients`` runs whose lengths differ by at most one."""
    check_integer("clients", clients, 1)
    _enough(count, clients, least)
    return [part.sort().values for part in torch.randperm(count, generator=generator).tensor_split(clients)]


def dirichlet(
    labels: Tensor,
    clients: int,
    alpha: float,
    generator: torch.Generator,
    *,
    least: int = 1,
    least_classes: int = 1,
) -> list[Tensor]:
    """Skewed classes (Hsu, Qi and Brown, 2019): each class is dealt out by shares p ~ Dirichlet(alpha, ..., alpha).

    The n rows of a class, in random order, are cut at ``floor(n (p_1 + ... + p_k))``. The smaller alpha > 0, the fewer clients hold
    a class: 0.1 gives most clients two or three classes of ten, 100 nearly equal shares. All classes are drawn anew, up to 1000
    times, until every client holds ``least`` rows, of ``least_classes`` classes.
    """
    check_integer("clients", clients, 1)
    check_range("alpha", alpha, 0, open_low=True)
    classes = _classes(labels)
    check_integer("least_classes", least_classes, 1, len(np.unique(classes)))
    _enough(len(labels), clients, least)
    rng = np.random.default_rng(int(torch.randint(2**62, (), generator=generator)))
    order = rng.permutation(len(labels))
    order = order[np.argsort(classes[order], kind="stable")]  # by class, at random inside
    counts = np.bincount(classes)
    counts = counts[counts > 0]
    for _ in range(DRAWS):
        cuts = np.floor(np.cumsum(rng.dirichlet([alpha] * clients, len(counts)), 1) * counts[:, None] + 1e-9).astype(
            int
        )
        cuts[:, -1] = counts
        sizes = np.diff(cuts, axis=1, prepend=0)  # (classes, clients)
        if sizes.sum(0).min() >= least and (sizes > 0).sum(0).min() >= least_classes:
            owner = np.repeat(np.tile(np.arange(clients), len(counts)), sizes.reshape(-1))
            return _by_owner(owner, order, clients)
    raise ArgumentError(
        f"alpha = {alpha}, clients = {clients}, least = {least}, least_classes = {least_classes}: each of {DRAWS} draws of "
        f"{len(labels)} rows of {len(counts)} classes left a client with fewer. Raise alpha, or take fewer clients"
    )


def shards(labels: Tensor, clients: int, per_client: int, generator: torch.Generator) -> list[Tensor]:
    """Shards by class (McMahan et al., 2017): rows are sorted by class, at random inside a class, and cut into
    ``clients * per_client`` shards whose sizes differ by at most one; each client gets ``per_client`` of them at random.

    A client holds at most ``per_client`` classes where no shard spans two.
    """
    check_integer("clients", clients, 1)
    check_integer("per_client", per_client, 1)
    classes = torch.from_numpy(_classes(labels))
    _enough(len(labels), clients * per_client, 1)
    order = torch.randperm(len(classes), generator=generator)
    order = order[classes[order].argsort(stable=True)]
    parts = order.tensor_split(clients * per_client)
    dealt = torch.randperm(len(parts), generator=generator).view(clients, per_client)
    return [torch.cat([parts[shard] for shard in hand]).sort().values for hand in dealt.tolist()]


def long_tailed(
    labels: Tensor, clients: int, alpha: float, ratio: float, generator: torch.Generator, *, least: int = 1
) -> list[Tensor]:
    """The union of the clients is a long tail (``equipoise.data.corruptions.long_tail`` with ``ratio``, class 0 the most
    frequent), dealt out by ``dirichlet`` with ``alpha``. The rows that the tail leaves out go to nobody."""
    kept = long_tail(labels, ratio, generator)
    return [kept[rows] for rows in dirichlet(labels[kept], clients, alpha, generator, least=least)]


def by_column(values: Sequence[object] | Tensor) -> tuple[list[str], list[Tensor]]:
    """One client for each distinct value of a column (a hospital, a user), in the order of the sorted texts: names and rows."""
    column = [str(value) for value in (values.tolist() if isinstance(values, Tensor) else values)]
    if not column:
        raise ArgumentError("values = []: a column needs at least one row")
    names, owner = np.unique(np.asarray(column), return_inverse=True)
    return list(map(str, names)), _by_owner(owner, np.arange(len(column)), len(names))


def class_shares(labels: Tensor, parts: Sequence[Tensor], num_classes: int) -> Tensor:
    """Share of each class in each client's rows: (clients, C), rows with the sum 1."""
    counts = torch.stack([torch.bincount(labels[rows], minlength=num_classes) for rows in parts])
    return counts / counts.sum(1, keepdim=True)


def _by_owner(owner: np.ndarray, rows: np.ndarray, clients: int) -> list[Tensor]:
    """``rows`` of each owner, ascending."""
    order = np.lexsort((rows, owner))
    cuts = np.cumsum(np.bincount(owner, minlength=clients))[:-1]
    return [torch.from_numpy(part.astype(np.int64)) for part in np.split(rows[order], cuts)]


def _classes(labels: Tensor) -> np.ndarray:
    if labels.ndim != 1 or labels.is_floating_point() or not len(labels) or int(labels.min()) < 0:
        refuse("labels", f"{labels.dtype} {tuple(labels.shape)}", "be integer classes (N,) numbered from 0")
    return labels.cpu().numpy().astype(np.int64)


def _enough(rows: int, clients: int, least: int) -> None:
    check_integer("least", least, 1)
    if rows < clients * least:
        raise ArgumentError(
            f"clients = {clients}: {rows} rows cannot give each of them {least}. Take fewer clients or shards"
        )
