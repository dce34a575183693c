"""``subnet.env``: the file from which the CNI plugin, or Docker, has this node's subnet.

Keys, order, ``+1`` and the rules for reading are flannel's (``WriteSubnetFile`` of
``pkg/subnet/subnet.go``, ``ReadCIDRFromSubnetFile`` of ``main.go``), so that the flannel
CNI plugin reads what is written here and a file that flanneld or a person wrote is
understood. Families are 4 and 6.
"""

from __future__ import annotations

import contextlib
import errno
import logging
import os
import stat
from collections.abc import Mapping
from ipaddress import IPv4Network, IPv6Network, ip_network

from msgspec import Struct, field

from flannel_dp.cluster.network import NetworkConfig
from flannel_dp.errors import ConfigError, KernelError

log = logging.getLogger(__name__)

DEFAULT_PATH = "/run/flannel/subnet.env"
"""Where flannel and its CNI plugin look unless they are told otherwise."""

_NETWORK = {4: "FLANNEL_NETWORK", 6: "FLANNEL_IPV6_NETWORK"}
_SUBNET = {4: "FLANNEL_SUBNET", 6: "FLANNEL_IPV6_SUBNET"}
_HINT = "give --subnet-file a file in a directory that can be written"


class SubnetEnv(Struct, frozen=True):
    """What a subnet.env says; every part may be missing.

    ``networks`` and ``subnets`` map the family to a CIDR with its host bits masked off
    ("10.244.3.0/24", where the file says ``10.244.3.1/24``); ``mtu`` is in bytes.
    """

    networks: Mapping[int, str] = field(default_factory=dict)
    subnets: Mapping[int, str] = field(default_factory=dict)
    mtu: int | None = None
    ipmasq: bool = False


def subnet_env_text(
    config: NetworkConfig, *, subnets: Mapping[int, str], mtu: int, ipmasq: bool
) -> str:
    """Return the content of the file, for the families that ``subnets`` has.

    ``mtu`` is what a pod's interface may have, in bytes: the smaller one where the
    families differ. Raises ConfigError for a subnet that is none, or whose family has
    no Network, and when there is no subnet at all.
    """
    lines: list[str] = []
    for family, network in ((4, config.network), (6, config.ipv6_network)):
        if family not in subnets:
            continue
        subnet = _own_subnet(subnets[family], family)
        if network is None:
            raise ConfigError(
                f"subnet {subnet}: IPv{family} is switched off in the network configuration",
                hint=f'set "EnableIPv{family}": true, or leave the subnet out',
            )
        lines += [
            f"{_NETWORK[family]}={network}",
            f"{_SUBNET[family]}={subnet.network_address + 1}/{subnet.prefixlen}",
        ]
    if not lines:
        raise ConfigError(
            "this node has no subnet to write to subnet.env",
            hint="name it with --subnet, or publish this node's lease",
        )
    lines += [f"FLANNEL_MTU={mtu}", f"FLANNEL_IPMASQ={'true' if ipmasq else 'false'}"]
    return "\n".join(lines) + "\n"


def write_subnet_env(
    path: str | os.PathLike[str],
    *,
    config: NetworkConfig,
    subnets: Mapping[int, str],
    mtu: int,
    ipmasq: bool,
) -> bool:
    """Write the file if its content differs; return whether it was written.

    Raises ConfigError as ``subnet_env_text``, KernelError as ``replace_file``.
    """
    text = subnet_env_text(config, subnets=subnets, mtu=mtu, ipmasq=ipmasq)
    if holds(path, text):
        return False
    replace_file(path, text)
    return True


def holds(path: str | os.PathLike[str], text: str) -> bool:
    """Return whether the file is there with exactly this content. One that cannot be read is
    not."""
    try:
        return _read(os.fspath(path)) == text.encode()
    except OSError:
        return False


def replace_file(path: str | os.PathLike[str], text: str) -> None:
    """Write the file (mode 0644) in one step.

    A reader sees the old file or the new one, also after a power cut: a temporary file
    of the same directory is synced, renamed over the old one, and the directory synced.
    Directories that are missing are made (mode 0755).

    Raises KernelError, which names the path, when it cannot be written; the old file is intact
    then.
    """
    name = os.fspath(path)
    try:
        _replace(name, text.encode())
    except OSError as error:
        raise KernelError(error.errno or 0, f"write {name}", hint=_HINT) from error
    log.info("%(file)s was written", {"file": name})


def read_subnet_env(path: str | os.PathLike[str] = DEFAULT_PATH) -> SubnetEnv:
    """Read the file as flannel does at its start; a missing one is empty.

    A value may be a comma list: entries that are no CIDR are skipped, and none or more
    than one that are left count as nothing said. The last line of a key wins; quotes,
    comments and a leading ``export`` are understood as in a shell.

    Raises KernelError, which names the path, when it is there but cannot be read, ConfigError when
    it is no regular file.
    """
    name = os.fspath(path)
    try:
        data = _read(name)
    except (FileNotFoundError, NotADirectoryError):
        return SubnetEnv()
    except OSError as error:
        hint = "make it readable, or name another file with --subnet-file"
        raise KernelError(error.errno or 0, f"read {name}", hint=hint) from error
    values = _assignments(data.decode(errors="replace"))
    mtu = values.get("FLANNEL_MTU", "")
    return SubnetEnv(
        networks=_cidrs(values, _NETWORK, name),
        subnets=_cidrs(values, _SUBNET, name),
        mtu=int(mtu) if mtu.isascii() and mtu.isdigit() and len(mtu) < 6 else None,
        ipmasq=values.get("FLANNEL_IPMASQ") == "true",
    )


