"""A training node's own endpoint: where it may lead, and an evaluation by it, marked as such.

The address is a stranger's word. It is resolved once, what comes out is checked against the networks that the operator
allows, and the connection goes to the checked address, so that a name that means something else a moment later, or a
redirection of any kind, leads nowhere.
"""

import asyncio
import ipaddress
import socket
from collections.abc import Awaitable, Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import AbstractContextManager
from dataclasses import dataclass, replace
from pathlib import Path

from services.validator.assignments import Node, Order
from services.validator.children import stall_s
from services.validator.elsewhere import connected, count
from services.validator.evaluation import CannotEvaluate, ModelFailed, ServerLost
from services.validator.fleet import Endpoint
from services.validator.rows import EvaluationRows
from services.validator.runs import Finding, Progress
from tiltyard.calls.tls import ChannelTls
from tiltyard.endpoints import InferenceEndpoint, parse_endpoint
from tiltyard.identity import Key

PUBLIC = "public"
_RESOLVE_TIMEOUT_S = 10.0

IpAddress = ipaddress.IPv4Address | ipaddress.IPv6Address
IpNetwork = ipaddress.IPv4Network | ipaddress.IPv6Network

Resolve = Callable[[str, int], Awaitable[Sequence[str]]]
"""The IP addresses of a host, as the system's resolver gives them. Raises OSError."""

# Addresses that lead to an IPv4 address elsewhere (RFC 6052, RFC 8215).
_TRANSLATED = (ipaddress.IPv6Network("64:ff9b::/96"), ipaddress.IPv6Network("64:ff9b:1::/48"))


@dataclass(frozen=True)
class Reach:
    """Where nodes' endpoints may lead: all addresses of the public internet, and networks beside them."""

    public: bool = False
    networks: tuple[IpNetwork, ...] = ()

    @property
    def anywhere(self) -> bool:
        """Whether there is any place at all where an endpoint may lead."""
        return self.public or bool(self.networks)

    def allows(self, address: IpAddress) -> bool:
        """Whether an address may be connected to. One that hides an IPv4 address is what it hides."""
        if isinstance(address, ipaddress.IPv6Address):
            if address.ipv4_mapped is not None:
                return self.allows(address.ipv4_mapped)
            if address.sixtofour is not None or address.teredo is not None or address.scope_id is not None:
                return False
            if any(address in network for network in _TRANSLATED):
                return False
        if any(address.version == network.version and address in network for network in self.networks):
            return True
        return self.public and address.is_global and not address.is_multicast and not address.is_reserved


def parse_reach(text: str) -> Reach:
    """`public` and networks as 10.0.0.0/8, comma-separated; empty for nowhere. Raises ValueError naming the entry."""
    parts = [part.strip() for part in text.split(",") if part.strip()]
    networks = []
    for part in parts:
        if part != PUBLIC:
            try:
                networks.append(ipaddress.ip_network(part))
            except ValueError as error:
                raise ValueError(f"{part!r} is neither {PUBLIC!r} nor a network: {error}") from None
    return Reach(public=PUBLIC in parts, networks=tuple(networks))


class NodeEndpoints:
    """Evaluations by the training nodes' own servers, as far as `reach` goes; reports say that it was so.

    A submitted model has the 64 hex digits of its digest for a name there. `longest_s` is how long one may take for all
    rows: other evaluations wait meanwhile, and who answers a row now and then would have them wait for days.
    """

    def __init__(
        self,
        reach: Reach,
        *,
        key: Key,
        concurrency: int,
        tls: ChannelTls | None = None,
        resolve: Resolve | None = None,
        longest_s: Callable[[Order], float] = stall_s,
    ) -> None:
        self._reach = reach
        self._key = key
        self._tls = tls or ChannelTls()
        self._resolve = resolve or _system_resolve
        self._longest_s = longest_s
        self._threads = ThreadPoolExecutor(max_workers=concurrency, thread_name_prefix="node-evaluation")

    def may_ask(self, order: Order) -> bool:
        """Whether the task, the node and this validator's operator want its endpoint to be asked."""
        return order.node is not None and self._reach.anywhere

    async def evaluate(self, order: Order, dataset: Path, progress: Progress) -> Finding:
        """What the node's endpoint answers to every row, counted. Raises CannotEvaluate, never ModelFailed."""
        node = order.node
        if node is None:
            raise CannotEvaluate("the task does not let the node's own endpoint be asked")
        with EvaluationRows.open(dataset) as rows:
            rows.check_shape(order.spec.input_shape)
            progress.begin(rows.total)
            with await self._connected(node) as endpoint:
                longest_s = self._longest_s(order)
                try:
                    async with asyncio.timeout(longest_s):
                        finding = await count(
                            [endpoint],
                            model=order.model_digest,
                            rows=rows,
                            order=order,
                            progress=progress,
                            threads=self._threads,
                        )
                except (ModelFailed, ServerLost) as error:
                    raise CannotEvaluate(f"the node's own endpoint: {error}") from error
                except TimeoutError as error:
                    raise CannotEvaluate(f"the node's own endpoint took more than {longest_s:g} s") from error
        return replace(finding, node_endpoint=True)

    def close(self) -> None:
        """Ends the threads."""
        self._threads.shutdown()

    async def _connected(self, node: Node) -> AbstractContextManager[Endpoint]:
        try:
            endpoint = parse_endpoint(node.endpoint)
        except ValueError as error:
            raise CannotEvaluate(f"the node's endpoint {node.endpoint!r}: {error}") from error
        address = await self._checked_address(endpoint)
        target = f"ipv6:[{address}]" if address.version == 6 else f"ipv4:{address}"
        return connected(
            f"node {node.id}",
            f"{target}:{endpoint.port}",
            key=self._key,
            audience=node.id,
            credentials=self._tls.credentials() if endpoint.tls else None,
            # The certificate is that of the name, not of the address that was checked.
            options=(
                ("grpc.ssl_target_name_override", endpoint.host),
                ("grpc.default_authority", endpoint.host),
            ),
        )

    async def _checked_address(self, endpoint: InferenceEndpoint) -> IpAddress:
        try:
            async with asyncio.timeout(_RESOLVE_TIMEOUT_S):
                found = [ipaddress.ip_address(each) for each in await self._resolve(endpoint.host, endpoint.port)]
        except (OSError, ValueError, TimeoutError) as error:
            raise CannotEvaluate(f"the node's endpoint {endpoint.host} has no address: {error}") from error
        allowed = [address for address in found if self._reach.allows(address)]
        if not allowed:
            # What it resolves to stays in our log: a node is not to learn about networks that it cannot see.
            raise CannotEvaluate(f"the node's endpoint {endpoint.host} leads where this validator does not go")
        return allowed[0]


async def _system_resolve(host: str, port: int) -> Sequence[str]:
    found = await asyncio.get_running_loop().getaddrinfo(host, port, type=socket.SOCK_STREAM)
    return [str(address[0]) for *_, address in found]
