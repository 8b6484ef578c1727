"""Stream a large dataset into blocks, on as many machines as there are branches.

start ──┬─ build ─┬── join ── end
        └─ build ─┘

python flows/dataset_flow.py run                                                  a small dataset of a hub on localhost
python flows/dataset_flow.py run --dataset hf://owner/name --num_branches 64 --max-workers 64
python flows/train_flow.py run --dataset datasets/…                                  as the last line of its output says

Each file of the source has blocks of its own, so the result does not depend on the number of branches. A killed
branch goes on behind its last block.
"""

from metaflow import FlowSpec, Parameter, current, huggingface_hub, retry, step

from metaflow_extensions.hf import parameters as types
from metaflow_hf.data.formats import parse_columns
from metaflow_hf.data.progress import BuildLines, BuildProgress
from metaflow_hf.data.sharded import ShardedDataset

EMBEDDED_DATASET = "hf://metaflow-hf/python-docs"


class DatasetFlow(FlowSpec):
    """Blocks of a dataset in the flow's datastore, for any training to read."""

    dataset = Parameter(
        "dataset",
        type=types.source,
        default=EMBEDDED_DATASET,
        help="hf://[owner/]name[:config[:split]][@revision], or files.",
    )
    num_branches = Parameter("num_branches", default=2, help="How many branches share the files, at most.")
    samples_per_block = Parameter("samples_per_block", default=100_000, help="Rows a block.")
    format = Parameter("format", type=types.text, default="auto", help="Of the rows; see docs/data.md.")
    columns = Parameter("columns", type=types.text, default="", help="prompt=question,completion=answer")
    text_column = Parameter(
        "text_column", type=types.text, default="", help="Instead of columns: one column."
    )
    keep_columns = Parameter("keep_columns", type=types.text, default="", help="Other columns; default: all.")
    on_bad_row = Parameter(
        "on_bad_row", type=types.one_of("raise", "skip"), default="raise", help="raise or skip."
    )
    ascii_only = Parameter("ascii_only", type=bool, default=False, help="Keep rows of ASCII text only.")
    documents = Parameter(
        "documents",
        type=types.one_of("whole", "pages"),
        default="whole",
        help="One row for each document (whole), or for each page of a PDF (pages).",
    )
    compression = Parameter(
        "compression", type=types.one_of("zstd"), default="", help="Of the blocks; none by default."
    )

    @huggingface_hub
    @step
    def start(self):
        """Look at the source at one commit, and share its files out; nothing is downloaded yet."""
        self.hub = "embedded" if self.dataset == EMBEDDED_DATASET else None
        current.huggingface_hub.connect(self.hub)
        plan = ShardedDataset.plan(
            self.dataset,
            samples_per_block=self.samples_per_block,
            format=self.format,
            columns=parse_columns(self.columns),
            text_column=self.text_column or None,
            keep_columns=self.keep_columns.split(",") if self.keep_columns else None,
            on_bad_row=self.on_bad_row,
            ascii_only=self.ascii_only,
            documents=self.documents,
            compression=self.compression or None,
        )
        self.plan = plan.to_json()
        self.branches = plan.groups(self.num_branches)
        print(f"{len(plan.sizes)} files of {plan.location} in {len(self.branches)} branches")
        self.next(self.build, foreach="branches")

    @retry(times=3, minutes_between_retries=0)
    @huggingface_hub
    @step
    def build(self):
        """Build this branch's files, what is missing of them."""
        current.huggingface_hub.connect(self.hub)
        plan = ShardedDataset.from_json(self.plan)
        told = BuildProgress(
            f"files {', '.join(map(str, self.input[:5]))}{' …' if len(self.input) > 5 else ''}",
            BuildLines(print),
            total_bytes=plan.num_bytes(self.input),
        )
        plan.build(self.input, progress=told.shard_committed, meter=told.meter)
        told.complete()
        self.next(self.join)

    @huggingface_hub
    @step
    def join(self, inputs):
        """One manifest lists the blocks of all files in order."""
        self.merge_artifacts(inputs, include=["plan"])
        plan = ShardedDataset.from_json(self.plan)
        manifest = plan.assemble()
        self.blocks = {
            "type": "dataset",
            "key": plan.key,
            "digest": manifest.digest,
            "total_samples": manifest.total_samples,
            "total_blocks": manifest.total_blocks,
        }
        self.next(self.end)

    @step
    def end(self):
        """Say how to train on it."""
        print(f"{self.blocks['total_samples']:,} rows in {self.blocks['total_blocks']} blocks")
        print(f"python flows/train_flow.py run --dataset {self.blocks['key']}")


if __name__ == "__main__":
    DatasetFlow()
