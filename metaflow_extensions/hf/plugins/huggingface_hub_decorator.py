"""``@huggingface_hub``: repositories of the hub, cached in the flow's datastore."""

from collections.abc import Callable
from typing import TYPE_CHECKING, Any, ClassVar

from metaflow.metaflow_current import current

from .task_decorator import TaskDecorator, start_embedded_hub

if TYPE_CHECKING:
    from metaflow_hf.hub.loadspec import SnapshotEntry
    from metaflow_hf.hub.records import RunContext
    from metaflow_hf.hub.task_snapshots import TaskSnapshots
    from metaflow_hf.store import ObjectStore


class HuggingfaceHubDecorator(TaskDecorator):
    """Downloads repositories of the Hugging Face Hub once, stores them in the flow's datastore, and gives every later
    task, run and flow the same bytes from there. Adds ``current.huggingface_hub``.

    Parameters
    ----------
    load : Union[str, Tuple[str, str], Dict[str, Any], List[Any], None], default: None
        What to load before the step runs: "org/name", "org/name@revision", ("org/name", "path"), a dict of
        snapshot_download's arguments (and "path"), a dict of aliases {"base": "org/name"}, or a list of these.
        The paths are in `current.huggingface_hub.loaded`.
    cache_scope : str, default: "checkpoint"
        Where the snapshot is listed: "checkpoint" (this step and namespace), "flow" or "global". The bytes are
        stored once in any case.
    temp_dir_root : str, default: None
        Where directories are made for what is loaded without a path. By default beside the node's cache.
    verify : str, default: "once"
        When sha256 is checked: "once" (when the bytes come to this machine), "always" or "never". The size always.
    materialize : str, default: None
        How large files get into directories that were made for the task: "auto" (copied without cost where the file
        system can, else linked read-only to this machine's cache) or "copy" (always writable files of their own).
        By default what METAFLOW_HF_MATERIALIZE says, else "auto". Into paths that you name, always copies.

    MF Add To Current
    -----------------
    huggingface_hub -> metaflow_hf.hub.task_snapshots.TaskSnapshots
        Snapshots cached in the flow's datastore.

        @@ Returns
        -------
        TaskSnapshots

    """

    name = "huggingface_hub"
    defaults: ClassVar[dict[str, Any]] = {
        "load": None,
        "cache_scope": "checkpoint",
        "temp_dir_root": None,
        "verify": "once",
        "materialize": None,
    }
    _entries: "list[SnapshotEntry]"
    _snapshots: "TaskSnapshots | None" = None

    def check_arguments(self) -> None:
        from metaflow_hf.hub.linking import may_link
        from metaflow_hf.hub.loadspec import parse_snapshots, without_tokens

        may_link(self.attributes["materialize"])
        self._entries = parse_snapshots(self.attributes["load"])
        for name, allowed in (
            ("cache_scope", ("checkpoint", "flow", "global")),
            ("verify", ("once", "always", "never")),
        ):
            if self.attributes[name] not in allowed:
                raise ValueError(f"{name}={self.attributes[name]!r} is none of {', '.join(allowed)}.")
        # Metaflow stores the attributes of decorators with the run.
        self.attributes["load"], had_token = without_tokens(self.attributes["load"])
        if had_token:
            self.say("do not write tokens into load=; set HF_TOKEN. This one is used and stored nowhere.")

    def enter(self, store: "ObjectStore", run: "RunContext", find: Callable[[str], Any]) -> None:
        from metaflow_hf.hub.progress import DownloadLines
        from metaflow_hf.hub.task_snapshots import TaskSnapshots

        self._snapshots = TaskSnapshots(
            store,
            run=run,
            say=self.say,
            scope=self.attributes["cache_scope"],
            verify=self.attributes["verify"],
            temp_dir_root=self.attributes["temp_dir_root"],
            materialize=self.attributes["materialize"],
            start_embedded=start_embedded_hub,
            on_event=DownloadLines(self.say),
        )
        current._update_env({"huggingface_hub": self._snapshots})  # noqa: SLF001
        self._snapshots.load_entries(self._entries)

    def leave(self) -> None:
        if self._snapshots is not None:
            self._snapshots.close()
