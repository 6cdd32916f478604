"""The minimal /etc of a sandbox, as values; pure."""

from typing import Final

from sandbox.plan import AGENT_INSIDE, INIT_INSIDE, SandboxPlan

# Taken from the root file system where they exist. No name service (resolv.conf), no accounts, no machine-id.
FROM_ROOTFS: Final = (
    "alternatives",
    "ca-certificates.conf",
    "chromium.d",
    "debian_version",
    "fonts",
    "ld.so.cache",
    "ld.so.conf",
    "ld.so.conf.d",
    "localtime",
    "magic",
    "mime.types",
    "os-release",
    "protocols",
    "services",
    "ssl",
    "terminfo",
    "timezone",
)
# Configuration of runtimes; every name that starts so.
FROM_ROOTFS_PREFIXES: Final = ("java", "maven", "python3", "perl")
# Of those nothing may be taken even from a root given as a directory: the sandbox writes its own.
NEVER: Final = frozenset({"resolv.conf", "shadow", "shadow-", "gshadow", "gshadow-", "machine-id", "mtab"})

# Written by the sandbox, never shown from the root file system.
OWN: Final = frozenset({"passwd", "group", "hosts", "hostname", "nsswitch.conf", "host.conf", "gitconfig", "stockade"})

# What is the same in every sandbox, unless its plan says otherwise.
FIXED: Final = {
    "passwd": (
        "root:x:0:0:root:/home/agent:/bin/sh\n"
        f"agent:x:{AGENT_INSIDE}:{AGENT_INSIDE}:agent:/home/agent:/bin/sh\n"
        f"init:x:{INIT_INSIDE}:{INIT_INSIDE}:init:/nonexistent:/usr/sbin/nologin\n"
        "nobody:x:65534:65534:nobody:/nonexistent:/usr/sbin/nologin\n"
    ),
    "group": f"root:x:0:\ntty:x:5:\nagent:x:{AGENT_INSIDE}:\ninit:x:{INIT_INSIDE}:\nnogroup:x:65534:\n",
    "host.conf": "multi on\n",
    # The workspace may be owned by somebody else on disk; git refuses such a repository otherwise (CVE-2022-24765).
    "gitconfig": "[safe]\n\tdirectory = *\n",
}

# Where certificate bundles are on Debian and its children; the first that exists is extended.
CA_BUNDLE: Final = "/etc/ssl/certs/ca-certificates.crt"
CA_BUNDLE_INSIDE: Final = "stockade/ca-bundle.pem"
CA_INSIDE: Final = "stockade/ca.pem"
# The same for Java, where Debian keeps it and what the agent gets.
JAVA_STORE: Final = "/etc/ssl/certs/java/cacerts"
JAVA_STORE_INSIDE: Final = "stockade/ca.jks"


def wanted(name: str) -> bool:
    """Say whether an entry of the host's /etc is shown inside."""
    return name in FROM_ROOTFS or name.startswith(FROM_ROOTFS_PREFIXES)


def files(plan: SandboxPlan) -> dict[str, str]:
    """Return the files below /etc by name: these defaults, overridden by those of the plan."""
    hosts = f"127.0.0.1\tlocalhost {plan.hostname}\n{plan.network.gate_address}\tgateway.internal\n"
    defaults = FIXED | {
        "hosts": hosts,
        "hostname": plan.hostname + "\n",
        "nsswitch.conf": (
            f"passwd: files\ngroup: files\nhosts: files{' dns' if plan.network.transparent else ''}\n"
            "services: files\nprotocols: files\n"
        ),
    }
    if plan.network.transparent:
        defaults["resolv.conf"] = f"nameserver {plan.network.gate_address}\noptions timeout:5 attempts:2\n"
    if plan.ca_certificate is not None:
        defaults[CA_INSIDE] = plan.ca_certificate
    return defaults | {file.name: file.text for file in plan.etc}
