"""Programs and maps of the kernel's eBPF: where they are pinned, how they get loaded, and
how programs hang on devices. Compiling happens in a process of its own; see ``loader``."""
