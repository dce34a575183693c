"""Programs and maps of the kernel's eBPF: where they are pinned, how they get loaded, and
how programs are attached to devices. Compiling happens in a process of its own; see ``loader``."""
