"""The words of errors for who reads them: flags of the command, or parameters of the library.

Errors are worded with flags where they are raised. A program that calls the library reads the
parameters instead, and the command has flags named while it runs.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

#: How many runs of the command are on their way in this process.
_commands = 0

#: The parameters of DataPlane, of the sources and of their options, by the command's flags.
PARAMETERS = {
    "--allow-shrink to sync": "allow_shrink=True to DataPlane",
    "--allow-shrink": "allow_shrink=True",
    "--behind-nat": "behind_nat=True",
    "--counters": "counters=",
    "--etcd-cafile": "cafile=",
    "--etcd-certfile": "certfile=",
    "--etcd-endpoints": "endpoints=",
    "--etcd-keyfile": "keyfile=",
    "--etcd-password": "password=",
    "--etcd-password-file": "password_file=",
    "--etcd-prefix": "prefix=",
    "--etcd-username": "username=",
    "'--forwarding ebpf'": 'config.with_forwarding("ebpf")',
    "'--forwarding kernel'": 'config.with_forwarding("kernel")',
    "--iface": "iface=",
    "--iface-can-reach": "iface_can_reach=",
    "--iface-regex": "iface_regex=",
    "--kube-annotation-prefix": "annotation_prefix=",
    "--kube-api-url": "api_url=",
    "--kubeconfig-file": "kubeconfig=",
    "--leases": "path=",
    "--netns": "netns=",
    "--no-nexthops": "nexthops=False",
    "--node-name": "node_name=",
    "--public-ip": "public_ip=",
    "--public-ipv6": "public_ipv6=",
    "--run-dir": "run_dir=",
    "--subnet": "subnet=",
    "--subnet-file": "subnet_file=",
    "--take-over": "take_over=True",
}


@contextmanager
def naming_flags() -> Iterator[None]:
    """Have errors name the command's flags until the end of the block, in this process."""
    global _commands
    _commands += 1
    try:
        yield
    finally:
        _commands -= 1


def worded(text: str, *, bare: bool = False) -> str:
    """Return the text of an error for its reader: as it is for the command, else with parameters,
    ``iface=`` or ``bare`` (iface). Commands that it quotes, such as 'flannel-dp show --netns h1',
    keep their flags."""
    if _commands or "--" not in text:
        return text
    import re

    flags = "|".join(sorted(map(re.escape, PARAMETERS), key=len, reverse=True))
    form = re.compile(rf"'flannel-dp [^']*'|(?:{flags})(?![\w-])(?: (?=\d|[A-Z]{{2}}|[0-9a-f]+:))?")

    def instead(found: re.Match[str]) -> str:
        flag = found[0].rstrip()
        if flag not in PARAMETERS:
            return found[0]
        parameter = PARAMETERS[flag]
        if bare and parameter.endswith("="):
            return parameter[:-1] + found[0][len(flag) :]
        return parameter if parameter.endswith("=") else parameter + found[0][len(flag) :]

    return form.sub(instead, text)
