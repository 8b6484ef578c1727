"""``build_blocks`` for people who watch it."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from metaflow_hf.data.build import build_blocks, dataset_key, default_store, plan_dataset, write_dataset
from metaflow_hf.data.manifest import BlockManifest
from metaflow_hf.data.progress import BuildProgress, BuildState, source_bytes
from metaflow_hf.data.sources import open_source
from metaflow_hf.errors import ConfigError
from metaflow_hf.store import configured_store, open_store


@dataclass(frozen=True, slots=True, kw_only=True)
class BuiltDataset:
    """A finished dataset; ``place`` is what other commands take: its key, directory or URI."""

    place: str
    uri: str
    manifest: BlockManifest

    def to_json(self) -> dict[str, Any]:
        about = {name: value for name, value in self.manifest.to_json().items() if name != "blocks"}
        return {"dataset": self.place, "uri": self.uri, **about}


def build_metered(
    source: str,
    output_dir: str | None = None,
    *,
    into_datastore: bool = False,
    num_proc: int = 1,
    show: Callable[[BuildState], None],
    **settings: Any,
) -> BuiltDataset:
    """``build_blocks`` with its ``settings``, whose progress is shown while it reads and after each block.

    ``into_datastore`` puts it into Metaflow's datastore. With ``num_proc`` above 1 what other processes read is not
    counted: then only what is committed is shown. Raises ``ConfigError`` for two places, else as ``build_blocks``.
    """
    if into_datastore and output_dir is not None:
        raise ConfigError("give either an output directory or the datastore, not both.")
    opened = open_source(source, documents=settings.get("documents", "whole"))
    spec = plan_dataset(opened, **settings)
    key = f"datasets/{dataset_key(spec)}"
    if output_dir is not None:
        store = open_store(output_dir)
    else:
        store = configured_store().child(key) if into_datastore else default_store(spec)
    is_metered = num_proc == 1 and not (spec.max_rows or spec.max_bytes)
    total = source_bytes(opened) if is_metered else 0
    told = BuildProgress(spec.dataset_name, show, total_bytes=total)
    if num_proc > 1:
        manifest = build_blocks(source, store.uri, num_proc=num_proc, progress=told.committed, **settings)
    else:
        manifest = write_dataset(told.meter(opened), spec, store, progress=told.committed)
    told.committed(manifest)
    told.complete()
    return BuiltDataset(place=output_dir or key, uri=store.uri, manifest=manifest)
