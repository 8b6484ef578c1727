"""Where rows come from: files of this machine and datasets of the hub, read from any cursor on."""

from metaflow_hf.data.sources.opening import Source, open_source

__all__ = ["Source", "open_source"]
