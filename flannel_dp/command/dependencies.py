"""Which flags have an effect only with, or only without, another flag.

All functions are pure: what was given and what it means are handed in. The command imports this
module only where one of these flags was given (``output.Command``).
"""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping
from typing import Any, NamedTuple

#: The sources of leases, the first of which counts where several are named: the parameter of each.
SOURCES = {"file": "leases", "kubernetes": "kube_subnet_mgr", "etcd": "etcd_endpoints"}

#: Of a parameter: the sources with which it has an effect; "" is none.
OF_SOURCE = {
    "kube_subnet_mgr": ("kubernetes",),
    "etcd_endpoints": ("etcd",),
    "etcd_prefix": ("etcd",),
    "etcd_keyfile": ("etcd",),
    "etcd_certfile": ("etcd",),
    "etcd_cafile": ("etcd",),
    "etcd_username": ("etcd",),
    "etcd_password": ("etcd",),
    "etcd_password_file": ("etcd",),
    "kube_api_url": ("kubernetes",),
    "kubeconfig_file": ("kubernetes",),
    "kube_annotation_prefix": ("kubernetes", "file"),
    "net_conf": ("file", "kubernetes", ""),
    "subnet_lease_renew_margin": ("etcd",),
    "set_node_network_unavailable": ("kubernetes",),
}

#: Of a parameter: others, one of which it takes to have an effect.
NEEDS = {
    "subnet_lease_renew_margin": ("watch",),
    "set_node_network_unavailable": ("watch",),
    "audit_interval": ("watch",),
    "lease_grace": ("watch",),
    "log_json": ("watch",),
    "healthz_port": ("watch",),
    "probe": ("watch",),
    "probe_interval": ("probe",),
    "path_mtu": ("probe",),
    "ready_when": ("probe",),
    "ready_timeout": ("ready_when",),
    "healthz_ip": ("healthz_port",),
    "interval": ("watch",),
    "behind_nat": ("public_ip", "public_ipv6", "kube_subnet_mgr"),
    "ip_masq_fully_random_disable": ("ip_masq",),
}

#: Of a parameter: another with which it has no effect, and that one's value ("" is any).
BEATEN = {
    "etcd_password": ("etcd_password_file", ""),
    "ip_masq": ("firewall", "none"),
    "ip_masq_fully_random_disable": ("firewall", "none"),
    "iptables_forward_rules": ("firewall", "none"),
    "guard_underlay": ("firewall", "none"),
}

#: Switches that have an effect when they are off.
_OFF_COUNTS = ("set_node_network_unavailable",)


class Idle(NamedTuple):
    """A parameter that has no effect, and why: ``others`` are what it takes, or what prevents it
    (``joined`` is "without" or "with")."""

    name: str
    joined: str
    others: tuple[str, ...]
    value: str = ""

    def reason(self, spelt: Mapping[str, str]) -> str:
        """Return the reason with flags as ``spelt`` has them by parameter."""
        names = [spelt[other] + (f" {self.value}" if self.value else "") for other in self.others]
        *most, last = names
        return f"has no effect {self.joined} {', '.join(most)}{' or ' if most else ''}{last}"


def idle(given: Collection[str], values: Mapping[str, Any], default: str = "") -> Iterator[Idle]:
    """Yield the parameters among ``given`` that have no effect with these ``values``.

    ``default`` is the source where no flag names one ("" for none). Parameters that the command
    does not have are not asked for.
    """
    named = [one for one, parameter in SOURCES.items() if values.get(parameter)]
    source = named[0] if named else default
    for name in given:
        if not values.get(name) and name not in _OFF_COUNTS:
            continue
        if found := _idle_of(name, values, source, bool(named)):
            yield found


def _idle_of(name: str, values: Mapping[str, Any], source: str, named: bool) -> Idle | None:
    fitting = OF_SOURCE.get(name)
    if fitting is not None and source not in fitting:
        if named:
            return Idle(name, "with", (SOURCES[source],))
        return Idle(name, "without", tuple(SOURCES[one] for one in fitting if one))
    if name in NEEDS:
        needed = tuple(one for one in NEEDS[name] if one in values)
        if needed and not any(values[one] for one in needed):
            return Idle(name, "without", needed)
    other, value = BEATEN.get(name, ("", ""))
    if other and (values.get(other) == value if value else values.get(other)):
        return Idle(name, "with", (other,), value)
    return None
