"""The Kubernetes node this agent runs on: what it is given, and what it publishes of itself.

The annotations and the patches are those of flannel's pkg/subnet/kube.
"""

from __future__ import annotations

import time
from contextlib import suppress
from ipaddress import ip_address, ip_network
from typing import TypeVar
from urllib.parse import quote

import msgspec

from flannel_dp.cluster.claims import lease_of_node
from flannel_dp.cluster.lease import BackendData, BadClaim, Identity, Lease, annotation_keys_prefix
from flannel_dp.cluster.network import NetworkConfig
from flannel_dp.errors import ConfigError, NotYet, Unavailable
from flannel_dp.sources.kube.api import RequestRejected
from flannel_dp.sources.kube.config import KubeOptions, server_text
from flannel_dp.sources.kube.nodes import NOT_JSON, PATH, KubeNode, NodeReader
from flannel_dp.sources.kube.source import open_api

_T = TypeVar("_T")
_FAMILIES = {4: "", 6: "v6"}  # as in public-ip and public-ipv6
_REASON = "FlannelIsUp"


class _Condition(msgspec.Struct, gc=False):
    type: str = ""
    status: str = ""
    reason: str = ""


class _NodeStatus(msgspec.Struct, gc=False):
    conditions: list[_Condition] | None = None


class _NodeWithStatus(KubeNode):
    status: _NodeStatus = msgspec.field(default_factory=_NodeStatus)


class _PodSpec(msgspec.Struct, gc=False, rename="camel"):
    node_name: str = ""


class _Pod(msgspec.Struct, gc=False):
    spec: _PodSpec = msgspec.field(default_factory=_PodSpec)


#: For how long what was read of the node serves a start, which asks for several parts of it.
_SAME_SECONDS = 5.0


class OtherSubnets(Unavailable):
    """The node was recreated, and has other pod CIDRs than the lease that is to be published."""