def require_regular(path: str | os.PathLike[str]) -> None:
    """Raise ConfigError when there is a FIFO, a socket or a device at ``path``. A directory in the
    way is a failure to write the file, which stops nothing else."""
    name = os.fspath(path)
    try:
        mode = os.stat(name).st_mode
    except OSError:  # none, or none that can be read, which is reported when it is
        return
    if not (stat.S_ISREG(mode) or stat.S_ISDIR(mode)):
        raise ConfigError(
            f"{name}: not a regular file", hint="name another file with --subnet-file"
        )


def previous_subnets(path: str | os.PathLike[str], config: NetworkConfig) -> dict[int, str]:
    """Return the subnets this node had, or was given by hand, as far as they fit ``config``.

    A subnet counts when its family is switched on and it is a true part of that family's
    Network; others are left out with a log line. So a file written by hand before the first
    start decides which subnet the node takes. A file that cannot be read is logged and counts as
    empty.
    """
    try:
        said = read_subnet_env(path).subnets
    except KernelError as error:
        log.warning("%(file)s cannot be read: %(error)s", {"file": os.fspath(path), "error": error})
        return {}
    found: dict[int, str] = {}
    networks = {4: config.network, 6: config.ipv6_network}
    for family, text in said.items():
        network = networks[family]
        if network is None:
            continue
        if _is_part(ip_network(text), network):
            found[family] = text
        else:
            log.warning(
                "%(file)s: subnet %(subnet)s is ignored: it is not a part of Network %(network)s",
                {"file": os.fspath(path), "subnet": text, "network": network},
            )
    return found


def _is_part(subnet: IPv4Network | IPv6Network, network: IPv4Network | IPv6Network) -> bool:
    return subnet.prefixlen > network.prefixlen and subnet.network_address in network


def _own_subnet(text: str, family: int) -> IPv4Network | IPv6Network:
    try:
        subnet = ip_network(text, strict=False)
    except ValueError as error:
        raise ConfigError(
            f"subnet {text!r}: {error}", hint="write it like 10.244.3.0/24"
        ) from error
    if subnet.version != family or subnet.num_addresses < 2:
        raise ConfigError(
            f"subnet {text!r} is no IPv{family} subnet with room for pods",
            hint="write it like 10.244.3.0/24 or fd00:10:244:3::/64",
        )
    return subnet


def _read(name: str) -> bytes:
    """The file's content. Raises OSError, and ConfigError for what is no regular file: a FIFO
    would be waited for, a device replaced."""
    handle = os.open(name, os.O_RDONLY | os.O_NONBLOCK | os.O_NOCTTY | os.O_CLOEXEC)
    with open(handle, "rb") as file:
        mode = os.fstat(handle).st_mode
        if stat.S_ISDIR(mode):
            raise IsADirectoryError(errno.EISDIR, os.strerror(errno.EISDIR), name)
        if not stat.S_ISREG(mode):
            raise ConfigError(
                f"{name}: not a regular file", hint="name another file with --subnet-file"
            )
        return file.read(1 << 16)


def _replace(name: str, data: bytes) -> None:
    import tempfile  # loads decompressors, and most runs find the file right

    folder = os.path.dirname(name) or "."
    os.makedirs(folder, mode=0o755, exist_ok=True)
    handle, temporary = tempfile.mkstemp(prefix=f".{os.path.basename(name)}.", dir=folder)
    try:
        with open(handle, "wb") as file:
            file.write(data)
            file.flush()
            os.fchmod(handle, 0o644)  # mkstemp gives 0600, and a umask is not asked
            os.fsync(handle)
        os.rename(temporary, name)
    except BaseException:
        with contextlib.suppress(OSError):
            os.unlink(temporary)
        raise
    directory = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(directory)
    finally:
        os.close(directory)


def _assignments(text: str) -> dict[str, str]:
    values: dict[str, str] = {}
    for line in text.splitlines():
        key, equals, value = line.strip().removeprefix("export ").partition("=")
        if equals and not key.startswith("#"):
            values[key.strip()] = _unquoted(value.strip())
    return values


def _unquoted(value: str) -> str:
    if value[:1] in ("'", '"'):
        return value[1:].partition(value[0])[0]
    return value.partition(" #")[0].rstrip()


def _cidrs(values: Mapping[str, str], keys: Mapping[int, str], name: str) -> dict[int, str]:
    found: dict[int, str] = {}
    for family, key in keys.items():
        if key not in values:
            continue
        entries = [_cidr(entry, family) for entry in values[key].split(",")]
        valid = [entry for entry in entries if entry]
        if len(valid) == 1:
            found[family] = valid[0]
        else:
            log.warning(
                "%(file)s: what does not fit in %(key)s is ignored; %(count)d of its entries count",
                {"file": name, "key": key, "count": len(valid)},
            )
    return found


def _cidr(text: str, family: int) -> str:
    """Return a CIDR as Go's net.ParseCIDR takes it, masked, or "" when it is none."""
    address, _, length = text.partition("/")
    if not (length.isascii() and length.isdigit()) or "%" in address:
        return ""
    try:
        network = ip_network(text, strict=False)
    except ValueError:
        return ""
    return str(network) if network.version == family else ""
