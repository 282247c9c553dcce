"""The method on a CUDA machine that is to be had for minutes and has no network: README.md has the commands."""