class OwnNode:
    """This machine's node object. For one thread at a time. ``published`` is the lease that its
    annotations were last made to say, None before.

    All methods raise Unavailable and AuthFailed, naming the server, the request and the
    RBAC rule, when the API server cannot be reached or does not allow it.

    Raises ConfigError for options that cannot be used.
    """

    def __init__(self, options: KubeOptions) -> None:
        self._options = options
        self._api = open_api(options)
        self._prefix = annotation_keys_prefix(options.annotation_prefix)
        self._reader = NodeReader(options.annotation_prefix)
        self.published: Lease | BadClaim | None = None
        self._seen: tuple[float, _NodeWithStatus] | None = None
        self._name = options.node_name or options.environ.get("NODE_NAME", "")

    def close(self) -> None:
        """Close the connections."""
        self._api.close()

    def node_name(self) -> str:
        """Return the node's name: the option, else NODE_NAME, else where pod POD_NAME of
        POD_NAMESPACE runs.

        Raises ConfigError when none of them is set.
        """
        if not self._name:
            self._name = self._name_by_pod()
        return self._name

    def lease(self) -> Lease | BadClaim | None:
        """Return what the node publishes now, None when it is not flannel's yet; its MACs are those
        to give to the devices."""
        return self._reader.claim(self._read())

    def own_subnets(self, config: NetworkConfig) -> dict[int, str]:
        """Return the node's pod CIDRs by family (4, 6), of the families that ``config`` enables.

        Raises Unavailable while none is assigned, NotYet for one that is broken, which is
        corrected in the cluster, ConfigError for one that is not inside the network.
        """
        node = self._read()
        name = self.node_name()
        networks = {4: config.network, 6: config.ipv6_network}
        subnets: dict[int, str] = {}
        for cidr in node.spec.cidrs:
            try:
                subnet = ip_network(cidr, strict=False)
            except ValueError as error:
                raise NotYet(
                    f"node {name}: its pod CIDR {server_text(cidr)!r} is not a prefix",
                    hint="correct podCIDRs in the node's spec",
                ) from error
            network = networks[subnet.version]
            if network is None:
                continue
            if subnet.version != network.version or not subnet.subnet_of(network):  # type: ignore[arg-type]
                key = "Network" if subnet.version == 4 else "IPv6Network"
                raise ConfigError(
                    f"node {name}: its pod CIDR {subnet} is not inside {key} {network}",
                    hint=f"make {key} the --cluster-cidr of kube-controller-manager",
                )
            if subnet.version in subnets:
                raise NotYet(
                    f"node {name}: two pod CIDRs of IPv{subnet.version}",
                    hint="a node has one of each family",
                )
            subnets[subnet.version] = str(subnet)
        for family, network in networks.items():
            if network is not None and family not in subnets:
                raise Unavailable(
                    f"node {name}: pod cidr not assigned for IPv{family}",
                    hint="run kube-controller-manager with --allocate-node-cidrs=true and"
                    " --cluster-cidr, or kubeadm with --pod-network-cidr",
                )
        return subnets

    def public_overrides(self) -> dict[int, str]:
        """By family the addresses to publish in place of our own (annotations
        public-ip-overwrite and public-ipv6-overwrite).

        Raises NotYet for one that is no address of its family.
        """
        return self._addresses(self._read(), "public-ip{}-overwrite")

    def node_public(self) -> dict[int, str]:
        """By family the addresses that choose the interface, like --public-ip (annotations
        node-public-ip and node-public-ipv6).

        Raises NotYet for one that is no address of its family.
        """
        return self._addresses(self._read(), "node-public-ip{}")

    def publish(
        self, identity: Identity, subnets: dict[int, str], *, fresh: bool = False
    ) -> tuple[str, ...]:
        """Write the node's annotations as flannel does, where they differ. Return the keys of those
        that did. With ``fresh`` the node is read again before.

        ``subnets`` are the pod CIDRs that the identity was made for. Overrides take the
        place of its public addresses. Like ``kubectl annotate node NAME ...``, but through
        the status subresource, which is all that flannel's ClusterRole allows.

        Raises OtherSubnets when the node's pod CIDRs are other ones by now.
        """
        node = self._read(fresh=fresh)
        given = set(node.spec.cidrs)
        if gone := [subnet for subnet in subnets.values() if subnet not in given]:
            raise OtherSubnets(
                f"node {self.node_name()}: {', '.join(gone)} is not its pod CIDR any more,"
                f" but {server_text(', '.join(given)) or 'none'}",
                hint="the node was recreated: join again",
            )
        notes = node.metadata.annotations or {}
        wanted = self._annotations(identity, self._addresses(node, "public-ip{}-overwrite"))
        changed = {key: value for key, value in wanted.items() if notes.get(key) != value}
        self.published = lease_of_node(
            node.metadata.name, notes | wanted, node.spec.cidrs, self._prefix
        )
        if changed:
            self._patch({"metadata": {"annotations": changed}})
        return tuple(changed)

    def mark_ready(self) -> bool:
        """Set the condition NodeNetworkUnavailable to False, so that pods are scheduled here.

        To be called once all peers are programmed, and again after it failed. Does nothing
        when ``set_node_network_unavailable`` is off, or when it is set already. Tells
        whether it wrote.
        """
        if not self._options.set_node_network_unavailable:
            return False
        done = _Condition("NetworkUnavailable", "False", _REASON)
        # What was read before tells that it is to be written, and only the node as it is now that
        # it is not.
        if all(done in (self._read(fresh=one).status.conditions or []) for one in (False, True)):
            return False
        now = time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime())
        condition_now = {
            "type": "NetworkUnavailable",
            "status": "False",
            "lastHeartbeatTime": now,
            "lastTransitionTime": now,
            "reason": _REASON,
            "message": "Flannel is running on this node",
        }
        self._patch({"status": {"conditions": [condition_now]}})
        return True

    def _annotations(self, identity: Identity, overrides: dict[int, str]) -> dict[str, str]:
        """AcquireLease of pkg/subnet/kube: vxlan publishes the families that have a device,
        other backends publish "null" for data, and IPv4 even where there is none."""
        notes = {"kube-subnet-manager": "true", "backend-type": identity.backend}
        for family in sorted(identity.macs or {4, *identity.public}):
            data = "null"
            if family in identity.macs:
                vtep = BackendData(identity.vni, identity.macs[family])
                data = msgspec.json.encode(vtep).decode()
            notes["backend-data" if family == 4 else "backend-v6-data"] = data
            address = overrides.get(family) or identity.public.get(family, "0.0.0.0")
            notes[f"public-ip{_FAMILIES[family]}"] = address
        return {self._prefix + name: value for name, value in notes.items()}

    def _addresses(self, node: KubeNode, pattern: str) -> dict[int, str]:
        notes = node.metadata.annotations or {}
        found: dict[int, str] = {}
        for family, suffix in _FAMILIES.items():
            key = self._prefix + pattern.format(suffix)
            text = notes.get(key, "").strip()
            if not text:
                continue
            try:
                address = ip_address(text)
            except ValueError:
                address = None
            if address is None or address.version != family:
                raise NotYet(
                    f"node {self.node_name()}: annotation {key}: {server_text(text)!r} is no"
                    f" IPv{family} address",
                    hint=f"correct it, or remove it: kubectl annotate node NAME {key}-",
                )
            found[family] = str(address)
        return found

    def _name_by_pod(self) -> str:
        pod = self._options.environ.get("POD_NAME", "")
        namespace = self._options.environ.get("POD_NAMESPACE", "")
        if not pod or not namespace:
            raise ConfigError(
                "the name of this node is not known: neither NODE_NAME nor POD_NAME and"
                " POD_NAMESPACE are set",
                hint="set NODE_NAME in the environment to the node's metadata.name",
            )
        path = f"/api/v1/namespaces/{quote(namespace, safe='')}/pods/{quote(pod, safe='')}"
        data = self._api.get(path, rule='"get" of "pods"')
        name = self._decoded(data, _Pod, path).spec.node_name
        if not name:
            raise Unavailable(
                f"{self._api.origin}: pod {namespace}/{pod}: its spec has no nodeName",
                hint="set NODE_NAME in the environment to the node's metadata.name",
            )
        return name

    @property
    def _path(self) -> str:
        return f"{PATH}/{quote(self.node_name(), safe='')}"

    def _read(self, *, fresh: bool = False) -> _NodeWithStatus:
        if not fresh and self._seen is not None and time.monotonic() < self._seen[0]:
            return self._seen[1]
        self._seen = None
        path = self._path
        try:
            data = self._api.get(path, rule='"get" of "nodes"')
        except RequestRejected as error:
            if error.code == 404:
                error.hint = "set NODE_NAME in the environment to the node's metadata.name"
            raise
        return self._keep(self._decoded(data, _NodeWithStatus, path))

    def _patch(self, patch: object) -> None:
        self._seen = None
        data = self._api.patch(f"{self._path}/status", patch, rule='"patch" of "nodes/status"')
        with suppress(*NOT_JSON):  # the answer is the node as it is now
            node = msgspec.json.decode(data, type=_NodeWithStatus)
            if node.metadata.name == self.node_name():
                self._keep(node)

    def _keep(self, node: _NodeWithStatus) -> _NodeWithStatus:
        self._seen = time.monotonic() + _SAME_SECONDS, node
        return node

    def _decoded(self, data: bytes, kind: type[_T], path: str) -> _T:
        try:
            return msgspec.json.decode(data, type=kind)
        except NOT_JSON as error:
            raise Unavailable(
                f"{self._api.origin}: GET {path}: not what was asked for: {error}",
                hint="check that the address is that of a Kubernetes API server",
            ) from error
