# Completion of flannel-dp for fish. Installed in share/fish/vendor_completions.d.
_FLANNEL_DP_COMPLETE=fish_source flannel-dp | source
