"""What the cuda and rocm backends share: kernel sources, vendor shims, launch plans."""
