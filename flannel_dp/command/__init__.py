"""The command flannel-dp: flags, the objects they ask for, and what is printed."""
